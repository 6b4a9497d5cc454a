"""What the programs of `tools/` share: flags, one line for a user's mistake, an exit status."""

import contextlib
import sys
from collections.abc import Callable

from absl import app, flags

from tf_largebatch import foreign_settings, standard_streams
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.signals import end_process, print_line


def run(
  main: Callable[..., int | None],
  define_flags: Callable[[], None],
  takes_arguments: bool = False,
  unknown_flag_hint: str = "",
):
  """Runs a program and exits with its status, which is 1 after one line for a user's mistake.

  Args:
    main: returns the exit status, or None for 0. Called with the list of arguments that are not
      flags if the program takes any, else without arguments.
    define_flags: called first; not at a module's top, so that tests can import several programs.
    takes_arguments: if not, anything that is not a flag is refused.
    unknown_flag_hint: appended to the error message for an unknown flag.
  """
  standard_streams.open_closed_streams()
  define_flags()
  app.run(
    lambda argv: _call_or_end(main, argv[1:], takes_arguments),
    flags_parser=lambda argv: _parse_flags(argv, unknown_flag_hint),
  )


def whole_numbers(name: str, words: list[str]) -> list[int]:
  """Returns the numbers of a list-valued flag.

  Raises:
    UserError: there are none, or one is not a whole number from 1 to 10^9.
  """
  numbers = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) < 10]
  if not words or len(numbers) < len(words) or 0 in numbers:
    raise UserError(f"{name}={','.join(words)!r} is refused; it must be whole numbers, 1 to 1e9.")
  return numbers


def call(
  main: Callable[..., int | None], arguments: list[str], takes_arguments: bool = False
) -> int:
  """The exit status of `main`, called as `run` does."""
  uses_keras = "keras" in sys.modules
  try:
    with foreign_settings.keras_defaults() if uses_keras else contextlib.nullcontext():
      if takes_arguments:
        return int(main(arguments) or 0)
      if arguments:
        raise UserError(
          f"Unexpected argument {arguments[0]!r}; every option is a flag, --name=value."
        )
      return int(main() or 0)
  except UserError as error:
    print_line(f"error: {error}")
    return error.status
  except KeyboardInterrupt:
    return 130


def _call_or_end(
  main: Callable[..., int | None], arguments: list[str], takes_arguments: bool
) -> int:
  try:
    return call(main, arguments, takes_arguments)
  except InterruptedRunError as error:
    print_line(f"error: {error}")
    end_process(error.status)  # The interpreter's own exit would wait for the lost tasks.


def _parse_flags(argv: list[str], unknown_flag_hint: str) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    hint = unknown_flag_hint if isinstance(error, flags.UnrecognizedFlagError) else ""
    print_line(f"error: {error}{hint}")
    sys.exit(1)
