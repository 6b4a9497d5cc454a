"""A campaign of runs with faults, kept in a directory so that later sessions can resume it."""

import contextlib
import dataclasses
import json
import pathlib
import random
import shutil

import tqdm

from tf_largebatch import locks
from tf_largebatch.errors import UserError
from tools.resilience import harness, namespaces
from tools.resilience.faults import MAX_RESTARTS, Fault, harm, kinds_for
from tools.resilience.harness import LaunchedRun
from tools.resilience.namespaces import SmallDisk
from tools.studies.output import write_all

_LOCK = ".lock"
_SPARE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides which faults each run gets.

  Attributes:
    arguments: the trainer's flags.
    tasks: numbers of tasks, used in rotation.
    kinds: out of `faults.KINDS`.
    faults_per_run: most faults that one run gets.
    seed: of all draws.
  """

  arguments: list[str]
  tasks: list[int]
  kinds: list[str]
  faults_per_run: int
  seed: int

  def draw_kinds(self, number: int) -> list[str]:
    """Returns the kinds of run `number`'s faults.

    The first faults of runs of equally many tasks go through all kinds before one comes again.
    """
    place, index = divmod(number, len(self.tasks))
    tasks = self.tasks[index]
    kinds = kinds_for(tasks, self.kinds)
    block, first = divmod(place, len(kinds))
    order = random.Random(f"{self.seed}/{index}/{block}").sample(kinds, len(kinds))
    others = self.rng(number, "kinds").choices(kinds, k=self.faults_per_run - 1)
    return [order[first], *others]

  def rng(self, number: int, purpose: object) -> random.Random:
    """Returns a generator for one purpose in run `number`, whatever was drawn before."""
    return random.Random(f"{self.seed}/{number}/{purpose}")


@contextlib.contextmanager
def locked(directory: pathlib.Path):
  """Keeps other campaigns out of the directory.

  Raises:
    UserError: another one uses it.
  """
  try:
    with locks.exclusive(str(directory / _LOCK)):
      yield
  except locks.HeldError as error:
    raise UserError(f"--directory={directory} is in use by another process ({error})") from error


class Campaign:
  """Runs with faults, one after another.

  The directory holds the runs in progress, and state.json: {"settings", "undisturbed": {tasks:
  {"outcome", "bytes"}}, "runs"}. A run is added to the file when it has ended.

  Attributes:
    runs: those that ended, in order: {"tasks", "faults", "status", "equal", "weights_sha256",
      "expected_sha256"}.
  """

  def __init__(self, directory: pathlib.Path, settings: Settings):
    """Resumes the campaign that the directory holds, or starts one.

    Raises:
      UserError: the directory holds something else.
    """
    self._directory, self._settings = directory, settings
    self._path = directory / "state.json"
    stored = {"settings": dataclasses.asdict(settings), "undisturbed": {}, "runs": []}
    if self._path.exists():
      stored = self._read(stored["settings"])
    elif {path.name for path in directory.iterdir()} - {_LOCK}:
      raise UserError(f"--directory={directory} holds other files; name a new directory")
    self._stored = stored
    self.runs: list[dict] = stored["runs"]
    self._save()

  @property
  def num_faults(self) -> int:
    return sum(len(run["faults"]) for run in self.runs)

  @property
  def differs(self) -> bool:
    """Whether a run, then the last, did not end as the undisturbed run did."""
    return not all(run["equal"] for run in self.runs)

  def inject(self, count: int):
    """Injects faults until there are `count`; stops at a run that differs."""
    with tqdm.tqdm(
      total=count, initial=min(count, self.num_faults), unit="fault", disable=None
    ) as bar:
      while self.num_faults < count and not self.differs:
        number = len(self.runs)
        tasks = self._settings.tasks[number % len(self._settings.tasks)]
        undisturbed = self._undisturbed(tasks)
        directory = self._directory / f"run_{number}"
        shutil.rmtree(directory, ignore_errors=True)  # From an interrupted session.
        run = LaunchedRun(directory, self._settings.arguments)
        kinds = self._settings.draw_kinds(number)[: count - self.num_faults]
        # Twice the size, because files that are being replaced need space too.
        capacity = 2 * undisturbed["bytes"] + _SPARE_BYTES
        with _disk_of(run, self._settings.kinds, capacity) as disk:
          faults, status = self._train(run, number, tasks, kinds, disk, bar)
        self._add(tasks, faults, status, run.outcome() if status == 0 else None)
        if not self.differs:
          shutil.rmtree(directory)

  def _train(
    self,
    run: LaunchedRun,
    number: int,
    tasks: int,
    kinds: list[str],
    disk: SmallDisk | None,
    bar: tqdm.tqdm,
  ) -> tuple[list[Fault], int]:
    """Trains to the end with these faults; returns those that came in time, and the status."""
    run.launch(tasks, MAX_RESTARTS)
    faults = []
    try:
      for place, kind in enumerate(kinds):
        fault = harm(run, tasks, kind, self._settings.rng(number, place), disk)
        if fault is None:
          break
        faults.append(fault)
        bar.update()
      return faults, run.wait()
    finally:
      run.kill()

  def _undisturbed(self, tasks: int) -> dict:
    """Returns the outcome of a run without faults, and the size of its files."""
    known = self._stored["undisturbed"]
    if str(tasks) not in known:
      directory = self._directory / f"undisturbed_{tasks}"
      shutil.rmtree(directory, ignore_errors=True)
      run = harness.train_undisturbed(directory, tasks, self._settings.arguments)
      files = (path for path in run.work_dir.rglob("*") if path.is_file())
      size = sum(path.stat().st_size for path in files)
      known[str(tasks)] = {"outcome": run.outcome(), "bytes": size}
      self._save()
    return known[str(tasks)]

  def _add(self, tasks: int, faults: list[Fault], status: int, outcome: dict | None):
    expected = self._undisturbed(tasks)["outcome"]
    self.runs.append(
      {
        "tasks": tasks,
        "faults": [dataclasses.asdict(fault) for fault in faults],
        "status": status,
        "equal": outcome == expected,
        "weights_sha256": outcome and outcome["weights_sha256"],
        "expected_sha256": expected["weights_sha256"],
      }
    )
    self._save()

  def _read(self, settings: dict) -> dict:
    try:
      stored = json.loads(self._path.read_text())
      differences = [
        f"{name} was {stored['settings'][name]} there and is {value} now"
        for name, value in settings.items()
        if stored["settings"][name] != value
      ]
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{self._path} does not hold a campaign; name a new --directory") from error
    if differences:
      raise UserError(
        f"--directory={self._directory} holds runs with other settings ({'; '.join(differences)}); "
        "use the same flags or a new directory"
      )
    return stored

  def _save(self):
    content = json.dumps(self._stored, indent=1).encode()
    write_all(f"--directory={self._directory}", {str(self._path): content})


def _disk_of(run: LaunchedRun, kinds: list[str], capacity: int):
  """Returns a context manager that puts the work directory on a `SmallDisk` if a kind needs it."""
  if "disk" not in kinds:
    return contextlib.nullcontext()
  return namespaces.small_disk(run.work_dir, capacity)
