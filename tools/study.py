r"""Runs studies: flagfiles × seeds, in as many sittings and on as many machines as it takes.

  python -m tools.study table1 figure1 correction --jobs=2

A STUDY is a TOML file, by its path or by its name in `tools/studies/`:

  title = "What it asks"
  flags = ["--log_every_steps=50"]       # For every run.
  [[runs]]
  flagfile = "flags/fashion_mnist_kn512.flags"
  seeds = 5                              # 0 to 4.
  flags = ["--workers_per_pass=8"]       # For these; flags of the recipe belong in the flagfile.

Each run is `tf_largebatch.train` in a process of its own, in RUNS_DIR/FLAGFILE_seedN; all seed 0
first, then all seed 1. A complete run leaves RESULTS_DIR/STUDY/FLAGFILE_seedN.json: its recipe,
curves by epoch, result, versions and hardware. A run that has one, in any study's folder, is not
run again: it is a function of its recipe. SIGINT or SIGTERM, or the end of this program by
whatever, has the runs save; the same command goes on from there. A run that diverges is a result,
too. One that ends for reasons of the machine's is begun again from its checkpoint, three times.

With --jobs=J so many runs work at once, each on its own share of this process' cores: J networks
that are small keep a CPU busier than one does. The trainer's flags that are not of the recipe, such
as --data_dir, are handed on to the runs.
"""

import collections
import contextlib
import copy
import ctypes
import dataclasses
import glob
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
import tomllib

import tqdm
from absl import app, flags

from tf_largebatch import train
from tf_largebatch.errors import UserError, first_line
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import next_signal

_STUDIES = pathlib.Path(__file__).parent / "studies"
_RECIPE_FLAGS = {field.name for field in dataclasses.fields(Recipe)}
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 1.0
_TELL_SECONDS = 600.0  # Between two lines of progress, where no bar can be shown.
_GRACE_SECONDS = 120.0  # For a run to end its step and to save.
_STARTS = 4  # Of a run that ends for no mistake of the user's.
_DIVERGED = "error: Training diverged"  # How the trainer's line begins.
_IN_USE = "is in use by a run"  # In the trainer's line.
_DIGITS = 6  # Of an error in a curve: finer than one of a million images.
_PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>.


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_string("runs_dir", "runs/studies", "Directory of the runs' work directories.")
  flags.DEFINE_string("results_dir", "docs/results", "Directory of the studies' results.")
  flags.DEFINE_integer("jobs", 1, "Runs at work at once, each on its share of the cores.", 1)


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run of a study: its flagfile, the recipe of that (with the seed), and its other flags."""

  study: str
  flagfile: str
  recipe: Recipe
  flags: tuple[str, ...]

  @property
  def name(self) -> str:
    """What its work directory and its result are called."""
    return f"{pathlib.Path(self.flagfile).stem}_seed{self.recipe.seed}"


@dataclasses.dataclass
class Working:
  """A run at work: its process, the share of the cores it has, and how far it has come.

  Attributes:
    log_size: bytes of its log that are of earlier sittings.
  """

  run: Planned
  process: subprocess.Popen
  share: int
  log_size: int
  epochs: float


def read_study(name: str) -> list[Planned]:
  """The runs that a study plans.

  Args:
    name: of a file in `tools/studies/`, or a path that ends in .toml.

  Raises:
    UserError: the file, or a flagfile that it names, is missing or will not do.
  """
  path = pathlib.Path(name if name.endswith(".toml") else _STUDIES / f"{name}.toml")
  try:
    study = tomllib.loads(path.read_text())
  except FileNotFoundError as error:
    known = ", ".join(sorted(each.stem for each in _STUDIES.glob("*.toml")))
    raise UserError(
      f"There is no study {name}; {known}, or the path of a .toml, would do."
    ) from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is no study ({first_line(error)}).") from error
  table = {"title": "", "flags": [], **study}
  _check_table(path, table, {"title": str, "flags": list, "runs": list})
  planned = []
  for runs in table["runs"]:
    runs = {"flags": [], **runs} if isinstance(runs, dict) else {}
    _check_table(path, runs, {"flagfile": str, "seeds": int, "flags": list})
    extra = (*table["flags"], *runs["flags"])
    planned += [
      Planned(path.stem, runs["flagfile"], _recipe(path, runs["flagfile"], extra, seed), extra)
      for seed in range(runs["seeds"])
    ]
  if not planned:
    raise UserError(f"{path} plans no run; give [[runs]] with a flagfile and seeds = 1 or more.")
  return planned


def _check_table(path: pathlib.Path, table: dict, kinds: dict[str, type]):
  """Raises UserError where a field of the TOML is unknown, missing or of another kind."""
  unknown = ", ".join(sorted(table.keys() - kinds.keys()))
  if unknown:
    raise UserError(f"{path}: {unknown} is none of {', '.join(kinds)}.")
  for name, kind in kinds.items():
    if type(table.get(name)) is not kind:
      raise UserError(f"{path}: {name} = {table.get(name)!r} is no {kind.__name__}.")
  if not all(isinstance(item, str) for item in table["flags"]):
    raise UserError(f"{path}: flags = {table['flags']!r}; each must be a string.")


def _recipe(path: pathlib.Path, flagfile: str, extra: tuple[str, ...], seed: int) -> Recipe:
  """The recipe of a flagfile, with a seed; the flags beside it must not be the recipe's."""
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  left = train.parse_flags(["train", *extra], values)
  ours = sorted(name for name in _RECIPE_FLAGS if values[name].present)
  if ours or left[1:]:
    raise UserError(f"{path}: {', '.join([*ours, *left[1:]])} must stand in a flagfile.")
  train.parse_flags(["train", *extra, f"--flagfile={flagfile}", f"--seed={seed}"], values)
  return train.recipe_from_flags(values)


