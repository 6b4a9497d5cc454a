"""Reads the results of studies: a JSON file for each run, as `tools.study` writes them."""

import dataclasses
import glob
import json
import math
import os

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.studies import curves
from tools.studies.curves import format_mean
from tools.studies.noise import Epoch

CHANCE = 0.9  # The error of a run that diverged: both data sets have 10 classes.


@dataclasses.dataclass(frozen=True)
class Result:
  """A run's result file.

  Attributes:
    run: the recipe and the curves; its `path` is the file.
    study: whose run it is.
    stem: name of the run's group: that of its flagfile, unless the study gave another.
    error: median validation error of the last 5 epochs, a fraction; chance if the run diverged.
    last_error: validation error after the last epoch, likewise.
    train_examples: size of the training split.
    hardware, versions: what trained the run, in words.
    seconds: of training; 0 if the run diverged.
    weights_sha256: the first digits; empty if the run diverged.
    divergence: the trainer's message if the run diverged, else empty.
    noise: the noise scale by epoch; empty if it was not measured.
    curvature: the training records with the curvature, likewise.
  """

  run: curves.Run
  study: str
  stem: str
  error: float
  last_error: float
  train_examples: int
  hardware: str
  versions: str
  seconds: float
  weights_sha256: str
  divergence: str
  noise: tuple[Epoch, ...]
  curvature: tuple[dict, ...]

  @property
  def diverged(self) -> bool:
    return not self.run.complete

  @property
  def seed(self) -> int:
    return self.run.recipe.seed


@dataclasses.dataclass(frozen=True)
class Group:
  """The results of one flagfile, or of one changed recipe, by seed."""

  stem: str
  results: tuple[Result, ...]

  @property
  def recipe(self) -> Recipe:
    """The recipe, with the first run's seed."""
    return self.results[0].run.recipe

  @property
  def kn(self) -> int:
    return self.recipe.global_batch_size

  @property
  def errors(self) -> list[float]:
    return [result.error for result in self.results]

  @property
  def curves(self) -> curves.Group:
    return curves.Group(self.stem, tuple(result.run for result in self.results))

  @property
  def label(self) -> str:
    """kn, and the ablation if it is one."""
    warmup = {"gradual": "", "constant": " constant warmup", "none": " no warmup"}
    corrected = "" if self.recipe.momentum_correction else " uncorrected"
    size = f"kn {self.kn}"
    if self.kn <= self.recipe.reference_batch_size:  # No warmup takes place.
      return size + corrected
    return size + warmup[self.recipe.warmup] + corrected

  @property
  def summary(self) -> str:
    """Mean ± standard deviation, the number of seeds, and how many of them diverged."""
    diverged = sum(result.diverged for result in self.results)
    note = f", {diverged} diverged, counted as {100 * CHANCE:g} %" if diverged else ""
    seeds = curves.format_seeds(self.results)
    return f"{format_mean(self.errors)} ({seeds}{note})"


def read_groups(results_dir: str) -> dict[str, Group]:
  """Reads all results and groups them by name, in alphabetical order.

  Raises:
    UserError: there is no result, or one is damaged, exists twice or does not belong to its group.
  """
  paths = sorted(glob.glob(os.path.join(glob.escape(results_dir), "*", "*.json")))
  if not paths:
    raise UserError(f"{results_dir} holds no STUDY/*.json; give a --results_dir of tools.study.")
  found: dict[str, dict[int, Result]] = {}
  for path in paths:
    result = read_result(path)
    members = found.setdefault(result.stem, {})
    if result.seed in members:
      other = members[result.seed].run.path
      raise UserError(f"{other} and {path} are the same run; remove one of them.")
    members[result.seed] = result
    first = next(iter(members.values())).run
    if dataclasses.replace(result.run.recipe, seed=first.recipe.seed) != first.recipe:
      raise UserError(
        f"{first.path} and {path} have the same group, but their recipes differ in more than "
        "the seed; rerun or remove one of them."
      )
  return {
    stem: Group(stem, tuple(members[seed] for seed in sorted(members)))
    for stem, members in sorted(found.items())
  }


