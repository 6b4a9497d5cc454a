r"""Harms runs at random moments, and shows that they end with an untouched run's bytes.

  python -m tools.resilience.chaos --faults=30 --tasks=1,2
  python -m tools.resilience.chaos --elastic=2,1,4
  python -m tools.resilience.chaos --faults=8 --tasks=2 -- --flagfile=flags/… --data_dir=…

The first trains once untouched for each number of tasks, then under `tools.launch_local
--max_restarts` while random tasks are killed (SIGKILL), stopped (SIGSTOP), terminated (SIGTERM),
lose their newest checkpoint, or their launcher, at random moments of start-up, training and
evaluation. Every run must end with the untouched run's `weights_sha256`, losses and errors. The
second moves one run from task to task numbers by SIGTERM, and compares it with an untouched one.
Flags behind `--` take the place of the small synthetic recipe. The exit status is 1 if a run
differs.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import tqdm
from absl import app, flags

from tf_largebatch.errors import UserError

_TINY = (
  "--dataset=synthetic",
  "--train_split=train[:1280]",
  "--validation_split=validation[:200]",
  "--image_size=8",
  "--network=resnet20",
  "--dtype=float32",
  "--workers=4",
  "--per_worker_batch_size=8",
  "--epochs=4",
  "--warmup_epochs=1",
  "--decay_epochs=2",
  "--evaluation_batch_size=20",
  "--checkpoint_every_steps=7",
  "--cluster_timeout_minutes=0.5",  # For a task that is stopped before it has come up.
)
_KINDS = ("kill", "stop", "terminate", "corrupt", "launcher")
_PAUSE_SECONDS = 5.0  # Of a single task, whose silence nobody notices, until it is let go on.
_START_SHARE = 0.3  # Of the faults that come before training begins.
_SPREAD_SECONDS = 8.0  # After a step was seen, a fault comes within this time.
_LIMIT_SECONDS = 300.0
_ROOT = pathlib.Path(__file__).parents[2]


def define_flags():
  flags.DEFINE_integer("faults", 30, "Faults in all.", lower_bound=0)
  flags.DEFINE_list("tasks", ["1", "2"], "Numbers of tasks, in turn.")
  flags.DEFINE_integer("faults_per_run", 4, "Faults that a run takes at most.", lower_bound=1)
  flags.DEFINE_list("elastic", [], "Instead: numbers of tasks that one run is moved through.")
  flags.DEFINE_integer("seed", 0, "Of the faults' kinds, places and moments.")
  flags.DEFINE_string("json", None, "File for the figures.")


@dataclasses.dataclass
class Fault:
  """One fault and what came of it.

  Attributes:
    tasks: of the run.
    kind: one of `_KINDS`.
    step: the last step that was recorded before it.
    restored: the step that the run went on from; `step` where nothing had to start again.
    seconds: from the fault to the next new step.
  """

  tasks: int
  kind: str
  step: int
  restored: int = 0
  seconds: float = 0.0

  @property
  def steps_twice(self) -> int:
    return max(0, self.step - self.restored)


class Run:
  """A run under `tools.launch_local`, in a directory of its own."""

  def __init__(self, directory: pathlib.Path, arguments: list[str]):
    self.work_dir = directory / "run"
    self.log = directory / "log.txt"
    directory.mkdir(parents=True)
    self._arguments = [*arguments, "--log_every_steps=1", f"--work_dir={self.work_dir}"]
    self._launcher: subprocess.Popen | None = None

  def launch(self, tasks: int, max_restarts: int = 0):
    command = [sys.executable, "-m", "tools.launch_local", f"--tasks={tasks}"]
    with open(self.log, "a") as log:
      self._launcher = subprocess.Popen(
        [*command, f"--max_restarts={max_restarts}", "--", *self._arguments],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def send_signal(self, number: int):
    self._launcher.send_signal(number)

  def wait(self, seconds: float = _LIMIT_SECONDS) -> int:
    return self._launcher.wait(timeout=seconds)

  @property
  def ended(self) -> bool:
    return self._launcher.poll() is not None

  def tasks(self) -> list[psutil.Process]:
    """Those that run now."""
    try:
      return psutil.Process(self._launcher.pid).children()
    except psutil.NoSuchProcess:
      return []

  def kill(self):
    """Ends everything, at once."""
    if self._launcher is not None and not self.ended:
      tasks = self.tasks()
      self._launcher.kill()
      self._launcher.wait()
      psutil.wait_procs(tasks, timeout=10)  # The kernel kills them with their launcher.

  def records(self) -> list[dict]:
    """Of metrics.jsonl, as far as it can be read while it is written."""
    try:
      lines = (self.work_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
      return []
    found = []
    for line in lines:
      try:
        found.append(json.loads(line))
      except ValueError:
        break
    return found

  def step(self) -> int:
    return max((record["step"] for record in self.records()), default=0)

  def sitting(self) -> int:
    """Of the file of the metrics, which each start makes anew; 0 before the first."""
    try:
      return (self.work_dir / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
      return 0

  def starts(self) -> list[int]:
    """The steps that training began at or was continued from so far, in order."""
    log = self.log.read_text(errors="replace")
    told = r"^\[task 0\] .*(?:Continuing from|Beginning at) step (\d+) of"
    return [int(step) for step in re.findall(told, log, re.MULTILINE)]

  def outcome(self) -> dict:
    """What must be equal: the digest of the weights, all losses and errors."""
    result = json.loads((self.work_dir / "result.json").read_text())
    curve = [[r["kind"], r["step"], r["loss"], r["error"]] for r in self.records()]
    return {"weights_sha256": result["weights_sha256"], "curve": curve}


def _untouched(directory: pathlib.Path, tasks: int, arguments: list[str]) -> Run:
  run = Run(directory, arguments)
  run.launch(tasks)
  try:
    status = run.wait(3600)
  finally:
    run.kill()
  if status:
    last = run.log.read_text(errors="replace").splitlines()[-1:]
    raise UserError(f"The untouched run of {tasks} tasks ended with status {status}: {last}")
  return run


def _corrupt_newest(run: Run, chance: random.Random) -> bool:
  """Damages the newest checkpoint in one of four ways; whether there was one."""
  manifests = sorted((run.work_dir / "checkpoints").glob("step-*.json"))
  if not manifests:
    return False
  manifest, state = manifests[-1], manifests[-1].with_suffix(".npz")
  path = chance.choice([manifest, state])
  content = bytearray(path.read_bytes())
  how = chance.choice(["bit", "cut", "empty", "gone"])
  if how == "bit":
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
  elif how == "cut":
    del content[chance.randrange(1, len(content)) :]
  elif how == "empty":
    content.clear()
  if how == "gone":
    path.unlink()
  else:
    path.write_bytes(content)
  return True


def _wait_for(what, run: Run, message: str):
  """Polls until it is true.

  Raises:
    UserError: the run ended, or it took too long.
  """
  deadline = time.monotonic() + _LIMIT_SECONDS
  while not what():
    if run.ended or time.monotonic() > deadline:
      how = "the run ended" if run.ended else f"{_LIMIT_SECONDS:g} s were not enough"
      raise TimeoutError(f"{message}: {how}; see {run.log}")
    time.sleep(0.05)


def _harm(run: Run, tasks: int, kind: str, chance: random.Random, starting: bool) -> Fault | None:
  """One fault at a random moment, and the recovery from it; None where the run ended before.

  Args:
    run: launched.
    tasks: their number.
    kind: one of `_KINDS`.
    chance: of place and moment.
    starting: while the tasks start, rather than after they have made a step.
  """
  if starting:
    time.sleep(chance.uniform(0, _SPREAD_SECONDS))
  else:
    step = run.step()
    while run.step() <= step and not run.ended:
      time.sleep(0.05)
    # Also into an evaluation, or a save.
    time.sleep(chance.uniform(0, _SPREAD_SECONDS))
  found = run.tasks()
  if run.ended or not found or (run.work_dir / "result.json").exists():
    return None
  fault = Fault(tasks, kind, run.step())
  began, sitting, starts = time.monotonic(), run.sitting(), len(run.starts())
  victim = chance.choice(found)
  try:
    if kind == "kill":
      victim.kill()
    elif kind == "terminate":
      victim.terminate()
    elif kind == "corrupt":
      if not _corrupt_newest(run, chance):
        fault.kind = "kill"
      victim.kill()
    elif kind == "launcher":
      run.kill()
      run.launch(tasks, max_restarts=1000)
    else:
      victim.suspend()
      if tasks == 1:
        time.sleep(_PAUSE_SECONDS)
        victim.resume()
  except psutil.NoSuchProcess:
    return None
  if kind == "stop" and tasks == 1:
    fault.restored = fault.step
    _wait_for(lambda: run.ended or run.step() > fault.step, run, "No step after a pause")
  else:

    def goes_on() -> bool:
      # The log may lag behind the file.
      new = run.sitting() != sitting and len(run.starts()) > starts
      return run.ended or (new and run.step() > run.starts()[-1])

    _wait_for(goes_on, run, f"No step after {kind}")
    fault.restored = run.starts()[-1]
  fault.seconds = time.monotonic() - began
  return fault


def chaos(
  directory: pathlib.Path,
  arguments: list[str],
  numbers: list[int],
  count: int,
  per_run: int,
  seed: int,
) -> tuple[list[Fault], list[dict]]:
  """Harms runs until `count` faults came.

  Returns:
    The faults, and for each run {"tasks", "faults", "equal", "steps"}.
  """
  chance = random.Random(seed)
  kinds = itertools.chain.from_iterable(
    chance.sample(_KINDS, len(_KINDS)) for _ in itertools.count()
  )
  expected, faults, runs = {}, [], []
  with tqdm.tqdm(total=count, unit="fault", disable=None) as bar:
    for number, tasks in enumerate(itertools.cycle(numbers)):
      if len(faults) >= count:
        break
      if tasks not in expected:
        expected[tasks] = _untouched(directory / f"untouched_{tasks}", tasks, arguments).outcome()
      run = Run(directory / f"run_{number}", arguments)
      run.launch(tasks, max_restarts=1000)
      own = []
      try:
        for _ in range(min(per_run, count - len(faults))):
          fault = _harm(run, tasks, next(kinds), chance, chance.random() < _START_SHARE)
          if fault is None:
            break
          own.append(fault)
          bar.update()
        status = run.wait()
      finally:
        run.kill()
      faults += own
      outcome = run.outcome() if status == 0 else None
      runs.append(
        {
          "tasks": tasks,
          "faults": [fault.kind for fault in own],
          "status": status,
          "equal": outcome == expected[tasks],
          "weights_sha256": outcome and outcome["weights_sha256"],
          "expected_sha256": expected[tasks]["weights_sha256"],
        }
      )
      if not runs[-1]["equal"]:
        break  # Its directory tells why.
      shutil.rmtree(directory / f"run_{number}")
  return faults, runs


def elastic(directory: pathlib.Path, arguments: list[str], numbers: list[int]) -> dict:
  """One run moved from one number of tasks to the next, beside an untouched one of the first.

  Returns:
    {"moves": [(tasks, first step)], "weights": largest deviation of a variable, relative to its
    largest magnitude, "loss": largest relative deviation of a step's loss, "steps"}.
  """
  untouched = _untouched(directory / "untouched", numbers[0], arguments)
  steps = untouched.step()
  run = Run(directory / "moved", arguments)
  moves = []
  try:
    for place, tasks in enumerate(numbers):
      moves.append((tasks, run.step()))
      run.launch(tasks)
      if place < len(numbers) - 1:
        target = steps * (place + 1) // len(numbers)
        _wait_for(
          lambda target=target: run.step() >= target, run, f"Step {target} of {tasks} tasks"
        )
        run.send_signal(signal.SIGTERM)
        status = run.wait()
        if status != 143:
          raise TimeoutError(f"SIGTERM ended the run with status {status}; see {run.log}")
    status = run.wait()
    if status:
      raise TimeoutError(f"The last sitting ended with status {status}; see {run.log}")
  finally:
    run.kill()
  states = []
  for one in (untouched, run):
    newest = sorted((one.work_dir / "checkpoints").glob("step-*.npz"))[-1]
    with np.load(newest) as arrays:
      states.append({name: arrays[name].astype(np.float64) for name in arrays.files})
  deviations = [
    np.max(np.abs(states[0][name] - states[1][name])) / max(np.max(np.abs(states[0][name])), 1e-30)
    for name in states[0]
    if name.startswith("model/")
  ]
  losses = [
    {r["step"]: r["loss"] for r in one.records() if r["kind"] == "train"}
    for one in (untouched, run)
  ]
  if losses[0].keys() != losses[1].keys():
    raise AssertionError("The moved run did not record each step once.")
  return {
    "moves": moves,
    "steps": steps,
    "weights": float(max(deviations)),
    "loss": max(abs(losses[1][s] - losses[0][s]) / losses[0][s] for s in losses[0]),
    "first_loss": max(
      abs(losses[1][s] - losses[0][s]) / losses[0][s] for s in sorted(losses[0])[:5]
    ),
    "errors_equal": [r["error"] for r in untouched.records()]
    == [r["error"] for r in run.records()],
  }


def _table(faults: list[Fault]) -> str:
  lines = [
    "| tasks | fault | times | recovery, s: median | worst | steps done twice: median | worst |"
  ]
  lines.append("| --- " * 7 + "|")
  groups = collections.defaultdict(list)
  for fault in faults:
    groups[fault.tasks, fault.kind].append(fault)
  for (tasks, kind), group in sorted(groups.items()):
    seconds = [fault.seconds for fault in group]
    twice = [fault.steps_twice for fault in group]
    recovery = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
    steps = f"{statistics.median(twice):g} | {max(twice)}"
    lines.append(f"| {tasks} | {kind} | {len(group)} | {recovery} | {steps} |")
  return "\n".join(lines)


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  try:
    numbers = [_positive(text) for text in values.elastic or values.tasks]
    arguments = argv[1:] or list(_TINY)
    with tempfile.TemporaryDirectory(prefix="chaos") as directory:
      directory = pathlib.Path(directory)
      if values.elastic:
        figures = elastic(directory, arguments, numbers)
        print(json.dumps(figures, indent=2))
        equal = True
      else:
        faults, runs = chaos(
          directory, arguments, numbers, values.faults, values.faults_per_run, values.seed
        )
        equal = all(run["equal"] for run in runs)
        figures = {"faults": [dataclasses.asdict(fault) for fault in faults], "runs": runs}
        print(_table(faults))
        for run in runs:
          print(
            f"{run['tasks']} tasks, {', '.join(run['faults']) or 'no fault'}: "
            f"{'equal' if run['equal'] else 'DIFFERS'} {(run['weights_sha256'] or '')[:12]}"
          )
        if not equal:
          kept = pathlib.Path(tempfile.mkdtemp(prefix="chaos_kept"))
          shutil.copytree(directory, kept, dirs_exist_ok=True)
          print(f"What was left is in {kept}.", file=sys.stderr)
    if values.json:
      pathlib.Path(values.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if equal else 1
  except (UserError, TimeoutError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
  if not text.strip().isdecimal() or not int(text):
    raise UserError(f"{text!r} is no number of tasks; 1 or more would do.")
  return int(text)


if __name__ == "__main__":
  define_flags()
  app.run(main)
