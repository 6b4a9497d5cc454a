"""Writes files completely or not at all, without TensorFlow, unlike `tf_largebatch.files`.

`tools.study` forks, which is unsafe once TensorFlow has started threads, and `tools.replication`
has no other use for it.
"""

import contextlib
import io
import os
from collections.abc import Callable

from tf_largebatch.errors import UserError, summary


def to_png(figure) -> bytes:
  """Returns the PNG of a figure of matplotlib."""
  image = io.BytesIO()
  figure.savefig(image, format="png")
  return image.getvalue()


def require_markdown(path: str):
  """Raises a UserError if a report's name does not end in .md."""
  if not path.endswith(".md"):
    raise UserError(f"--output={path} is refused; give a file name that ends in .md.")


def write_report(path: str, images: dict[str, bytes], to_markdown: Callable[[dict], str]):
  """Writes a report, and its pictures into a folder beside it.

  Args:
    path: of the report; ends in .md.
    images: PNGs by name.
    to_markdown: returns the report, given the pictures' paths, relative to it, by name.

  Raises:
    UserError: a file cannot be written.
  """
  folder = path.removesuffix(".md")
  links = {name: f"{os.path.basename(folder)}/{name}.png" for name in images}
  contents = {os.path.join(folder, f"{name}.png"): png for name, png in images.items()}
  # The report comes last, when the pictures that it shows exist.
  write_all(f"--output={path}", {**contents, path: to_markdown(links).encode()})


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
