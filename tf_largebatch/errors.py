"""Errors that a program prints on one line: a user's mistake and an interrupted run."""

import re

# Exit statuses of the trainer. Those from 128 on, which a shell also reports for a process ended by
# a signal, mean that the same command continues the run. Kubeflow's operators restart a task that
# exits with 138, a status they reserve for programs.
NEEDS_THE_USER = 1
LOST_TASK = 138  # Also used when the data could not be reached for a moment.

_LONGEST_MESSAGE = 2000
_LONGEST_SUMMARY = 600


class UserError(ValueError):
  """A mistake that the user can correct, described on one line.

  The message says what is wrong, what was given and what to use instead. The trainer prints it
  without a traceback and exits with `status`; programs that import the package see an ordinary
  `ValueError`.
  """

  status = NEEDS_THE_USER

  def __init__(self, message: str):
    super().__init__(one_line(message))


class InterruptedRunError(RuntimeError):
  """A run that ended early and continues when the same command is run again.

  Attributes:
    status: exit status of the process: 128 + the signal that requested the stop, or `LOST_TASK`.
  """

  def __init__(self, message: str, status: int):
    super().__init__(one_line(message))
    self.status = status


def summary(message: object) -> str:
  """Returns a message on one short line.

  Args:
    message: an exception, whose class's name stands for an empty message, or a text of any number
      of lines. TensorFlow's names of the operations that failed are left out.
  """
  text = re.sub(r"\{\{.*?\}\}|\[\[.*|\[Op:.*", "", str(message))
  return _cut(" ".join(text.split()).rstrip(" ."), _LONGEST_SUMMARY) or type(message).__name__


def one_line(text: str) -> str:
  """Returns the text on one line: unprintable characters escaped, the middle of a long text cut.

  Messages quote what was given, which may be anything and of any length. What is wrong with it and
  what to use instead come before and after the quotation, so they survive the cut.
  """
  text = _cut(text, _LONGEST_MESSAGE)
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
