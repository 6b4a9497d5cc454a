"""Branches of a run: they go on from one of its checkpoints with another k, on the same data.

A branch is an ordinary work directory, which the trainer continues. It holds the parent's state at
the end of an epoch as if k workers had trained up to there: only the number of steps differs. The
rate is that of the recipe with k, and the momentum correction rescales the buffer to it. So a
branch with the parent's own k is the parent.

Source: Merrill et al. 2025 (arXiv 2505.23971), §3.
"""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys

import numpy as np

from tf_largebatch import files
from tf_largebatch.errors import UserError, summary
from tf_largebatch.recipe import Recipe
from tf_largebatch.training.checkpoint import Manifest, load_state, read_manifest, store
from tools.studies import trainer_log
from tools.studies.work_directories import read_recipe, read_records, read_result

_ITERATIONS = "optimizer/0000"  # The optimizer counts its steps in its first variable.


@dataclasses.dataclass(frozen=True)
class Parent:
  """A run at the end of an epoch.

  Attributes:
    work_dir: of the run.
    recipe: of the run.
    facts: what `recipe.json` holds.
    epoch: number of epochs that are done.
    manifest, arrays: of the checkpoint.
  """

  work_dir: str
  recipe: Recipe
  facts: dict
  epoch: int
  manifest: Manifest
  arrays: dict[str, np.ndarray]

  @property
  def train_examples(self) -> int:
    return self.facts["derived"]["train_examples"]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a branch ended.

  Attributes:
    workers, kn, steps: k, images in a step, and steps of the branch.
    learning_rate: of its last step.
    loss: mean of the training loss over the last epoch; infinite if training diverged.
    validation_error: at the end, a fraction; None if training diverged.
    curve: the training loss by epoch, a mean over the steps since the last point.
  """

  workers: int
  kn: int
  steps: int
  learning_rate: float
  loss: float
  validation_error: float | None
  curve: dict[float, float]


def read_parent(path: str) -> Parent:
  """Reads the checkpoint whose manifest is the file RUN/checkpoints/step-N.json.

  Raises:
    UserError: it is not a whole checkpoint of a run, at the end of an epoch.
  """
  work_dir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
  recipe = read_recipe(work_dir)
  try:
    facts = files.read_json(os.path.join(work_dir, "recipe.json"))
    train_examples = facts["derived"]["train_examples"]
    manifest = read_manifest(path)
    arrays = load_state(path, manifest)
    if int(arrays[_ITERATIONS]) != manifest.step:
      raise ValueError("the optimizer has done another number of steps")
  except (*files.FAILURES, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"--from_checkpoint={path} is not a whole checkpoint of a run ({summary(error)}); give a "
      "RUN/checkpoints/step-N.json of this version."
    ) from error
  epoch, rest = divmod(manifest.step, recipe.steps_per_epoch(train_examples))
  if rest or not epoch:
    raise UserError(
      f"--from_checkpoint={path} is inside epoch {epoch + 1}, where another k would have seen "
      "other images; give a checkpoint at the end of an epoch, a multiple of "
      f"{recipe.steps_per_epoch(train_examples)} steps."
    )
  return Parent(work_dir, recipe, facts, epoch, manifest, arrays)


def branch_recipe(parent: Parent, workers: int, epochs: int) -> Recipe:
  """The recipe with another k, which ends so many epochs after the checkpoint.

  Raises:
    UserError: the recipe does not allow that.
  """
  recipe = parent.recipe
  if recipe.decay != "steps":
    raise UserError(
      f"The rate of {parent.work_dir} depends on its number of epochs (decay={recipe.decay}), so a "
      "shorter branch would have another rate; use a run with decay=steps."
    )
  branch = dataclasses.replace(recipe, workers=workers, epochs=parent.epoch + epochs)
  branch.steps_per_epoch(parent.train_examples)  # Refuses a step that is larger than the data.
  return branch


def begin(parent: Parent, recipe: Recipe, work_dir: str):
  """Writes the work directory of a branch, unless it is there.

  Raises:
    UserError: the directory holds something else, or cannot be written.
  """
  path = os.path.join(work_dir, "recipe.json")
  if os.path.exists(path):
    if read_recipe(work_dir) != recipe:
      raise UserError(f"{work_dir} holds a run of another recipe; give another --output_dir.")
    return
  step = parent.epoch * recipe.steps_per_epoch(parent.train_examples)
  iterations = parent.arrays[_ITERATIONS]
  arrays = parent.arrays | {_ITERATIONS: np.array(step, iterations.dtype)}
  error = parent.manifest.validation_error
  try:
    store(os.path.join(work_dir, "checkpoints"), step, 0.0, arrays, error)
    # recipe.json comes last, because a directory that has it counts as begun.
    files.write_json(path, parent.facts | {"recipe": recipe.to_dict()})
  except files.FAILURES as failure:
    raise UserError(
      f"{work_dir} cannot be written ({summary(failure)}); give another --output_dir."
    ) from failure


def train_branch(parent: Parent, recipe: Recipe, work_dir: str) -> Outcome:
  """Trains a branch to its end, with the options of its parent; the log is WORK_DIR.log.

  Raises:
    UserError: the trainer ended for another reason than that training diverged.
  """
  if read_result(work_dir) is not None:
    return _outcome(parent, recipe, work_dir, diverged=False)
  flagfile = os.path.join(parent.work_dir, "flags.txt")
  changes = {"workers": recipe.workers, "epochs": recipe.epochs, "work_dir": work_dir}
  together = _workers_per_pass(flagfile)
  if together:
    changes["workers_per_pass"] = math.gcd(together, recipe.workers)
  command = [sys.executable, "-m", "tf_largebatch.train", f"--flagfile={flagfile}"]
  command += [f"--{name}={value}" for name, value in changes.items()]
  with open(f"{work_dir}.log", "ab") as log:
    start = log.tell()
    process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    try:
      status = process.wait()
    finally:  # On Ctrl-C and SIGTERM, the branch saves, so that it can go on.
      process.terminate()
      process.wait()
  if status:
    message = trainer_log.last_message(pathlib.Path(f"{work_dir}.log"), start)
    if not message.startswith(trainer_log.DIVERGED):
      raise UserError(f"The branch {work_dir} ended with status {status}: {message}")
  return _outcome(parent, recipe, work_dir, diverged=bool(status))


def _workers_per_pass(flagfile: str) -> int | None:
  """g of the parent; None if it was chosen by the trainer."""
  name = "--workers_per_pass="
  lines = files.read_text(flagfile).splitlines()
  return next((int(line.removeprefix(name)) for line in lines if line.startswith(name)), None)


def _outcome(parent: Parent, recipe: Recipe, work_dir: str, diverged: bool) -> Outcome:
  records = read_records(work_dir)
  trained = [record for record in records if record["kind"] == "train"]
  first = parent.epoch * recipe.steps_per_epoch(parent.train_examples)
  loss, before = 0.0, first
  for record in trained:
    if record["epoch"] > recipe.epochs - 1 + 1e-9:
      loss += record["loss"] * (record["step"] - before)
    before = record["step"]
  result = read_result(work_dir)
  return Outcome(
    workers=recipe.workers,
    kn=recipe.global_batch_size,
    steps=before - first,
    learning_rate=trained[-1]["learning_rate"] if trained else math.nan,
    loss=math.inf if diverged else loss / recipe.steps_per_epoch(parent.train_examples),
    validation_error=None if diverged else result["val_error"],
    curve={record["epoch"]: record["loss"] for record in trained},
  )


def largest_that_comes_back(outcomes: list[Outcome], workers: int, tolerance: float) -> int:
  """The largest kn that, as all from the parent's on, ends near the loss of the parent's k.

  Args:
    outcomes: of different k, among them the parent's.
    workers: k of the parent.
    tolerance: by how much of it the loss may be higher.
  """
  own = next(each for each in outcomes if each.workers == workers)
  largest = own.kn
  for each in sorted(outcomes, key=lambda outcome: outcome.kn):
    if each.kn > own.kn:
      if not each.loss <= (1 + tolerance) * own.loss:
        break
      largest = each.kn
  return largest
