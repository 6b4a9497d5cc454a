"""The faults that `chaos` injects into a run, and the recovery from each."""

import dataclasses
import math
import random
import time

import psutil

from tools.resilience import harness, namespaces
from tools.resilience.harness import LaunchedRun
from tools.resilience.namespaces import SmallDisk

ISOLATED_KINDS = ("cut", "disk")  # These need `namespaces.isolate`.
KINDS = ("kill", "stop", "terminate", "corrupt", "launcher", *ISOLATED_KINDS)
MAX_RESTARTS = 1000

_PAUSE_SECONDS = 5.0  # How long a single task is stopped.
_START_SHARE = 0.3  # Share of the faults that come before training starts.
_SPREAD_SECONDS = 5.0  # A fault comes within this time after a step; steps take far less.
# Half of the cuts are shorter than the 10 s after which the tasks notice that one is lost.
_SHORT_CUT_SECONDS, _LONG_CUT_SECONDS = (0.2, 6.0), (8.0, 40.0)
_UNNOTICED_SECONDS = 15.0  # How long the disk stays full if the trainer does not log it.
_NOTICED_SECONDS = (0.0, 4.0)  # How long it stays full after that.
_CANNOT_WRITE = "cannot be written ("  # In the errors that end a run that starts or finishes.
_DISK_IS_FULL = ("Cannot write the metrics", "Cannot save the checkpoint", _CANNOT_WRITE)


@dataclasses.dataclass
class Fault:
  """One fault and the recovery from it.

  Attributes:
    tasks: of the run.
    kind: one of `KINDS`.
    step: last step recorded when the fault was over.
    lasted: seconds until the link was mended, the disk had space or a single task was continued;
      0 for the kinds that end a task.
    launches: how often all tasks were started again because of it.
    restored: step that the run resumed from; `step` if it did not have to restart.
    seconds: from the end of the fault to the next new step.
  """

  tasks: int
  kind: str
  step: int
  lasted: float = 0.0
  launches: int = 0
  restored: int = 0
  seconds: float = 0.0

  @property
  def steps_repeated(self) -> int:
    return max(0, self.step - self.restored)


def kinds_for(tasks: int, kinds: list[str]) -> list[str]:
  """Returns those of the kinds that can happen to a run of so many tasks."""
  return [kind for kind in kinds if tasks > 1 or kind != "cut"]


def harm(
  run: LaunchedRun, tasks: int, kind: str, rng: random.Random, disk: SmallDisk | None
) -> Fault | None:
  """Injects one fault at a random moment and waits for the recovery.

  Args:
    run: launched.
    tasks: their number.
    kind: one of `kinds_for(tasks, …)`.
    rng: draws the moment, the victim and how long the fault lasts.
    disk: holds the run's work directory; only "disk" needs it.

  Returns:
    The fault, or None if the run ended before it.
  """
  _wait_for_moment(run, rng)
  processes = run.tasks()
  if run.ended or not processes or (run.work_dir / "result.json").exists():
    return None
  inode, starts = run.metrics_inode(), len(run.starts())
  launches, log_size = run.launches, len(run.log_text())
  began = time.monotonic()
  try:
    kind = _inject(kind, run, tasks, rng.choice(processes), rng, disk)
  except psutil.NoSuchProcess:
    return None
  ended = time.monotonic()
  survivable = kind in ISOLATED_KINDS or (kind == "stop" and tasks == 1)
  # Read only now: a step may have ended since the moment was chosen.
  fault = Fault(tasks, kind, run.step(), lasted=ended - began if survivable else 0.0)

  def recovered() -> bool:
    if len(run.starts()) > starts:
      # The log may be written later than the file.
      return run.metrics_inode() != inode and run.step() > run.starts()[-1]
    return survivable and run.step() > fault.step

  run.wait_for(lambda: run.ended or recovered(), f"No step after {kind}")
  if kind == "disk" and run.ended and _CANNOT_WRITE in run.log_text()[log_size:]:
    # A run that starts or finishes needs the space. It ended with status 1, as documented.
    run.launch(tasks, MAX_RESTARTS)
    run.wait_for(lambda: run.ended or recovered(), "No step after the disk had space")
  fault.seconds = time.monotonic() - ended
  fault.launches = run.launches - launches
  fault.restored = run.starts()[-1] if len(run.starts()) > starts else fault.step
  return fault


def _wait_for_moment(run: LaunchedRun, rng: random.Random):
  """Waits for a random moment, either of start-up or after a new step."""
  starting, seconds = rng.random() < _START_SHARE, rng.uniform(0, _SPREAD_SECONDS)
  if not starting:
    step = run.step()
    harness.wait_until(lambda: run.step() > step or run.ended, math.inf)
  harness.pause(seconds)  # May end in an evaluation or a save.


def _inject(
  kind: str,
  run: LaunchedRun,
  tasks: int,
  victim: psutil.Process,
  rng: random.Random,
  disk: SmallDisk | None,
) -> str:
  """Injects the fault; returns its kind, which is "kill" if no checkpoint exists to corrupt."""
  if kind == "cut":
    _cut_link(run, rng)
  elif kind == "disk":
    _fill_disk(run, disk, rng)
  elif kind == "terminate":
    victim.terminate()
  elif kind == "stop":
    victim.suspend()
    if tasks == 1:  # No other task can notice it and end.
      harness.pause(_PAUSE_SECONDS)
      victim.resume()
  elif kind == "launcher":
    run.kill()
    run.launch(tasks, MAX_RESTARTS)
  else:
    if kind == "corrupt" and not _corrupt_newest(run, rng):
      kind = "kill"
    victim.kill()
  return kind


def _cut_link(run: LaunchedRun, rng: random.Random):
  """Cuts the link between the tasks for a time that they may or may not notice."""
  seconds = rng.uniform(*rng.choice((_SHORT_CUT_SECONDS, _LONG_CUT_SECONDS)))
  namespaces.set_link(up=False)
  try:
    harness.wait_until(lambda: run.ended, seconds)
  finally:
    namespaces.set_link(up=True)


def _fill_disk(run: LaunchedRun, disk: SmallDisk, rng: random.Random):
  """Leaves no space in the work directory until the trainer has logged it, and a little longer."""
  log_size, seconds = len(run.log_text()), rng.uniform(*_NOTICED_SECONDS)

  def noticed() -> bool:
    disk.fill()  # Again, because the trainer removes what it could not complete.
    return run.ended or any(text in run.log_text()[log_size:] for text in _DISK_IS_FULL)

  try:
    harness.wait_until(noticed, _UNNOTICED_SECONDS)
    harness.wait_until(lambda: disk.fill() or run.ended, seconds)
  finally:
    disk.clear()


def _corrupt_newest(run: LaunchedRun, rng: random.Random) -> bool:
  """Damages the newest checkpoint in one of four ways; returns False if there is none."""
  pairs = [
    (manifest, manifest.with_suffix(".npz"))
    for manifest in sorted((run.work_dir / "checkpoints").glob("step-*.json"))
  ]
  # Without those that an earlier fault emptied or removed.
  pairs = [pair for pair in pairs if all(path.exists() and path.stat().st_size for path in pair)]
  if not pairs:
    return False
  path = rng.choice(pairs[-1])
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
