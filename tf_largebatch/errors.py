"""The exceptions that are told in one line: a user's mistake, and a run that was interrupted."""

import re

# Exit statuses of the binary. Those from 128 on, as for processes that a signal ended, mean that
# the same command, run again, goes on; 138 is what Kubeflow's operators leave to the program.
NEEDS_THE_USER = 1
LOST_TASK = 138  # Or data that were out of reach for a moment.

_LONGEST_MESSAGE = 2000


class UserError(ValueError):
  """A mistake of the user's, told in one line.

  The message says what is wrong, what was given and what would do. The binary
  prints it without a traceback and exits with a status other than 0; programs
  that import the package see an ordinary `ValueError`.
  """

  status = NEEDS_THE_USER

  def __init__(self, message: str):
    super().__init__(one_line(message))


class InterruptedRunError(RuntimeError):
  """A run that ended before its time and goes on when the same command is run again.

  Attributes:
    status: the process' exit status: 128 + the signal that asked for it, or `LOST_TASK`.
  """

  def __init__(self, message: str, status: int):
    super().__init__(one_line(message))
    self.status = status


def first_line(error: Exception) -> str:
  """The first line of what an exception says, or its name where it says nothing.

  TensorFlow's names for the op that failed are left out.
  """
  lines = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error)).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def one_line(text: str) -> str:
  """The text as one line: what cannot be printed is escaped, and a long text loses its middle.

  Messages quote what was given, which may hold anything and be of any length; what is wrong with it
  and what would do stand before and behind it.
  """
  if len(text) > _LONGEST_MESSAGE:
    half = _LONGEST_MESSAGE // 2
    text = f"{text[:half]} … {text[-half:]}"
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