def find_result(run: Planned, results_dir: pathlib.Path) -> dict | None:
  """What was kept of a run (see `make_result`), in whatever study's folder.

  Raises:
    UserError: it cannot be read, or is of another recipe than the flagfile has now.
  """
  for path in sorted(results_dir.glob(f"*/{glob.escape(run.name)}.json")):
    try:
      result = json.loads(path.read_text())
      recipe = Recipe(**result["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError(f"{path} is no result of a run ({first_line(error)}); remove it.") from error
    if any(
      value is not None and value != getattr(recipe, name)
      for name, value in vars(run.recipe).items()
    ):
      raise UserError(f"{path} is of another recipe than {run.flagfile}; remove it, or rename one.")
    return result
  return None


def _log(work_dir: pathlib.Path) -> pathlib.Path:
  return work_dir.with_name(f"{work_dir.name}.log")


def _start(run: Planned, work_dir: pathlib.Path, handed_on: list[str], cores: list[int]):
  """Starts, or continues, the trainer on some cores; it is asked to stop when this program ends."""
  libc, parent = ctypes.CDLL(None), os.getpid()

  def prepare():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    os.sched_setaffinity(0, cores)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
      os._exit(1)

  with open(_log(work_dir), "ab") as log:
    return subprocess.Popen(
      [
        *(sys.executable, "-m", train.__name__, f"--flagfile={run.flagfile}"),
        *(f"--seed={run.recipe.seed}", *run.flags, *handed_on, f"--work_dir={work_dir}"),
      ],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # A terminal's Ctrl-C reaches this program alone, which asks once.
      preexec_fn=prepare,
    )


def _records(work_dir: pathlib.Path) -> list[dict]:
  """The metrics as far as they go.

  As `metrics.read_metrics`, but without TensorFlow: a process with its threads must not fork.
  """
  records = []
  with contextlib.suppress(FileNotFoundError), open(work_dir / "metrics.jsonl") as lines:
    for line in lines:
      if not line.endswith("\n"):
        break  # It is being written.
      records.append(json.loads(line))
  return records


def _epochs(work_dir: pathlib.Path) -> float:
  """How many epochs a run has done, by the last whole line of its metrics."""
  with contextlib.suppress(FileNotFoundError), open(work_dir / "metrics.jsonl", "rb") as file:
    file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
    *lines, _ = file.read().split(b"\n")
    if lines:
      return json.loads(lines[-1])["epoch"]
  return 0.0


def _last_line(log: pathlib.Path, log_size: int) -> str:
  """The trainer's last error, or, where it told none, its last line."""
  lines = log.read_bytes()[log_size:].decode(errors="replace").splitlines()
  errors = [line for line in lines if line.startswith("error: ")]
  return (errors or lines or [""])[-1]


def make_result(run: Planned, work_dir: pathlib.Path, cores: int, diverged: str | None) -> dict:
  """What is kept of a run that has ended; `diverged`: the trainer's line, of one that did."""
  # Only now: it defines flags, which are not this program's.
  from tools.compare_runs import training_curve

  records = _records(work_dir)
  result = {"val_error": None, "val_error_median_last_5": None, "weights_sha256": None}
  result |= {"seconds": None, "reason": diverged}
  if diverged is None:
    result |= json.loads((work_dir / "result.json").read_text())
    del result["reason"]
  result["status"] = "complete" if diverged is None else "diverged"
  validation = {each["epoch"]: each["error"] for each in records if each["kind"] == "eval"}
  curves = {"training_error": training_curve(records), "validation_error": validation}
  facts = json.loads((work_dir / "recipe.json").read_text())
  return {
    "study": run.study,
    "flagfile": run.flagfile,
    "seed": run.recipe.seed,
    **result,
    **{
      name: {f"{epoch:g}": round(error, _DIGITS) for epoch, error in curve.items()}
      for name, curve in curves.items()
    },
    **facts,
    "flags": list(run.flags),
    "hardware": {"cpu": _processor(), "cores": cores},
  }


def _processor() -> str:
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
    for line in lines:
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.machine()


class _Studies:
  """Runs that wait, those at work, and what is shown of them."""

  def __init__(self, runs: list[Planned], runs_dir: str, results_dir: str, handed_on: list[str]):
    self._runs_dir, self._results_dir = pathlib.Path(runs_dir), pathlib.Path(results_dir)
    self._handed_on = handed_on
    planned = {}
    # One seed after the other, so that there is something of everything early. A run that several
    # studies plan is the first one's.
    for run in sorted(runs, key=lambda run: run.recipe.seed):
      first = planned.setdefault(run.name, run)
      if first.recipe != run.recipe:
        raise UserError(
          f"{first.flagfile} and {run.flagfile} are not the same recipe, but their results would "
          "have the same name; rename one."
        )
    results = {name: find_result(run, self._results_dir) for name, run in planned.items()}
    self._waiting = [run for name, run in planned.items() if results[name] is None]
    self._working: list[Working] = []
    self._starts = dict.fromkeys(planned, 0)
    self._planned, self._ended = len(planned), len(planned) - len(self._waiting)
    self._seconds = collections.defaultdict(list)  # Of an epoch, by flagfile.
    for result in filter(None, results.values()):
      self._learn(result)
    # Its thread would take a signal that this one blocks, and does not go together with preexec_fn.
    tqdm.tqdm.monitor_interval = 0
    self._bar = tqdm.tqdm(
      total=sum(run.recipe.epochs for run in self._waiting),
      initial=sum(_epochs(self._runs_dir / run.name) for run in self._waiting),
      unit="epoch",
      smoothing=0,  # Epochs of small minibatches take longer: all that was done tells more.
      bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs [{elapsed}, left {remaining}]",
      dynamic_ncols=True,
      file=None if sys.stderr.isatty() else open(os.devnull, "w"),  # noqa: SIM115
    )
    self._told = time.monotonic()

  def work(self, jobs: int) -> int | None:
    """Works until all runs have ended, or until a signal, which it returns."""
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
      raise UserError(f"--jobs={jobs} is more than the {len(cores)} cores here.")
    self._say(f"{self._ended} of {self._planned} runs are complete.")
    # Fetched below, so that none breaks into `_end` or `_stop`.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
      while self._waiting or self._working:
        free = sorted(set(range(jobs)) - {each.share for each in self._working})
        for share in free[: len(self._waiting)]:
          self._begin(self._waiting.pop(0), share, cores[share::jobs])
        stop = next_signal(_STOP_SIGNALS, _POLL_SECONDS)
        if stop:
          return stop
        self._show()
        for each in list(self._working):
          if each.process.poll() is not None:
            self._working.remove(each)
            self._end(each, len(cores[each.share :: jobs]), jobs)
      return None
    finally:
      self._stop()
      self._bar.close()

  def _begin(self, run: Planned, share: int, cores: list[int]):
    self._runs_dir.mkdir(parents=True, exist_ok=True)
    self._starts[run.name] += 1
    work_dir = self._runs_dir / run.name
    log_size = _log(work_dir).stat().st_size if _log(work_dir).exists() else 0
    process = _start(run, work_dir, self._handed_on, cores)
    epochs = _epochs(work_dir)
    self._working.append(Working(run, process, share, log_size, epochs))
    self._say(f"{run.name} {f'goes on from epoch {epochs:.1f}' if epochs else 'begins'}.")

  def _end(self, ended: Working, cores: int, jobs: int):
    """Keeps a run's result, or has it go on, or raises UserError where that would not help."""
    run, status = ended.run, ended.process.returncode
    work_dir = self._runs_dir / run.name
    line = "" if status == 0 else _last_line(_log(work_dir), ended.log_size)
    diverged = line if status == 1 and line.startswith(_DIVERGED) else None
    if status and not diverged:
      held = _IN_USE in line  # By a run of a study that was killed, until it has saved.
      if (status in (1, 2) and not held) or self._starts[run.name] == _STARTS:
        raise UserError(f"{run.name} ended with status {status}: {line} (see {_log(work_dir)})")
      self._say(f"{run.name} ended with status {status} ({line}); it is begun again.")
      self._waiting.insert(0, run)
      return
    result = make_result(run, work_dir, cores, diverged)
    path = self._results_dir / run.study / f"{run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)
    self._ended += 1
    self._learn(result)
    told = diverged or f"error {result['val_error_median_last_5']:.2%}, {result['seconds']:.0f} s"
    self._say(f"{self._ended} of {self._planned}: {run.name}: {told}; {self._estimate(jobs)}")

  def _show(self):
    for each in self._working:
      epochs = _epochs(self._runs_dir / each.run.name)
      self._bar.update(epochs - each.epochs)
      each.epochs = epochs
    if not sys.stderr.isatty() and time.monotonic() - self._told >= _TELL_SECONDS:
      self._told = time.monotonic()
      self._say(str(self._bar))

  def _learn(self, result: dict):
    if result.get("seconds"):
      self._seconds[result["flagfile"]].append(result["seconds"] / result["recipe"]["epochs"])

  def _estimate(self, jobs: int) -> str:
    """What is left, by the runs so far: of the same flagfile, or else of all."""
    means = {flagfile: statistics.fmean(each) for flagfile, each in self._seconds.items()}
    if not means:
      return "what is left cannot be told yet"
    left = [(run, run.recipe.epochs) for run in self._waiting]
    left += [(each.run, each.run.recipe.epochs - each.epochs) for each in self._working]
    mean = statistics.fmean(means.values())
    seconds = sum(epochs * means.get(run.flagfile, mean) for run, epochs in left) / jobs
    return f"about {tqdm.tqdm.format_interval(seconds)} left"

  def _say(self, line: str):
    tqdm.tqdm.write(line)
    sys.stdout.flush()

  def _stop(self):
    """Asks the runs that are at work to save, and waits until they have."""
    for each in self._working:
      each.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for each in self._working:
      with contextlib.suppress(subprocess.TimeoutExpired):
        each.process.wait(max(0.0, deadline - time.monotonic()))
      each.process.kill()
      each.process.wait()


def main(argv: list[str]) -> int:
  """Runs the studies on the command line, and returns the process' exit status."""
  values = flags.FLAGS
  try:
    if len(argv) < 2:
      raise UserError("No study was named; name one or more, such as table1.")
    given = [flag for flag in values.flags_by_module_dict()[train.__name__] if flag.present]
    refused = [flag.name for flag in given if flag.name in {*_RECIPE_FLAGS, "work_dir"}]
    if refused:
      raise UserError(f"--{refused[0]} is not for studies; flagfiles say what their runs are.")
    runs = [run for name in argv[1:] for run in read_study(name)]
    studies = _Studies(
      runs, values.runs_dir, values.results_dir, [flag.serialize() for flag in given]
    )
    stopped = studies.work(values.jobs)
  except (UserError, OSError) as error:
    print(f"error: {first_line(error)}", file=sys.stderr)
    return 1
  if stopped:
    print("Stopped; the same command goes on from what was saved.", file=sys.stderr)
    return 128 + stopped
  return 0


if __name__ == "__main__":
  define_flags()
  app.run(main)
