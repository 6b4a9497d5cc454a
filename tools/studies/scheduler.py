"""Trains the runs of studies, several at once, until all have ended or a signal arrives."""

import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import tqdm

from tf_largebatch import train
from tf_largebatch.errors import UserError
from tf_largebatch.signals import next_signal, stop_signals
from tools.studies import output, run_files, trainer_log
from tools.studies.plan import PlannedRun

_POLL_SECONDS = 1.0
_PROGRESS_SECONDS = 600.0  # Between two lines of progress if stderr is not a terminal.
_GRACE_SECONDS = 120.0  # For a run to end its step and save.
_STARTS = 4  # Attempts at a run that ends for a reason other than a user's mistake.
_IN_USE = "is in use by a run"  # In the trainer's message.
_PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>.


@dataclasses.dataclass
class ActiveRun:
  """A run in training.

  Attributes:
    run: as planned.
    process: the trainer.
    share: which share of the cores it has.
    log_size: bytes of its log that earlier attempts wrote.
    epochs: trained so far.
  """

  run: PlannedRun
  process: subprocess.Popen
  share: int
  log_size: int
  epochs: float


def _start_trainer(
  run: PlannedRun, work_dir: pathlib.Path, passed_on: list[str], cores: list[int]
) -> subprocess.Popen:
  """Starts or continues a run on some cores; its process gets a SIGTERM when this one ends."""
  libc, parent = ctypes.CDLL(None), os.getpid()

  def prepare():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    os.sched_setaffinity(0, cores)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # It ended before the call to prctl.
      os._exit(1)

  with open(run_files.log_path(work_dir), "ab") as log:
    return subprocess.Popen(
      [
        *(sys.executable, "-m", train.__name__, f"--flagfile={run.flagfile}"),
        *(
          *run.changes,
          f"--seed={run.recipe.seed}",
          *run.flags,
          *passed_on,
          f"--work_dir={work_dir}",
        ),
      ],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      # A terminal's Ctrl-C reaches only this program, which then sends each run one SIGTERM.
      start_new_session=True,
      preexec_fn=prepare,
    )


