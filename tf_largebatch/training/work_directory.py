"""The work directory: which run it holds, who may write to it, and its files."""

import contextlib
import dataclasses
import os

import tensorflow as tf
from absl import logging

from tf_largebatch import files, locks
from tf_largebatch.command_line import to_flagfile
from tf_largebatch.data.sources import PIXELS
from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe

# What a run overwrites in its work directory.
_WRITTEN = ("flags.txt", "metrics.jsonl", "model.keras", "result.json", "checkpoints")


def with_stored_workers(recipe: Recipe, work_dir: str) -> Recipe:
  """If the recipe leaves k open, takes the k of the run that is there, on any devices."""
  if recipe.workers is None:
    # `find_run` reports what is wrong with the file.
    with contextlib.suppress(*files.FAILURES, ValueError, TypeError, KeyError):
      workers = files.read_json(os.path.join(work_dir, "recipe.json"))["recipe"]["workers"]
      return dataclasses.replace(recipe, workers=workers)
  return recipe


def find_run(work_dir: str, recipe: Recipe, data: dict) -> dict | None:
  """Returns the result of the run in the directory; None if it is incomplete or not there.

  Args:
    work_dir: the run's directory.
    recipe: resolved.
    data: see `sources.identify`; fingerprints are not compared, because the data are not open yet.

  Raises:
    UserError: the directory holds a run of another recipe or on other data, or files that do not
      belong to a run.
  """
  path = os.path.join(work_dir, "recipe.json")
  if not _exists(path):
    foreign = [name for name in _WRITTEN if _exists(os.path.join(work_dir, name))]
    if foreign:
      raise UserError(
        f"work_dir={work_dir} has no recipe.json, but {' and '.join(foreign)}, which a run would "
        "overwrite; choose another work_dir."
      )
    return None
  stored, trained_on = _read_recipe(path, data)
  _require_same_recipe(work_dir, stored, recipe)
  identity = {name: value for name, value in trained_on.items() if name != "fingerprints"}
  if identity != data:
    raise UserError(
      f"work_dir={work_dir} holds a run on other data ({identity} there, {data} now); choose "
      "another work_dir, or the data_dir that it began with."
    )
  return _read_result(os.path.join(work_dir, "result.json"))


def stored_fingerprints(work_dir: str, data: dict) -> dict | None:
  """Returns the fingerprints of the data that the run in the directory began with.

  Args:
    work_dir: the run's directory, which `find_run` has accepted.
    data: see `sources.identify`.

  Returns:
    Split → fingerprint; None without a run, or if an older version wrote it, which stored none.
  """
  path = os.path.join(work_dir, "recipe.json")
  return _read_recipe(path, data)[1].get("fingerprints") if _exists(path) else None


def require_same_examples(
  work_dir: str, stored: dict[str, str] | None, now: dict[str, str], advice: str
) -> None:
  """Refuses data whose fingerprints contradict those that a run has stored.

  Args:
    work_dir: the run's directory.
    stored: see `stored_fingerprints`.
    now: split → fingerprint of the data that are there.
    advice: what the user should do, for the message.

  Raises:
    UserError: a split has other examples, or the same ones in another order.
  """
  if stored and any(_contradicts(stored[split], fingerprint) for split, fingerprint in now.items()):
    raise UserError(
      f"work_dir={work_dir} holds a run on other examples, or on the same ones in another order "
      f"({stored} there, {now} now); {advice}."
    )


def _contradicts(stored: str, now: str) -> bool:
  # Of decoded images, older versions stored a fingerprint of the files' bytes.
  is_older = now.startswith(PIXELS) and not stored.startswith(PIXELS)
  return stored != now and not is_older


def _read_recipe(path: str, data: dict) -> tuple[Recipe, dict]:
  """(recipe of the run, its data); a field that the file lacks has its default."""
  try:
    facts = files.read_json(path)
    return Recipe(**facts["recipe"]), dict(facts.get("data", data))
  except (*files.FAILURES, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} does not hold the recipe of a run of this version ({summary(error)}); choose "
      "another work_dir."
    ) from error


def _require_same_recipe(work_dir: str, stored: Recipe, recipe: Recipe):
  there, now = stored.to_dict(), recipe.to_dict()
  differences = [
    f"{name} is {there[name]} there and {now[name]} now"
    for name in sorted(there)
    if there[name] != now[name]
  ]
  if differences:
    raise UserError(
      f"work_dir={work_dir} holds another recipe's run ({'; '.join(differences)}); choose another "
      "work_dir, or that recipe to continue it."
    )


def _read_result(path: str) -> dict | None:
  if not _exists(path):
    return None
  try:
    result = files.read_json(path)
    if not isinstance(result, dict) or result.get("status") != "complete":
      raise ValueError("its status is not complete")
    return result
  except (*files.FAILURES, ValueError) as error:
    raise UserError(
      f"{path} is not the result of a run ({summary(error)}); remove it to continue the run."
    ) from error


def _exists(path: str) -> bool:
  try:
    return tf.io.gfile.exists(path)
  except files.FAILURES as error:
    raise UserError(
      f"{path} cannot be reached ({summary(error)}); name another work_dir."
    ) from error


@contextlib.contextmanager
def wrap_write_errors(work_dir: str):
  """Raises a failed write as a UserError that names the work directory."""
  try:
    yield
  except files.FAILURES as error:
    raise UserError(
      f"work_dir={work_dir} cannot be written ({summary(error)}); name a directory that can."
    ) from error


def make_writable(work_dir: str) -> None:
  """Makes the directory if it is missing, and checks that it can be written."""
  with wrap_write_errors(work_dir):
    tf.io.gfile.makedirs(work_dir)
    # A random name: in containers every process can have the same id.
    probe = os.path.join(work_dir, f".probe-{os.urandom(8).hex()}")
    files.write_text(probe, "." * 4096)  # An empty file fits on a full disk.
    tf.io.gfile.remove(probe)


@contextlib.contextmanager
def locked(work_dir: str):
  """Refuses a second run in the directory; the lock ends with the process (see `locks`).

  Raises:
    UserError: another run uses the directory.
  """
  with contextlib.ExitStack() as stack:
    with wrap_write_errors(work_dir):
      try:
        stack.enter_context(locks.exclusive(os.path.join(work_dir, ".lock")))
      except locks.HeldError as error:
        raise UserError(
          f"work_dir={work_dir} is in use by a run ({error}); end that one first, or choose "
          "another work_dir."
        ) from error
    yield


def write_recipe(recipe: Recipe, options: RunOptions, facts: dict) -> None:
  """Writes `recipe.json` (the recipe and further facts by name) and `flags.txt`."""
  with wrap_write_errors(options.work_dir):
    path = os.path.join(options.work_dir, "recipe.json")
    files.write_json(path, {"recipe": recipe.to_dict(), **facts})
    path = os.path.join(options.work_dir, "flags.txt")
    files.write_text(path, to_flagfile(recipe, options))


def restore_recipe(recipe: Recipe, options: RunOptions, facts: dict) -> None:
  """Writes `recipe.json` and `flags.txt` again if someone has removed the directory.

  Without `recipe.json`, what the run saves would not count as a run. A failure is left to the next
  save.
  """
  with contextlib.suppress(*files.FAILURES, UserError):
    if not tf.io.gfile.exists(os.path.join(options.work_dir, "recipe.json")):
      logging.warning("recipe.json in %s is missing; writing it again.", options.work_dir)
      tf.io.gfile.makedirs(options.work_dir)
      write_recipe(recipe, options, facts)
