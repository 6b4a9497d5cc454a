"""Files that are whole or not there, wherever tf.io.gfile reaches."""

import contextlib
import json
import os

import tensorflow as tf

# What reading and writing them raises.
FAILURES = (OSError, tf.errors.OpError)


@contextlib.contextmanager
def replacing(path: str, mode: str, suffix: str = ".partial"):
  """A file that takes its name, and another's place, when all of it is written and on the disk.

  Args:
    path: its name.
    mode: "w" or "wb".
    suffix: of its name until then; one of its own where several processes write the same file.
  """
  partial = path + suffix
  try:
    with tf.io.gfile.GFile(partial, mode) as file:
      yield file
    sync(partial)
    tf.io.gfile.rename(partial, path, overwrite=True)
  except BaseException:
    with contextlib.suppress(*FAILURES):
      tf.io.gfile.remove(partial)  # A full disk needs the room.
    raise


def sync(path: str) -> None:
  """Returns when what was written of the file outlasts a loss of power."""
  if "://" in path:  # An object store keeps what it has taken.
    return
  with open(path, "rb") as file:
    os.fsync(file.fileno())


def read_text(path: str) -> str:
  with tf.io.gfile.GFile(path) as file:
    return file.read()


def write_text(path: str, text: str) -> None:
  with replacing(path, "w") as file:
    file.write(text)


def parse_json(text: str | bytes):
  """
  Raises:
    ValueError: it is no JSON, or is nested deeper than any of ours.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError("nested too deep") from error


def read_json(path: str):
  """
  Raises:
    ValueError: it is no JSON.
  """
  return parse_json(read_text(path))


def write_json(path: str, value) -> None:
  write_text(path, json.dumps(value, indent=2) + "\n")
