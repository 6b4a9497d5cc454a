"""What is saved of a run and how it comes back: a file a checkpoint, whole or not there at all."""

import io
import os
import re
import zipfile
import zlib

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch.errors import UserError

_KEEP = 3
_NAME = re.compile(r"step-(\d+)\.npz")


def _variables(model: keras.Model, optimizer) -> dict[str, keras.Variable]:
  """All state by its place: weights and moving statistics; step, rate, momentum.

  Not by Keras' paths, which count the layers that a process has made.
  """
  named = {}
  for owner, variables in (("model", model.variables), ("optimizer", optimizer.variables)):
    for index, variable in enumerate(variables):
      named[f"{owner}/{index:04d}"] = variable
  return named


def save(directory: str, step: int, seconds: float, model: keras.Model, optimizer) -> str:
  """Saves all state as `directory/step-NNNNNNNNNN.npz` and keeps the last three.

  Args:
    directory: made if missing.
    step: steps done.
    seconds: time trained so far.
    model, optimizer: built.

  Returns:
    The path. It appears by a rename, so a file of that name is complete.
  """
  arrays = {name: variable.numpy() for name, variable in _variables(model, optimizer).items()}
  buffer = io.BytesIO()
  np.savez(buffer, step=np.int64(step), seconds=np.float64(seconds), **arrays)
  tf.io.gfile.makedirs(directory)
  path = os.path.join(directory, f"step-{step:010d}.npz")
  with tf.io.gfile.GFile(f"{path}.partial", "wb") as file:
    file.write(buffer.getvalue())
  tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)
  for old in _saved(directory)[:-_KEEP]:
    tf.io.gfile.remove(os.path.join(directory, old))
  return path


def restore_newest(directory: str, model: keras.Model, optimizer) -> tuple[int, float]:
  """Assigns the state of the newest checkpoint that can be read; a torn one is passed over.

  Returns:
    (steps done, seconds trained); (0, 0.0) where there is no checkpoint.

  Raises:
    UserError: the checkpoint belongs to another network or optimizer.
  """
  for name in reversed(_saved(directory)):
    path = os.path.join(directory, name)
    try:
      with tf.io.gfile.GFile(path, "rb") as file:
        arrays = dict(np.load(io.BytesIO(file.read())))
      step, seconds = int(arrays.pop("step")), float(arrays.pop("seconds"))
      break
    except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
      logging.warning("The checkpoint %s cannot be read (%s); trying an older one.", path, error)
  else:
    return 0, 0.0
  variables = _variables(model, optimizer)
  if {k: tuple(v.shape) for k, v in variables.items()} != {k: v.shape for k, v in arrays.items()}:
    raise UserError(
      f"The checkpoint {path} holds other variables than this recipe's network and optimizer; it "
      "was written by another version: continue with that one, or choose another work_dir."
    )
  for name, variable in variables.items():
    variable.assign(arrays[name])
  return step, seconds


def _saved(directory: str) -> list[str]:
  """The names of the checkpoints, oldest first."""
  if not tf.io.gfile.exists(directory):
    return []
  return sorted(name for name in tf.io.gfile.listdir(directory) if _NAME.fullmatch(name))
