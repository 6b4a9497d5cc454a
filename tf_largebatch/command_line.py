"""The flags of a run: every field of `Recipe` and of `RunOptions` is a flag of the same name."""

import contextlib
import dataclasses
import io
import typing

from absl import flags

from tf_largebatch import fields
from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe

_Settings = typing.TypeVar("_Settings", Recipe, RunOptions)
_AUTO = "auto"  # Stands for None.
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class _Parser(flags.ArgumentParser):
  """Converts a flag's text to a field's type; the dataclass checks the value itself."""

  def __init__(self, field: dataclasses.Field):
    super().__init__()
    self._kind, self._optional = fields.kind_of(field)

  def parse(self, argument):
    if not isinstance(argument, str):
      return argument
    if self._optional and argument == _AUTO:
      return None
    if self._kind is str:
      return argument
    if self._kind is bool:
      if argument.lower() in _BOOLEANS:
        return _BOOLEANS[argument.lower()]
      raise ValueError("use true, false or auto" if self._optional else "use true or false")
    if self._kind in (int, float):
      return _number(self._kind, argument)
    # What is left are lists of numbers.
    return tuple(_number(float, item) for item in argument.split(",") if item.strip())


def _number(kind: type, text: str):
  try:
    return kind(text)
  except ValueError as error:
    expected = "a whole number" if kind is int else "a number"
    raise ValueError(f"{text!r} is not {expected}") from error


class _Serializer(flags.ArgumentSerializer):
  """The inverse of `_Parser`."""

  def serialize(self, value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines a flag for each field of `Recipe` and `RunOptions`."""
  for settings in (Recipe, RunOptions):
    for field in dataclasses.fields(settings):
      choices = field.metadata["choices"]
      text = field.metadata["help"]
      if field.type is bool:
        flag = flags.BooleanFlag(field.name, field.default, text)
        flag.parser = _Parser(field)  # absl's own message prints a tuple.
        flags.DEFINE_flag(flag, values)
      else:
        text = f"<{'|'.join(choices)}>: {text}" if choices else text
        flags.DEFINE(_Parser(field), field.name, field.default, text, values, _Serializer())


def recipe_from_flags(values: flags.FlagValues = flags.FLAGS) -> Recipe:
  """The recipe that the flags describe.

  Raises:
    UserError: a value is out of range.
  """
  return _from_flags(Recipe, values)


def options_from_flags(values: flags.FlagValues = flags.FLAGS) -> RunOptions:
  """The run options that the flags describe.

  Raises:
    UserError: a value is out of range.
  """
  return _from_flags(RunOptions, values)


def _from_flags(settings: type[_Settings], values: flags.FlagValues) -> _Settings:
  names = [field.name for field in dataclasses.fields(settings)]
  return settings(**{name: values[name].value for name in names})


def to_flagfile(*settings: Recipe | RunOptions) -> str:
  """A flagfile that repeats the settings: one flag per line for every value that is not None."""
  return "".join(
    f"--{field.name}={_Serializer().serialize(value)}\n"
    for each in settings
    for field in dataclasses.fields(each)
    if (value := getattr(each, field.name)) is not None
  )


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses flags and flagfiles, and returns the arguments that are neither.

  Raises:
    UserError: a flag is unknown or has a bad value; a flagfile cannot be read or includes itself.
  """
  flagfiles = " ".join(word for word in argv if "flagfile" in word)
  warnings = io.StringIO()
  try:
    with contextlib.redirect_stderr(warnings):
      left = values(argv)
  except flags.Error as error:
    message = str(error).removeprefix("ERROR:: ")
    raise UserError(f"{message} (--helpfull lists every flag).") from error
  except ValueError as error:  # Only for a flagfile: bad values raise flags.Error.
    raise UserError(f"{flagfiles}: not a file of flags ({summary(error)}).") from error
  if warnings.getvalue():  # absl only warns about a flagfile that includes itself.
    raise UserError(warnings.getvalue().strip())
  return left
