"""Error curves of runs: runs of one recipe form a group, with errors by epoch and a final error."""

import dataclasses
import math
import statistics

from tf_largebatch.recipe import Recipe

KINDS = ("training", "validation")
# Okabe and Ito's colours, which stay distinct in all kinds of colour vision, without their yellow,
# which is too pale for a line.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_FINAL_EPOCHS = 5
_WORKER_FIELDS = ("workers", "per_worker_batch_size")


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's recipe and curves, from its work directory or its result file.

  Attributes:
    path: the work directory or the file.
    complete: whether the run trained to its end.
    training, validation: error, a fraction, by epoch.
  """

  path: str
  recipe: Recipe
  complete: bool
  training: dict[float, float]
  validation: dict[float, float]

  @property
  def final_epochs(self) -> list[float]:
    """The epochs that the final error is taken from."""
    return sorted(self.validation)[-_FINAL_EPOCHS:]

  @property
  def final_error(self) -> float:
    """Median validation error of the last five epochs, or of all if there are fewer."""
    return statistics.median(self.validation[epoch] for epoch in self.final_epochs)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs whose recipes differ only in the seed."""

  label: str
  runs: tuple[Run, ...]

  @property
  def recipe(self) -> Recipe:
    """The recipe, with the first run's seed."""
    return self.runs[0].recipe

  @property
  def complete(self) -> bool:
    """Whether all its runs are complete."""
    return all(run.complete for run in self.runs)

  @property
  def warmup_ends(self) -> float:
    """The epoch at which the warmup ends, 0 if there is no warmup."""
    return self.recipe.warmup_epochs if self.recipe.warms_up else 0.0

  @property
  def final_runs(self) -> tuple[Run, ...]:
    """The complete runs, or all runs while none is complete."""
    return tuple(run for run in self.runs if run.complete) or self.runs

  @property
  def final_errors(self) -> list[float]:
    """Final errors of `final_runs`."""
    return [run.final_error for run in self.final_runs]

  def errors(self, kind: str) -> dict[float, list[float]]:
    """Returns, by epoch, the errors of the runs that have reached it; `kind` is one of KINDS."""
    curves = [getattr(run, kind) for run in self.runs]
    epochs = sorted({epoch for curve in curves for epoch in curve})
    return {epoch: [curve[epoch] for curve in curves if epoch in curve] for epoch in epochs}


def training_curve(records: list[dict]) -> dict[float, float]:
  """Returns the mean training error over all steps of each finished epoch, by epoch.

  A record is the mean over the steps since the previous record or since the start of the epoch, so
  its weight is the part of the epoch that it spans.
  """
  curve, total, previous = {}, 0.0, None
  for record in records:
    if record["kind"] != "train":
      continue
    epoch = math.ceil(record["epoch"])
    if previous is None or previous <= epoch - 1:
      previous, total = epoch - 1, 0.0
    total += (record["epoch"] - previous) * record["error"]
    previous = record["epoch"]
    if previous == epoch:
      curve[epoch] = total
  return curve


def group_runs(runs: list[Run], baseline: Run) -> list[Group]:
  """Groups runs whose recipes differ only in the seed, the baseline's group first."""
  members = {}
  for run in [baseline, *runs]:
    of_recipe = members.setdefault(dataclasses.replace(run.recipe, seed=0), [])
    if run not in of_recipe:
      of_recipe.append(run)
  recipes = [recipe.to_dict() for recipe in members]
  differ = [name for name in recipes[0] if any(each[name] != recipes[0][name] for each in recipes)]
  return [
    Group(_label(recipe, recipes[0], differ), tuple(of_recipe))
    for recipe, of_recipe in zip(recipes, members.values(), strict=True)
  ]


def _label(recipe: dict, baseline: dict, differ: list[str]) -> str:
  """Names a group by its minibatch and by the fields in which the groups' recipes differ."""
  k, n = (recipe[name] for name in _WORKER_FIELDS)
  others = [name for name in differ if name not in _WORKER_FIELDS]
  with_size = not differ or others != differ
  parts = [f"k={k}"] if with_size else []
  if not differ or "per_worker_batch_size" in differ:
    parts.append(f"n={n}")
  for name in others:
    # After kn, only values that differ from the baseline's: longer labels are hard to read.
    if not with_size or recipe[name] != baseline[name]:
      value = recipe[name]
      value = ",".join(f"{item:g}" for item in value) if isinstance(value, list) else value
      parts.append(f"{name}={value}")
  return f"kn {k * n} ({', '.join(parts)})" if with_size else ", ".join(parts)


def format_points(fraction: float) -> str:
  """Returns a fraction in points, hundredths, with two decimals."""
  return f"{100 * fraction:.2f}"


def format_mean(errors: list[float]) -> str:
  """Returns "mean ± sample standard deviation %" of fractions."""
  scatter = f" ± {format_points(statistics.stdev(errors))}" if len(errors) > 1 else ""
  return f"{format_points(statistics.fmean(errors))}{scatter} %"


def format_seeds(runs: tuple[Run, ...]) -> str:
  return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
