"""Fields of a dataclass that are also flags: help, choices and bounds stand beside the default."""

import dataclasses
import math
import types
import typing

from tf_largebatch.errors import UserError

_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}


def declare(
  default,
  help_text: str,
  *,
  choices: tuple[str, ...] | None = None,
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
  below: float | None = None,
):
  """A field with its help, the names it accepts and its bounds (of each item of a tuple)."""
  bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
  metadata = {
    "help": help_text,
    "choices": choices,
    "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
  }
  return dataclasses.field(default=default, metadata=metadata)


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
  """(type of a field's value, whether None is allowed too)."""
  if isinstance(field.type, types.UnionType):
    kind, *_ = typing.get_args(field.type)
    return kind, True
  return field.type, False


def convert_and_check(instance) -> None:
  """Converts each field of a dataclass to its type (int to float) and checks its bounds.

  Raises:
    UserError: a value has another type or is out of bounds.
  """
  for field in dataclasses.fields(instance):
    value = _converted(field, getattr(instance, field.name))
    object.__setattr__(instance, field.name, value)  # The dataclasses are frozen.
    bounds = field.metadata["bounds"]
    if value is not None and not all(
      _is_within(item, bounds) for item in (value if isinstance(value, tuple) else (value,))
    ):
      limits = " and ".join(f"{word} {_text(bound)}" for word, bound in bounds.items())
      require(instance, field.name, False, limits)


def require(instance, name: str, holds: bool, expected: str) -> None:
  """Raises UserError, which names the field, its value and what is expected, unless `holds`."""
  if not holds:
    raise UserError(f"{name}={getattr(instance, name)} is out of range; it must be {expected}.")


def _converted(field: dataclasses.Field, value):
  kind, optional = kind_of(field)
  if value is None and optional:
    return None
  choices = field.metadata["choices"]
  if choices and value not in choices:
    raise UserError(f"{field.name}={value!r} is unknown; use one of {', '.join(choices)}.")
  if typing.get_origin(kind) is tuple and isinstance(value, tuple | list):
    if all(_is_finite_number(item) for item in value):
      return tuple(float(item) for item in value)
  elif kind is float and _is_finite_number(value):
    return float(value)
  elif type(value) is kind and kind is not float:
    return value
  expected = _KINDS.get(kind, "a list of finite numbers")
  raise UserError(f"{field.name}={value!r} is not accepted; it must be {expected}.")


def _is_finite_number(value) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _is_within(value, bounds: dict[str, float]) -> bool:
  holds = {
    "at least": lambda bound: value >= bound,
    "above": lambda bound: value > bound,
    "at most": lambda bound: value <= bound,
    "below": lambda bound: value < bound,
  }
  return all(holds[word](bound) for word, bound in bounds.items())


def _text(bound: float) -> str:
  power = int(bound).bit_length() - 1
  return f"2^{power}" if bound == 2**power and power >= 16 else f"{bound:g}"
