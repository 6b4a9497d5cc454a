"""Imports a user's TensorFlow Datasets builder, so that TFDS knows it by its name."""

import importlib
import importlib.util
import os
import pathlib

import tensorflow_datasets as tfds

from tf_largebatch.errors import UserError, summary


def resolve(dataset: str) -> str:
  """Returns the name of a data set, after importing its builder if a path is given instead."""
  is_path = dataset.startswith((".", "/", "~")) or dataset.endswith((".py", "/"))
  return _import_path(dataset) if is_path else dataset


def _import_path(argument: str) -> str:
  """Imports a builder from a path, as `tfds build` takes it, and returns its data set's name.

  Args:
    argument: a script, or a folder `x` with a script `x_dataset_builder.py` or `x.py`.

  Raises:
    UserError: the script does not exist, or it does not define one builder.
  """
  path = pathlib.Path(os.path.abspath(os.path.expanduser(argument)))
  scripts = [path]
  if path.is_dir():
    scripts = [path / f"{path.name}_dataset_builder.py", path / f"{path.name}.py"]
  script = next((script for script in scripts if script.is_file()), None)
  if script is None:
    raise UserError(
      f"{argument} is not a builder of TensorFlow Datasets: there is no "
      f"{' or '.join(map(str, scripts))}; name a script, or the folder that `tfds new` made."
    )
  before = set(tfds.list_builders(with_community_datasets=False))
  # As TFDS does, which finds what belongs to a builder in the package of the builder's module.
  package = script.parent
  with tfds.core.utils.add_sys_path(package.parent), tfds.core.utils.add_sys_path(package):
    name = f"{package.name}.{script.stem}"
    import_module(name if _can_import(name) else script.stem)
  new = sorted(set(tfds.list_builders(with_community_datasets=False)) - before)
  if len(new) != 1:
    raise UserError(
      f"{script} defines {len(new)} data sets ({', '.join(new) or 'none'}); give one builder a "
      "script, or use --imports=MODULE and name the data set."
    )
  return new[0]


def _can_import(module: str) -> bool:
  """Whether there is such a module; not if another package has its package's name."""
  try:
    return importlib.util.find_spec(module) is not None
  except (ImportError, ValueError):
    return False


def import_module(module: str) -> None:
  """Imports a module, which registers the builders that it defines.

  Raises:
    UserError: it cannot be imported.
  """
  try:
    importlib.import_module(module)
  except Exception as error:  # Whatever the user's code raises.
    raise UserError(
      f"{module} cannot be imported ({type(error).__name__}: {summary(error)}); correct it, or set "
      "PYTHONPATH."
    ) from error
