r"""Injects faults into training runs at random moments and checks that the results do not change.

  python -m tools.resilience.chaos --faults=30 --tasks=1,2
  python -m tools.resilience.chaos --elastic=2,1,4
  python -m tools.resilience.chaos --faults=8 --tasks=2 -- --flagfile=flags/… --data_dir=…

The first command trains once without faults for each number of tasks, then under
`tools.launch_local --max_restarts` with random faults during start-up, training and evaluation:

  kill       SIGKILL to a task.
  stop       SIGSTOP to a task; a single task gets SIGCONT later.
  terminate  SIGTERM to a task.
  corrupt    The newest checkpoint is damaged and a task killed.
  launcher   The launcher is killed, and the tasks with it, and started again.

Every run must end with the `weights_sha256`, losses and errors of the run without faults. The
second command stops one run with SIGTERM and resumes it on other numbers of tasks, and compares it
with an undisturbed run. Arguments after `--` replace the flags of the small synthetic recipe. The
exit status is 1 if a run differs or does not recover; the files of all runs are then kept.
"""

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil
import tqdm
from absl import flags

from tf_largebatch.errors import UserError
from tools import program
from tools.output import output_path, write_json
from tools.resilience import harness
from tools.resilience.elastic import elastic
from tools.resilience.harness import LaunchedRun

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
  "--cluster_timeout_minutes=0.5",  # Ends the wait for a task that was stopped during start-up.
)
_KINDS = ("kill", "stop", "terminate", "corrupt", "launcher")
_MAX_RESTARTS = 1000
_PAUSE_SECONDS = 5.0  # How long a single task is stopped.
_START_SHARE = 0.3  # Share of the faults that come before training starts.
_SPREAD_SECONDS = 8.0  # A fault comes within this time after a step; steps take far less.


def define_flags():
  flags.DEFINE_integer("faults", 30, "Total number of faults.", lower_bound=0)
  flags.DEFINE_list("tasks", ["1", "2"], "Numbers of tasks, used in rotation.")
  flags.DEFINE_integer("faults_per_run", 4, "Most faults that one run gets.", lower_bound=1)
  flags.DEFINE_list("elastic", [], "Numbers of tasks to move one run through, instead of faults.")
  flags.DEFINE_integer("seed", 0, "Seed of the kinds, victims and moments of the faults.")
  flags.DEFINE_string("json", None, "File to write the measurements to, as JSON.")


@dataclasses.dataclass
class Fault:
  """One fault and the recovery from it.

  Attributes:
    tasks: of the run.
    kind: one of `_KINDS`.
    step: last step recorded when the fault had been injected.
    restored: step that the run resumed from; `step` if it did not have to restart.
    seconds: from the fault to the next new step.
  """

  tasks: int
  kind: str
  step: int
  restored: int = 0
  seconds: float = 0.0

  @property
  def steps_repeated(self) -> int:
    return max(0, self.step - self.restored)


def _corrupt_newest(run: LaunchedRun, rng: random.Random) -> bool:
  """Damages the newest checkpoint in one of four ways; returns False if there is none."""
  manifests = sorted((run.work_dir / "checkpoints").glob("step-*.json"))
  if not manifests:
    return False
  manifest, state = manifests[-1], manifests[-1].with_suffix(".npz")
  path = rng.choice([manifest, state])
  content = bytearray(path.read_bytes())
  how = rng.choice(["bit", "cut", "empty", "gone"])
  if how == "bit":
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  elif how == "cut":
    del content[rng.randrange(1, len(content)) :]
  elif how == "empty":
    content.clear()
  if how == "gone":
    path.unlink()
  else:
    path.write_bytes(content)
  return True


def _wait_for_moment(run: LaunchedRun, rng: random.Random, starting: bool):
  """Waits for a random moment: of start-up if `starting`, else after a new step."""
  if not starting:
    step = run.step()
    harness.wait_until(lambda: run.step() > step or run.ended, math.inf)
  harness.pause(rng.uniform(0, _SPREAD_SECONDS))  # May end in an evaluation or a save.


def _inject(
  kind: str, run: LaunchedRun, tasks: int, victim: psutil.Process, rng: random.Random
) -> str:
  """Injects the fault; returns its kind, which is "kill" if no checkpoint exists to corrupt."""
  if kind == "terminate":
    victim.terminate()
  elif kind == "stop":
    victim.suspend()
    if tasks == 1:  # No other task can notice it and end.
      harness.pause(_PAUSE_SECONDS)
      victim.resume()
  elif kind == "launcher":
    run.kill()
    run.launch(tasks, _MAX_RESTARTS)
  else:
    if kind == "corrupt" and not _corrupt_newest(run, rng):
      kind = "kill"
    victim.kill()
  return kind


