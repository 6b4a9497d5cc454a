"""What is saved of a run and how it comes back: a file a checkpoint, whole or not there at all."""

import io
import os
import re

import keras
import numpy as np
import tensorflow as tf

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
  """Assigns the newest checkpoint's state.

  Returns:
    (steps done, seconds trained); (0, 0.0) where there is no checkpoint.

  Raises:
    UserError: the checkpoint belongs to another network or optimizer.
  """
  saved = _saved(directory)
  if not saved:
    return 0, 0.0
  path = os.path.join(directory, saved[-1])
  with tf.io.gfile.GFile(path, "rb") as file:
    arrays = np.load(io.BytesIO(file.read()))
  variables = _variables(model, optimizer)
  if {name: v.shape for name, v in variables.items()} != {
    name: arrays[name].shape for name in arrays.files if name not in ("step", "seconds")
  }:
    raise UserError(
      f"The checkpoint {path} holds other variables than this recipe's network and optimizer; it "
      "was written by another version: continue with that one, or choose another work_dir."
    )
  for name, variable in variables.items():
    variable.assign(arrays[name])
  return int(arrays["step"]), float(arrays["seconds"])


def _saved(directory: str) -> list[str]:
  """The names of the checkpoints, oldest first."""
  if not tf.io.gfile.exists(directory):
    return []
  return sorted(name for name in tf.io.gfile.listdir(directory) if _NAME.fullmatch(name))
