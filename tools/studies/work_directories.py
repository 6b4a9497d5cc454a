"""Reads runs from their work directories."""

import json
import math
import os

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.studies.curves import Run, training_curve


def read_recipe(work_dir: str) -> Recipe:
  """Reads the recipe of the run in a work directory.

  Raises:
    UserError: there is no recipe, or it is damaged.
  """
  if not os.path.isdir(work_dir):
    raise UserError(f"{work_dir} is not a directory; give the --work_dir of a run.")
  path = os.path.join(work_dir, "recipe.json")
  text = _read(path, f"{work_dir} has no recipe.json; give the --work_dir of a run.")
  try:
    recipe = Recipe(**json.loads(text)["recipe"])
    recipe.global_batch_size  # noqa: B018 - Raises if k is missing.
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path} is not the recipe of a run ({error}); leave that run out.") from error
  return recipe


def read_run(work_dir: str, recipe: Recipe) -> Run:
  """Reads the curves of a run, which may still be training.

  Raises:
    UserError: nothing has been evaluated yet, or a file is damaged.
  """
  complete = read_result(work_dir) is not None
  records = read_records(work_dir)
  validation = {each["epoch"]: each["error"] for each in records if each["kind"] == "eval"}
  if not validation:
    raise UserError(
      f"{work_dir} has no evaluation yet; wait for its first epoch to end, or leave this run out."
    )
  return Run(work_dir, recipe, complete, training_curve(records), validation)


def read_result(work_dir: str) -> dict | None:
  """Reads the result of the run in a work directory; None if the run is not complete.

  Raises:
    UserError: the result is damaged.
  """
  path = os.path.join(work_dir, "result.json")
  if not os.path.exists(path):
    return None
  text = _read(path, f"{path} no longer exists; try again.")
  try:
    result = json.loads(text)
    return result if result["status"] == "complete" else None
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path} is not the result of a run ({error}); leave that run out.") from error


def read_records(work_dir: str) -> list[dict]:
  """Reads the records of the run in a work directory, which may still be training.

  Raises:
    UserError: there are none, or the file is damaged.
  """
  complete = read_result(work_dir) is not None  # Before the records, which may still grow.
  # Imports TensorFlow, so not before the recipes have been checked.
  from tf_largebatch.training.metrics import read_metrics

  path = os.path.join(work_dir, "metrics.jsonl")
  lines = _read(path, f"{work_dir} has no metrics.jsonl; leave this run out.").splitlines()
  records = read_metrics(work_dir)
  # While a run trains, its last line may be half-written; `read_metrics` stops at any such line.
  if len(records) < len(lines) - (not complete):
    raise UserError(
      f"{path} is damaged in line {len(records) + 1} of {len(lines)}; repair it or leave its run "
      "out."
    )
  for number, record in enumerate(records, 1):
    for name in ("epoch", "error"):
      value = record.get(name)
      if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(
          f"{path} line {number}: {name} is {value}, not a finite number; leave this run out."
        )
  return records


def _read(path: str, missing: str) -> str:
  """Reads a text file; `missing` is the message if it does not exist."""
  try:
    with open(path, encoding="utf-8") as file:
      return file.read()
  except FileNotFoundError as error:
    raise UserError(missing) from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); repair it or leave its run out.") from error