def _harm(
  run: LaunchedRun, tasks: int, kind: str, rng: random.Random, starting: bool
) -> Fault | None:
  """Injects one fault at a random moment and waits for the recovery.

  Args:
    run: launched.
    tasks: their number.
    kind: one of `_KINDS`.
    rng: draws the victim and the moment.
    starting: whether the fault comes while the tasks start, not after a new step.

  Returns:
    The fault, or None if the run ended before it.
  """
  _wait_for_moment(run, rng, starting)
  processes = run.tasks()
  if run.ended or not processes or (run.work_dir / "result.json").exists():
    return None
  began, inode, starts = time.monotonic(), run.metrics_inode(), len(run.starts())
  try:
    kind = _inject(kind, run, tasks, rng.choice(processes), rng)
  except psutil.NoSuchProcess:
    return None
  # Read only now: a step may have ended since the moment was chosen.
  fault = Fault(tasks, kind, run.step())

  def resumed() -> bool:
    # The log may be written later than the file.
    restarted = run.metrics_inode() != inode and len(run.starts()) > starts
    return run.ended or (restarted and run.step() > run.starts()[-1])

  if kind == "stop" and tasks == 1:
    fault.restored = fault.step
    run.wait_for(lambda: run.ended or run.step() > fault.step, "No step after a pause")
  else:
    run.wait_for(resumed, f"No step after {kind}")
    fault.restored = run.starts()[-1]
  fault.seconds = time.monotonic() - began
  return fault


def chaos(
  directory: pathlib.Path,
  arguments: list[str],
  task_counts: list[int],
  count: int,
  per_run: int,
  seed: int,
) -> tuple[list[Fault], list[dict]]:
  """Injects `count` faults into as many runs as that takes; stops at a run that differs.

  Returns:
    The faults, and for each run {"tasks", "faults", "status", "equal", "weights_sha256",
    "expected_sha256"}.
  """
  rng = random.Random(seed)
  kinds = itertools.chain.from_iterable(rng.sample(_KINDS, len(_KINDS)) for _ in itertools.count())
  expected, faults, runs = {}, [], []
  with tqdm.tqdm(total=count, unit="fault", disable=None) as bar:
    for number, tasks in enumerate(itertools.cycle(task_counts)):
      if len(faults) >= count:
        break
      if tasks not in expected:
        undisturbed = harness.train_undisturbed(
          directory / f"undisturbed_{tasks}", tasks, arguments
        )
        expected[tasks] = undisturbed.outcome()
      run = LaunchedRun(directory / f"run_{number}", arguments)
      most = min(per_run, count - len(faults))
      own, status = _train_with_faults(run, tasks, itertools.islice(kinds, most), rng, bar)
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
        break
      shutil.rmtree(directory / f"run_{number}")
  return faults, runs


def _train_with_faults(
  run: LaunchedRun, tasks: int, kinds: Iterator[str], rng: random.Random, bar: tqdm.tqdm
) -> tuple[list[Fault], int]:
  """Trains to the end with faults of these kinds; returns the faults and the exit status."""
  run.launch(tasks, _MAX_RESTARTS)
  faults = []
  try:
    for kind in kinds:
      fault = _harm(run, tasks, kind, rng, rng.random() < _START_SHARE)
      if fault is None:
        break
      faults.append(fault)
      bar.update()
    return faults, run.wait()
  finally:
    run.kill()


def _table(faults: list[Fault]) -> str:
  columns = ("tasks", "fault", "times", "recovery, s: median", "worst")
  columns += ("steps repeated: median", "worst")
  lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
  groups = collections.defaultdict(list)
  for fault in faults:
    groups[fault.tasks, fault.kind].append(fault)
  for (tasks, kind), group in sorted(groups.items()):
    seconds = [fault.seconds for fault in group]
    repeated = [fault.steps_repeated for fault in group]
    recovery = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
    steps = f"{statistics.median(repeated):g} | {max(repeated)}"
    lines.append(f"| {tasks} | {kind} | {len(group)} | {recovery} | {steps} |")
  return "\n".join(lines)


def _run(directory: pathlib.Path, arguments: list[str], task_counts: list[int]) -> dict:
  """Does what the flags request; prints the measurements and returns them."""
  values = flags.FLAGS
  if values.elastic:
    measured = elastic(directory, arguments, task_counts)
    print(json.dumps(measured, indent=2))
    return measured
  faults, runs = chaos(
    directory, arguments, task_counts, values.faults, values.faults_per_run, values.seed
  )
  print(_table(faults))
  for run in runs:
    print(
      f"{run['tasks']} tasks, {', '.join(run['faults']) or 'no fault'}: "
      f"{'equal' if run['equal'] else 'DIFFERS'} {(run['weights_sha256'] or '')[:12]}"
    )
  return {"faults": [dataclasses.asdict(fault) for fault in faults], "runs": runs}


def main(arguments: list[str]) -> int:
  values = flags.FLAGS
  task_counts = [_positive(text) for text in values.elastic or values.tasks]
  harness.prepare()
  json_path = output_path("--json", values.json)
  directory, equal = pathlib.Path(tempfile.mkdtemp(prefix="chaos")), False
  try:
    measured = _run(directory, arguments or list(_TINY), task_counts)
    if json_path:
      write_json("--json", json_path, measured)
    equal = all(run["equal"] for run in measured.get("runs", []))
  finally:
    if equal:
      shutil.rmtree(directory)
    else:
      print(f"The files of the runs are in {directory}.", file=sys.stderr)
  return int(not equal)


def _positive(text: str) -> int:
  if not text.strip().isdecimal() or not int(text):
    raise UserError(f"{text!r} is not a number of tasks; use 1 or more.")
  return int(text)


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
