"""Standard input, output and error: opened if they are closed, and without libraries' noise."""

import contextlib
import logging
import os
import re
import subprocess
import sys


def open_closed_streams() -> None:
  """Opens /dev/null in place of each standard stream that is closed, as after `2>&-`.

  Otherwise the next file that is opened, a checkpoint for example, would take the number of the
  closed stream and receive what libraries print. Call it before anything opens a file.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:
      null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # The lowest free.
      if null != number:
        os.dup2(null, number)
        os.close(null)
      os.set_inheritable(number, True)
    if getattr(sys, name) is None:
      setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def without_lines(pattern: str):
  """Drops the lines on standard error that match inside the context, from C++ code too.

  A process of its own reads the lines, so that nothing is lost if this process crashes. Without the
  program `grep` nothing is dropped.

  Args:
    pattern: an extended regular expression (POSIX).
  """
  sys.stderr.flush()
  command = ["grep", "--line-buffered", "--text", "-vE", pattern]
  try:
    # In its own session, so that Ctrl-C does not end it before this process.
    filtering = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=2, stderr=subprocess.DEVNULL, start_new_session=True
    )
  except OSError:
    yield
    return
  before = os.dup(2)
  os.dup2(filtering.stdin.fileno(), 2)
  filtering.stdin.close()
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(before, 2)
    os.close(before)
    with contextlib.suppress(subprocess.TimeoutExpired):
      filtering.wait(5.0)  # A process that was started inside may still hold its input open.


def drop_library_logs(handler: logging.Handler) -> None:
  """Makes a handler drop what TensorFlow and TensorFlow Datasets log below the level WARNING."""
  handler.addFilter(
    lambda record: (
      record.levelno >= logging.WARNING
      or not re.search(r"/tensorflow(_datasets)?/", record.pathname)
    )
  )
