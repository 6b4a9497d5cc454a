"""Writes files completely or not at all, without TensorFlow, unlike `tf_largebatch.files`.

`tools.study` forks, which is unsafe once TensorFlow has started threads, and `tools.replication`
has no other use for it.
"""

import contextlib
import os

from tf_largebatch.errors import UserError, summary


def picture_folder(report: str) -> str:
  """Returns the folder for a report's pictures, which lies beside it.

  Raises:
    UserError: the report's name does not end in .md.
  """
  if not report.endswith(".md"):
    raise UserError(f"--output={report} is refused; give a file name that ends in .md.")
  return report.removesuffix(".md")


def write_all(flag: str, contents: dict[str, bytes]):
  """Writes files, by path; replaces none before all are written, and then in the given order.

  Args:
    flag: "--name=value" of the flag that says where to write, for the error.

  Raises:
    UserError: a file cannot be written.
  """
  partial = {path: f"{path}.partial" for path in contents}
  try:
    for path, content in contents.items():
      os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
      with open(partial[path], "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for path in contents:
      os.replace(partial[path], path)
  except OSError as error:
    raise UserError(f"{flag} cannot be written ({summary(error)}); give another.") from error
  finally:
    for path in partial.values():
      with contextlib.suppress(OSError):
        os.remove(path)
