"""Reads studies: which runs each plans."""

import copy
import dataclasses
import pathlib
import tomllib

from absl import flags

from tf_largebatch import command_line, train
from tf_largebatch.errors import UserError, summary
from tf_largebatch.recipe import Recipe

_STUDIES = pathlib.Path(__file__).parent
RECIPE_FLAGS = tuple(field.name for field in dataclasses.fields(Recipe))


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """A run of a study.

  Attributes:
    study: the study's name.
    flagfile: path of the flagfile with the recipe.
    recipe: the flagfile's, with the run's seed.
    flags: further flags of the trainer.
  """

  study: str
  flagfile: str
  recipe: Recipe
  flags: tuple[str, ...]

  @property
  def name(self) -> str:
    """The name of its work directory and of its result file."""
    return f"{pathlib.Path(self.flagfile).stem}_seed{self.recipe.seed}"


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
  planned = []
  for runs in table["runs"]:
    runs = {"flags": [], "first_seed": 0, **runs} if isinstance(runs, dict) else {}
    kinds = {"flagfile": str, "seeds": int, "first_seed": int, "flags": list}
    _check_table(path, runs, kinds)
    extra = (*table["flags"], *runs["flags"])
    planned += [
      PlannedRun(path.stem, runs["flagfile"], _recipe(path, runs["flagfile"], extra, seed), extra)
      for seed in range(runs["first_seed"], runs["first_seed"] + runs["seeds"])
    ]
  if not planned:
    raise UserError(f"{path} plans no run; give [[runs]] with a flagfile and seeds = 1 or more.")
  return planned


def _check_table(path: pathlib.Path, table: dict, kinds: dict[str, type]):
  """Raises a UserError if a field of the TOML is unknown, missing or of another type."""
  unknown = ", ".join(sorted(table.keys() - kinds.keys()))
  if unknown:
    raise UserError(f"{path}: unknown field {unknown}; the fields are {', '.join(kinds)}.")
  for name, kind in kinds.items():
    if type(table.get(name)) is not kind:
      raise UserError(f"{path}: {name} = {table.get(name)!r} is not of type {kind.__name__}.")
  if not all(isinstance(item, str) for item in table["flags"]):
    raise UserError(f"{path}: flags = {table['flags']!r}; each must be a string.")


def _recipe(path: pathlib.Path, flagfile: str, extra: tuple[str, ...], seed: int) -> Recipe:
  """Returns the recipe of a flagfile, with a seed; the extra flags must not change the recipe."""
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  left = command_line.parse_flags([train.__name__, *extra], values)
  ours = sorted(name for name in RECIPE_FLAGS if values[name].present)
  if ours or left[1:]:
    raise UserError(f"{path}: {', '.join([*ours, *left[1:]])} belongs in a flagfile.")
  seeded = [*extra, f"--flagfile={flagfile}", f"--seed={seed}"]
  command_line.parse_flags([train.__name__, *seeded], values)
  return command_line.recipe_from_flags(values)
