"""What a program prints as a table, and the JSON file that one of its flags names."""

import os
import pathlib
from collections.abc import Iterable

from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import expand_home


def output_path(flag: str, value: str | None) -> pathlib.Path | None:
  """Returns the file's path; None if the flag is not given. Call it before any measurement.

  Raises:
    UserError: the file cannot be written.
  """
  if not value:
    return None
  path = pathlib.Path(expand_home(value))
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise UserError(
      f"{flag}={value} cannot be written; name a file in an existing, writable directory."
    )
  return path


def write_json(flag: str, path: pathlib.Path, measured: dict | list):
  """Writes the file that `output_path` returned.

  Raises:
    UserError: it cannot be written.
  """
  from tf_largebatch import files  # Imports TensorFlow.

  try:
    files.write_json(str(path), measured)
  except files.FAILURES as error:
    raise UserError(f"{flag}={path} cannot be written ({summary(error)}).") from error


def table_line(label: object, label_width: int, cells: Iterable[object], cell_width: int) -> str:
  """Returns a line of a table: the label on the left, the cells in columns on the right."""
  return f"{label!s:<{label_width}}" + "".join(f"{cell!s:>{cell_width}}" for cell in cells)
