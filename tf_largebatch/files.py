"""Files that are either complete or absent, on any file system that tf.io.gfile supports."""

import contextlib
import errno
import json
import os

import tensorflow as tf

# What reading and writing files raises.
FAILURES = (OSError, tf.errors.OpError)
# From file systems, such as some network and user-space ones, that do not offer fsync.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def replacing(path: str, mode: str, partial: str | None = None):
  """Yields a file that takes its name only when it is complete and safely on the disk.

  Until then a file that already has that name stays as it is.

  Args:
    path: the file's name.
    mode: "w" or "wb".
    partial: the file's name while it is incomplete; None: path + ".partial". Where several
      processes write the same file, each needs its own.
  """
  partial = partial or path + ".partial"
  with completing(partial, path), tf.io.gfile.GFile(partial, mode) as file:
    yield file


@contextlib.contextmanager
def completing(partial: str, path: str):
  """Renames `partial`, which the context writes, to `path`, or removes it after an error."""
  try:
    yield
    sync(partial)
    tf.io.gfile.rename(partial, path, overwrite=True)
  except BaseException:
    with contextlib.suppress(*FAILURES):
      tf.io.gfile.remove(partial)  # Frees the space if the disk is full.
    raise


def sync(path: str) -> None:
  """Returns once a file's contents would survive a power failure."""
  if "://" in path:  # An object store has stored whatever it accepted.
    return
  with open(path, "rb") as file:
    try:
      os.fsync(file.fileno())
    except OSError as error:
      if error.errno not in _CANNOT_SYNC:
        raise


def read_text(path: str) -> str:
  with tf.io.gfile.GFile(path) as file:
    return file.read()


def write_text(path: str, text: str) -> None:
  with replacing(path, "w") as file:
    file.write(text)


def parse_json(text: str | bytes):
  """Returns the value of a JSON text.

  Raises:
    ValueError: the text is not JSON, or is nested deeper than Python's parser allows.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError("nested too deep") from error


def read_json(path: str):
  """Returns the value of a JSON file; raises a ValueError as `parse_json` does."""
  return parse_json(read_text(path))


def write_json(path: str, value) -> None:
  write_text(path, json.dumps(value, indent=2) + "\n")
