"""Starts, observes and ends the training runs of the programs that inject faults."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import tqdm

from tf_largebatch.errors import UserError
from tf_largebatch.signals import next_signal, stop_signals
from tools import launch_local

_ROOT = pathlib.Path(__file__).parents[2]
_POLL_SECONDS = 0.05
_LIMIT_SECONDS = 1800.0  # Only a hang takes so long, even on a busy machine.
_UNDISTURBED_LIMIT_SECONDS = 3600.0
_START = re.compile(
  r"^\[task 0\] .*(?:Continuing from|Beginning at) step (\d+) of", flags=re.MULTILINE
)
_RESTART = re.compile(r"^Restart \d+ of", flags=re.MULTILINE)


def prepare():
  """Blocks `stop_signals()`: only `pause` receives them, so they never interrupt a clean-up."""
  signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
  tqdm.tqdm.monitor_interval = 0  # `launch_local.start_process` does not allow a thread.


def pause(seconds: float = _POLL_SECONDS):
  """Sleeps; exits the program if one of `stop_signals()` arrives."""
  number = next_signal(stop_signals(), seconds)
  if number:
    sys.exit(128 + number)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
  """Polls `condition` and returns whether it became true within `seconds`."""
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      return False
    pause()
  return True


def read_records(work_dir: pathlib.Path) -> list[dict]:
  """Returns the records of metrics.jsonl; skips a last line that is only partly written."""
  records = []
  with contextlib.suppress(FileNotFoundError, ValueError):
    for line in (work_dir / "metrics.jsonl").read_text().splitlines():
      records.append(json.loads(line))
  return records


def last_step(work_dir: pathlib.Path) -> int:
  """Returns the last step in metrics.jsonl, or 0 if there is none."""
  records = read_records(work_dir)
  return records[-1]["step"] if records else 0


def last_line(log: pathlib.Path) -> str:
  """Returns the last line of a log that is not blank, or ""."""
  lines = log.read_text(errors="replace").splitlines()
  return next((line for line in reversed(lines) if line.strip()), "")


class LaunchedRun:
  """A training run under `tools.launch_local`.

  Attributes:
    work_dir: its work directory.
    log: the output of the launcher and of all tasks, from every launch.
  """

  def __init__(self, directory: pathlib.Path, arguments: list[str]):
    self.work_dir = directory / "run"
    self.log = directory / "log.txt"
    directory.mkdir(parents=True)
    self._arguments = [*arguments, "--log_every_steps=1", f"--work_dir={self.work_dir}"]
    self._launcher: subprocess.Popen | None = None
    self._launchers = 0

  def launch(self, tasks: int, max_restarts: int = 0):
    command = [sys.executable, "-m", "tools.launch_local", f"--tasks={tasks}"]
    command += [f"--max_restarts={max_restarts}", "--", *self._arguments]
    with open(self.log, "a") as log:
      self._launcher = launch_local.start_process(command, dict(os.environ), log, _ROOT)
    self._launchers += 1

  def terminate(self):
    self._launcher.terminate()

  def wait(self, seconds: float = _LIMIT_SECONDS) -> int:
    """Waits for the end; returns the launcher's exit status.

    Raises:
      UserError: the run does not end in time.
    """
    if not wait_until(lambda: self.ended, seconds):
      raise UserError(f"The run did not end within {seconds:g} s; see {self.log}")
    return self._launcher.returncode

  def wait_for(self, condition: Callable[[], bool], message: str):
    """Polls until the condition is true.

    Raises:
      UserError: the run ended first, or it took too long. Begins with `message`.
    """
    wait_until(lambda: condition() or self.ended, _LIMIT_SECONDS)
    if not condition():
      how = "the run ended" if self.ended else f"waited {_LIMIT_SECONDS:g} s"
      raise UserError(f"{message}: {how}; see {self.log}")

  @property
  def ended(self) -> bool:
    return self._launcher.poll() is not None

  def tasks(self) -> list[psutil.Process]:
    """Returns the tasks that run now."""
    try:
      return psutil.Process(self._launcher.pid).children()
    except psutil.NoSuchProcess:
      return []

  def kill(self):
    """Kills the launcher, and the tasks with it."""
    if self._launcher is not None and not self.ended:
      tasks = self.tasks()
      self._launcher.kill()
      self._launcher.wait()
      psutil.wait_procs(tasks, timeout=10)  # The kernel kills them when the launcher ends.

  def step(self) -> int:
    return last_step(self.work_dir)

  def metrics_inode(self) -> int:
    """Returns the inode of metrics.jsonl, which every start of training replaces; 0 if none."""
    try:
      return (self.work_dir / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
      return 0

  def log_text(self) -> str:
    return self.log.read_text(errors="replace")

  @property
  def launches(self) -> int:
    """How often all tasks were started, by new launchers or by a launcher's restarts."""
    return self._launchers + len(_RESTART.findall(self.log_text()))

  def starts(self) -> list[int]:
    """Returns the steps that the log says training started or resumed from, in order."""
    return [int(step) for step in _START.findall(self.log_text())]

  def outcome(self) -> dict:
    """Returns what must be reproduced: the digest of the weights, all losses and errors."""
    result = json.loads((self.work_dir / "result.json").read_text())
    curve = [[r["kind"], r["step"], r["loss"], r["error"]] for r in read_records(self.work_dir)]
    return {"weights_sha256": result["weights_sha256"], "curve": curve}


def train_undisturbed(directory: pathlib.Path, tasks: int, arguments: list[str]) -> LaunchedRun:
  """Trains without faults, as the reference for other runs.

  Raises:
    UserError: the run failed.
  """
  run = LaunchedRun(directory, arguments)
  run.launch(tasks)
  try:
    status = run.wait(_UNDISTURBED_LIMIT_SECONDS)
  finally:
    run.kill()
  if status:
    raise UserError(f"The run without faults ended with status {status}; see {run.log}")
  return run


@contextlib.contextmanager
def trainer_tasks(
  addresses: list[str],
  prefixes: list[list[str]],
  arguments: list[str],
  directory: pathlib.Path,
):
  """Runs `tf_largebatch.train` as tasks without a launcher, and kills what is left at the end.

  Args:
    addresses: host:port of each task.
    prefixes: command that starts each task's command, e.g. in another namespace; [] for none.
    arguments: the trainer's flags, without --work_dir.
    directory: gets each task's log, RANK.log, and the work directory, run.

  Yields:
    The processes by rank.
  """
  tasks = []
  try:
    for rank, prefix in enumerate(prefixes):
      command = [*prefix, sys.executable, "-m", "tf_largebatch.train", *arguments]
      environment = launch_local.task_environment(addresses, rank) | {
        "CUDA_VISIBLE_DEVICES": "-1",  # Tasks on one machine cannot share its GPUs.
        "TMPDIR": str(directory),  # Removes temporary files of a killed task as well.
      }
      with open(directory / f"{rank}.log", "w") as log:
        tasks.append(
          launch_local.start_process(
            [*command, f"--work_dir={directory}/run"], environment, log, _ROOT
          )
        )
    yield tasks
  finally:
    for process in processes_of(tasks):
      with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    for task in tasks:
      task.wait()


def processes_of(tasks: list[subprocess.Popen]) -> list[psutil.Process]:
  """Returns the running processes in the tasks' sessions, that is also what the tasks started."""
  sessions = {task.pid for task in tasks}
  found = []
  for process in psutil.process_iter():
    with contextlib.suppress(psutil.Error, OSError):  # The process ended meanwhile.
      if process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) in sessions:
        found.append(process)
  return found
