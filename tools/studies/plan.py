"""Reads studies: which runs each plans."""

import copy
import dataclasses
import pathlib
import re
import tomllib

from absl import flags

from tf_largebatch import command_line, train
from tf_largebatch.errors import UserError, summary
from tf_largebatch.recipe import Recipe

_STUDIES = pathlib.Path(__file__).parent
_NAME = re.compile(r"[\w.]+")
RECIPE_FLAGS = tuple(field.name for field in dataclasses.fields(Recipe))


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """A run of a study.

  Attributes:
    study: the study's name.
    group: name of the runs that differ in the seed alone; that of the flagfile, if the study gives
      no other.
    flagfile: path of the flagfile with the recipe.
    changes: flags of the recipe that differ from the flagfile's.
    recipe: the flagfile's, with these changes and the run's seed.
    flags: further flags of the trainer.
  """

  study: str
  group: str
  flagfile: str
  changes: tuple[str, ...]
  recipe: Recipe
  flags: tuple[str, ...]

  @property
  def name(self) -> str:
    """The name of its work directory and of its result file."""
    return f"{self.group}_seed{self.recipe.seed}"


def read_study(name: str) -> list[PlannedRun]:
  """Reads the runs that a study plans.

  Args:
    name: of a file in `tools/studies/`, or a path that ends in .toml.

  Raises:
    UserError: the file, or a flagfile that it names, is missing or invalid.
  """
  path = pathlib.Path(name if name.endswith(".toml") else _STUDIES / f"{name}.toml")
  try:
    study = tomllib.loads(path.read_text())
  except FileNotFoundError as error:
    known = ", ".join(sorted(each.stem for each in _STUDIES.glob("*.toml")))
    raise UserError(f"There is no study {name}; give one of {known}, or a .toml file.") from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is not a study ({summary(error)}).") from error
  table = {"title": "", "flags": [], **study}
  _check_table(path, table, {"title": str, "flags": list, "runs": list})
  planned = [run for runs in table["runs"] for run in _plan(path, runs, table["flags"])]
  if not planned:
    raise UserError(f"{path} plans no run; give [[runs]] with a flagfile and seeds = 1 or more.")
  return planned


def _plan(path: pathlib.Path, runs, flags_of_study: list[str]) -> list[PlannedRun]:
  """Returns the runs of one [[runs]]."""
  runs = {"name": "", "recipe": [], "flags": [], "first_seed": 0} | (
    runs if isinstance(runs, dict) else {}
  )
  kinds = {"name": str, "flagfile": str, "recipe": list, "seeds": int, "first_seed": int}
  _check_table(path, runs, {**kinds, "flags": list})
  if bool(runs["name"]) != bool(runs["recipe"]):
    raise UserError(f"{path}: give name and recipe together; a changed recipe needs a name.")
  if runs["name"] and not _NAME.fullmatch(runs["name"]):
    raise UserError(f"{path}: name = {runs['name']!r}; use letters, digits, dots and underscores.")
  group, flagfile = runs["name"] or pathlib.Path(runs["flagfile"]).stem, runs["flagfile"]
  changes, extra = tuple(runs["recipe"]), (*flags_of_study, *runs["flags"])
  return [
    PlannedRun(
      path.stem, group, flagfile, changes, _recipe(path, flagfile, changes, extra, seed), extra
    )
    for seed in range(runs["first_seed"], runs["first_seed"] + runs["seeds"])
  ]


def _check_table(path: pathlib.Path, table: dict, kinds: dict[str, type]):
  """Raises a UserError if a field of the TOML is unknown, missing or of another type."""
  unknown = ", ".join(sorted(table.keys() - kinds.keys()))
  if unknown:
    raise UserError(f"{path}: unknown field {unknown}; the fields are {', '.join(kinds)}.")
  for name, kind in kinds.items():
    if type(table.get(name)) is not kind:
      raise UserError(f"{path}: {name} = {table.get(name)!r} is not of type {kind.__name__}.")
  for name in {"flags", "recipe"} & kinds.keys():
    if not all(isinstance(item, str) for item in table[name]):
      raise UserError(f"{path}: {name} = {table[name]!r}; each must be a string.")


def _recipe(
  path: pathlib.Path, flagfile: str, changes: tuple[str, ...], extra: tuple[str, ...], seed: int
) -> Recipe:
  """Returns a flagfile's recipe with changes and a seed; `extra` must not change it."""
  ours, left = _given(extra)
  if ours or left:
    raise UserError(f"{path}: {', '.join([*ours, *left])} belongs in a flagfile or in recipe.")
  ours, left = _given(changes)
  if left or len(ours) < len(changes) or "seed" in ours:
    raise UserError(f"{path}: recipe = {list(changes)} must be flags of the recipe, not the seed.")
  values = _new_flags()
  given = [*extra, f"--flagfile={flagfile}", *changes, f"--seed={seed}"]
  command_line.parse_flags([train.__name__, *given], values)
  return command_line.recipe_from_flags(values)


def _given(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
  """Returns the names of the recipe's flags among the arguments, and the non-flag arguments."""
  values = _new_flags()
  left = command_line.parse_flags([train.__name__, *arguments], values)
  return sorted(name for name in RECIPE_FLAGS if values[name].present), left[1:]


def _new_flags() -> flags.FlagValues:
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  return values
