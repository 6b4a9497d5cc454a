"""The one kind of exception that stands for a user's mistake."""


class UserError(ValueError):
  """A mistake of the user's, told in one line.

  The message says what is wrong, what was given and what would do. The binary
  prints it without a traceback and exits with a status other than 0; programs
  that import the package see an ordinary `ValueError`.
  """
