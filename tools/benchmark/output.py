"""The table that a benchmark prints, and the JSON file that it writes."""

import os
import pathlib
from collections.abc import Iterable

from tf_largebatch.errors import UserError, summary


def json_path(value: str | None) -> pathlib.Path | None:
  """The file that --json names; None if the flag is not given.

  Raises:
    UserError: the file cannot be written, which is better known before anything is measured.
  """
  if not value:
    return None
  path = pathlib.Path(value).expanduser()
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise UserError(
      f"--json={value} cannot be written; name a file in an existing, writable directory."
    )
  return path


def write_json(path: pathlib.Path, report: dict):
  """Writes the file that `json_path` returned.

  Raises:
    UserError: it cannot be written.
  """
  from tf_largebatch import files  # Imports TensorFlow.

  try:
    files.write_json(str(path), report)
  except files.FAILURES as error:
    raise UserError(f"--json={path} cannot be written ({summary(error)}).") from error


def table_line(label: object, label_width: int, cells: Iterable[object], cell_width: int) -> str:
  """A line of a table: its label on the left, its cells in columns aligned to the right."""
  return f"{label!s:<{label_width}}" + "".join(f"{cell!s:>{cell_width}}" for cell in cells)
