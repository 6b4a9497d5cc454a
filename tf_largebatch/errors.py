"""The exceptions that are told in one line: a user's mistake, and a run that was interrupted."""

# Exit statuses of the binary. Those from 128 on, as for processes that a signal ended, mean that
# the same command, run again, goes on; 138 is what Kubeflow's operators leave to the program.
NEEDS_THE_USER = 1
LOST_TASK = 138


class UserError(ValueError):
  """A mistake of the user's, told in one line.

  The message says what is wrong, what was given and what would do. The binary
  prints it without a traceback and exits with a status other than 0; programs
  that import the package see an ordinary `ValueError`.
  """

  status = NEEDS_THE_USER


class InterruptedRunError(RuntimeError):
  """A run that ended before its time and goes on when the same command is run again.

  Attributes:
    status: the process' exit status: 128 + the signal that asked for it, or `LOST_TASK`.
  """

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


def first_line(error: Exception) -> str:
  """The first line of what an exception says, or its name where it says nothing."""
  return (str(error) or type(error).__name__).splitlines()[0]