class Scheduler:
  """Holds the runs that wait and those in training, and shows their progress."""

  def __init__(self, runs: list[PlannedRun], runs_dir: str, results_dir: str, passed_on: list[str]):
    """
    Args:
      runs: of all studies.
      runs_dir: directory of the work directories.
      results_dir: directory of the results.
      passed_on: flags of the trainer for all runs.

    Raises:
      UserError: two recipes have the same name, or a result is damaged or of another recipe.
    """
    self._runs_dir, self._results_dir = pathlib.Path(runs_dir), pathlib.Path(results_dir)
    self._passed_on = passed_on
    planned = _merge(runs)
    results = {name: run_files.find_result(run, self._results_dir) for name, run in planned.items()}
    self._waiting = [run for name, run in planned.items() if results[name] is None]
    self._active: list[ActiveRun] = []
    self._starts = dict.fromkeys(planned, 0)
    self._planned, self._ended = len(planned), len(planned) - len(self._waiting)
    self._epoch_seconds = collections.defaultdict(list)  # By group.
    for result in filter(None, results.values()):
      self._record_speed(result)
    # tqdm's monitor thread would receive signals that the main thread blocks, and preexec_fn is
    # unsafe in a process with threads.
    tqdm.tqdm.monitor_interval = 0
    self._bar = tqdm.tqdm(
      total=sum(run.recipe.epochs for run in self._waiting),
      initial=sum(run_files.finished_epochs(self._runs_dir / run.name) for run in self._waiting),
      unit="epoch",
      smoothing=0,  # Small minibatches take longer per epoch: the mean of all epochs predicts best.
      bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs [{elapsed}, left {remaining}]",
      dynamic_ncols=True,
      file=None if sys.stderr.isatty() else open(os.devnull, "w"),  # noqa: SIM115
    )
    self._progress_time = time.monotonic()

  def train_all(self, jobs: int) -> int | None:
    """Trains until all runs have ended, or until a signal, which it returns."""
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
      raise UserError(f"--jobs={jobs} is more than the {len(cores)} cores here.")
    self._print(f"{self._ended} of {self._planned} runs are complete.")
    # `next_signal` receives them, so that no signal interrupts `_end` or `_stop`.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
      while self._waiting or self._active:
        free = sorted(set(range(jobs)) - {each.share for each in self._active})
        for share in free[: len(self._waiting)]:
          self._begin(self._waiting.pop(0), share, cores[share::jobs])
        stop = next_signal(stop_signals(), _POLL_SECONDS)
        if stop:
          return stop
        self._show_progress()
        for each in list(self._active):
          if each.process.poll() is not None:
            self._active.remove(each)
            self._end(each, len(cores[each.share :: jobs]), jobs)
      return None
    finally:
      self._stop()
      self._bar.close()

  def _begin(self, run: PlannedRun, share: int, cores: list[int]):
    self._runs_dir.mkdir(parents=True, exist_ok=True)
    self._starts[run.name] += 1
    work_dir = self._runs_dir / run.name
    log = run_files.log_path(work_dir)
    log_size = log.stat().st_size if log.exists() else 0
    process = _start_trainer(run, work_dir, self._passed_on, cores)
    epochs = run_files.finished_epochs(work_dir)
    self._active.append(ActiveRun(run, process, share, log_size, epochs))
    self._print(f"{run.name} {f'continues from epoch {epochs:.1f}' if epochs else 'begins'}.")

  def _end(self, ended: ActiveRun, cores: int, jobs: int):
    """Keeps a run's result or restarts it; raises a UserError if that would not help."""
    run, status = ended.run, ended.process.returncode
    work_dir = self._runs_dir / run.name
    log = run_files.log_path(work_dir)
    message = "" if status == 0 else trainer_log.last_message(log, ended.log_size)
    divergence = message if status == 1 and message.startswith(trainer_log.DIVERGED) else None
    if status and not divergence:
      # A run of a study that was killed holds its work directory until it has saved.
      held = _IN_USE in message
      if (status in (1, 2) and not held) or self._starts[run.name] == _STARTS:
        raise UserError(f"{run.name} ended with status {status}: {message} (see {log})")
      self._print(f"{run.name} ended with status {status} ({message}); it is restarted.")
      self._waiting.insert(0, run)
      return
    result = run_files.make_result(run, work_dir, cores, divergence)
    path = self._results_dir / run.study / f"{run.name}.json"
    text = json.dumps(result, indent=1) + "\n"
    output.write_all(f"--results_dir={self._results_dir}", {str(path): text.encode()})
    self._ended += 1
    self._record_speed(result)
    outcome = divergence
    if not divergence:
      outcome = f"error {result['val_error_median_last_5']:.2%}, {result['seconds']:.0f} s"
    line = f"{self._ended} of {self._planned}: {run.name}: {outcome}; {self._estimate(jobs)}"
    self._print(line)

  def _show_progress(self):
    for each in self._active:
      epochs = run_files.finished_epochs(self._runs_dir / each.run.name)
      self._bar.update(epochs - each.epochs)
      each.epochs = epochs
    due = time.monotonic() - self._progress_time >= _PROGRESS_SECONDS
    if due and not sys.stderr.isatty():
      self._progress_time = time.monotonic()
      self._print(str(self._bar))

  def _record_speed(self, result: dict):
    if result.get("seconds"):
      seconds = result["seconds"] / result["recipe"]["epochs"]
      self._epoch_seconds[run_files.group_of(result)].append(seconds)

  def _estimate(self, jobs: int) -> str:
    """Estimates the time left from the complete runs of the same group, or else of all."""
    means = {group: statistics.fmean(each) for group, each in self._epoch_seconds.items()}
    if not means:
      return "time left unknown"
    left = [(run, run.recipe.epochs) for run in self._waiting]
    left += [(each.run, each.run.recipe.epochs - each.epochs) for each in self._active]
    mean = statistics.fmean(means.values())
    seconds = sum(epochs * means.get(run.group, mean) for run, epochs in left) / jobs
    return f"about {tqdm.tqdm.format_interval(seconds)} left"

  def _print(self, line: str):
    tqdm.tqdm.write(line)
    sys.stdout.flush()

  def _stop(self):
    """Has the runs in training save, and waits until they have."""
    for each in self._active:
      each.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for each in self._active:
      with contextlib.suppress(subprocess.TimeoutExpired):
        each.process.wait(max(0.0, deadline - time.monotonic()))
      each.process.kill()
      each.process.wait()


def _merge(runs: list[PlannedRun]) -> dict[str, PlannedRun]:
  """Returns the runs by name, one seed after the other, so that every group has a result early.

  A run that several studies plan belongs to the first of them.
  """
  planned = {}
  for run in sorted(runs, key=lambda run: run.recipe.seed):
    first = planned.setdefault(run.name, run)
    if first.recipe != run.recipe:
      raise UserError(
        f"{first.flagfile} and {run.flagfile} have different recipes, but their results would have "
        f"the same name, {run.name}; rename one."
      )
  return planned