class _Fields:
  """The fields of a file's JSON object, checked as they are read.

  Raises:
    UserError: the file or a field cannot be read.
  """

  def __init__(self, path: str):
    self.path = path
    try:
      with open(path, encoding="utf-8") as file:
        self._data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
      raise UserError(f"{path} cannot be read ({error}); repair or remove it.") from error

  def get(self, name: str, kinds: tuple[type, ...], low: float = -math.inf, high: float = math.inf):
    """Returns a field of one of these types and, if a number, between these limits.

    Args:
      name: of the field; dots separate the names of nested objects.
    """
    value = self._data
    for part in name.split("."):
      value = value.get(part) if isinstance(value, dict) else None
    if type(value) not in kinds or (type(value) in (int, float) and not low <= value <= high):
      raise UserError(f"{self.path}: {name} is {value!r}, which is invalid; repair or remove it.")
    return value

  def curve(self, name: str) -> dict[int, float]:
    """Returns errors by epoch."""
    epochs = self.get(name, (dict,))
    for epoch in epochs:
      if not (epoch.isdecimal() and int(epoch)):
        raise UserError(f"{self.path}: {name} has an epoch {epoch!r}; repair or remove it.")
    return {
      int(epoch): self.get(f"{name}.{epoch}", (int, float), 0, 1)
      for epoch in sorted(epochs, key=int)
    }

  def group(self) -> str:
    """Returns the name of the group; in older files it is the flagfile's."""
    if "group" in self._data:
      return self.get("group", (str,))
    return os.path.splitext(os.path.basename(self.get("flagfile", (str,))))[0]

  def recipe(self) -> Recipe:
    """Returns the recipe, whose seed must be the file's."""
    values = self.get("recipe", (dict,))
    try:
      recipe = Recipe(**values)
      recipe.global_batch_size  # noqa: B018 - Raises if k is missing.
    except (ValueError, TypeError) as error:
      raise UserError(
        f"{self.path}: recipe is invalid ({error}); repair or remove the file."
      ) from error
    seed = self.get("seed", (int,))
    if seed != recipe.seed:
      raise UserError(f"{self.path}: seed is {seed}, the recipe's {recipe.seed}; repair one.")
    return recipe

  def noise(self) -> tuple[Epoch, ...]:
    """Returns the noise by epoch."""
    rows = self._rows("noise", ("epoch", "variance", "squared_gradient"))
    return tuple(Epoch(int(e), *map(float, more), None) for e, *more in rows)

  def curvature(self) -> tuple[dict, ...]:
    """Returns step, learning_rate and largest_eigenvalue of each measurement."""
    names = ("step", "learning_rate", "largest_eigenvalue")
    rows = self._rows("curvature", names)
    return tuple(dict(zip(names, row, strict=True)) for row in rows)

  def _rows(self, name: str, fields: tuple[str, ...]) -> list[list[float]]:
    """Returns these fields, all numbers, of each object in a list; [] if the list is missing."""
    rows = self.get(name, (list,)) if name in self._data else []
    try:
      found = [[row[field] for field in fields] for row in rows]
    except (TypeError, KeyError):
      found = [[None]]
    if not all(type(x) in (int, float) and math.isfinite(x) for row in found for x in row):
      raise UserError(f"{self.path}: {name} is invalid; repair or remove it.")
    return found

  def versions(self) -> dict[str, str]:
    """Returns the versions of the packages, by name."""
    for name in ("python", "tensorflow", "keras"):
      self.get(f"versions.{name}", (str,))
    return {name: self.get(f"versions.{name}", (str,)) for name in self._data["versions"]}


def read_result(path: str) -> Result:
  """Reads the result file of a run.

  Raises:
    UserError: it cannot be read, or a field is missing or has a wrong type.
  """
  fields = _Fields(path)
  recipe = fields.recipe()
  status = fields.get("status", (str,))
  if status not in ("complete", "diverged"):
    raise UserError(f"{path}: status is {status!r}; it must be complete or diverged.")
  complete = status == "complete"
  number, text = (int, float), (str,)
  cpu, cores = fields.get("hardware.cpu", text), fields.get("hardware.cores", (int,), 1)
  training, validation = fields.curve("training_error"), fields.curve("validation_error")
  error_names = ("val_error_median_last_5", "val_error")
  error, last_error = (fields.get(x, number, 0, 1) if complete else CHANCE for x in error_names)
  return Result(
    run=curves.Run(path, recipe, complete, training, validation),
    study=fields.get("study", text),
    stem=fields.group(),
    error=error,
    last_error=last_error,
    train_examples=fields.get("derived.train_examples", (int,), 1),
    hardware=f"{cpu} (cores: {cores})",
    versions=", ".join(f"{name} {version}" for name, version in fields.versions().items()),
    seconds=fields.get("seconds", number, 0, 1e12) if complete else 0.0,
    weights_sha256=fields.get("weights_sha256", text)[:12] if complete else "",
    divergence="" if complete else fields.get("reason", text),
    noise=fields.noise(),
    curvature=fields.curvature(),
  )
