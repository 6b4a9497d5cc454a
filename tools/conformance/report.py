"""The JSON file that --output names."""

import json
import os
import pathlib

from tf_largebatch.errors import UserError, summary


def output_path(value: str) -> pathlib.Path:
  """Returns the file's path.

  Raises:
    UserError: the file cannot be written, which is better known before anything is measured.
  """
  path = pathlib.Path(value).expanduser()
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise UserError(
      f"--output={value} cannot be written; name a file in an existing, writable directory."
    )
  return path


def write(path: pathlib.Path, report: dict | list) -> None:
  """Writes the file.

  Raises:
    UserError: it cannot be written.
  """
  from tf_largebatch import files  # Imports TensorFlow.

  try:
    files.write_text(str(path), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
  except files.FAILURES as error:
    raise UserError(
      f"--output={path} cannot be written ({summary(error)}); name another file."
    ) from error
