"""Fields: conversion to their types, choices, bounds and the errors for each."""

import dataclasses
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from tf_largebatch import fields
from tf_largebatch.errors import UserError
from tf_largebatch.fields import declare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  count: int = declare(1, "A whole number.", at_least=1, below=2**31)
  side: int | None = declare(None, "An optional whole number.", above=1, at_most=2**15)
  share: float = declare(0.5, "A number.", at_least=0, below=1)
  rate: float = declare(0.1, "A positive number.", above=0)
  levels: tuple[float, ...] = declare((), "Numbers.", at_least=0, at_most=255.5)
  means: tuple[float, ...] | None = declare(None, "Optional numbers.")
  mode: str = declare("fast", "A choice.", choices=("fast", "exact"))
  style: str | None = declare(None, "An optional choice.", choices=("round", "square"))
  name: str = declare("", "Text.")
  cache: bool = declare(False, "Yes or no.")
  compiled: bool | None = declare(None, "Yes, no or undecided.")

  def __post_init__(self):
    fields.convert_and_check(self)


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def refusal(name, value):
  with pytest.raises(UserError) as error:
    Settings(**{name: value})
  return str(error.value)


def test_the_defaults_are_accepted():
  values = dataclasses.asdict(Settings())
  assert values == {name: field.default for name, field in FIELDS.items()}


def test_kind_of_names_the_type_and_whether_none_is_allowed():
  kinds = {name: fields.kind_of(field) for name, field in FIELDS.items()}
  assert kinds == {
    "count": (int, False),
    "side": (int, True),
    "share": (float, False),
    "rate": (float, False),
    "levels": (tuple[float, ...], False),
    "means": (tuple[float, ...], True),
    "mode": (str, False),
    "style": (str, True),
    "name": (str, False),
    "cache": (bool, False),
    "compiled": (bool, True),
  }


@pytest.mark.parametrize(
  "name, value, converted",
  [
    ("share", 0, 0.0),
    ("rate", 3, 3.0),
    ("levels", [1, 2.5], (1.0, 2.5)),
    ("means", (1, 2), (1.0, 2.0)),
    ("means", [], ()),
  ],
)
def test_numbers_become_floats_and_lists_become_tuples(name, value, converted):
  found = getattr(Settings(**{name: value}), name)
  assert found == converted and type(found) is type(converted)
  if isinstance(found, tuple):
    assert all(type(item) is float for item in found)


@pytest.mark.parametrize(
  "name, value",
  [
    *[("count", 1), ("count", 2**31 - 1), ("side", 2), ("side", 2**15), ("share", 0.0)],
    *[("share", math.nextafter(1, 0)), ("rate", 5e-324), ("levels", (0.0, 255.5))],
  ],
)
def test_inclusive_bounds_and_the_values_next_to_exclusive_ones_are_accepted(name, value):
  assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(
  "name, value, limits",
  [
    ("count", 0, "at least 1 and below 2^31"),
    ("count", 2**31, "at least 1 and below 2^31"),
    ("side", 1, "above 1 and at most 32768"),
    ("side", 2**15 + 1, "above 1 and at most 32768"),
    ("share", -0.1, "at least 0 and below 1"),
    ("share", 1.0, "at least 0 and below 1"),
    ("rate", 0.0, "above 0"),
    ("levels", (1.0, -1.0), "at least 0 and at most 255.5"),
    ("levels", (256.0, 1.0), "at least 0 and at most 255.5"),
  ],
)
def test_a_value_out_of_bounds_is_refused_with_the_bounds(name, value, limits):
  assert refusal(name, value) == f"{name}={value} is out of range; it must be {limits}."


@pytest.mark.parametrize("bound, text", [(2**16, "2^16"), (2**16 + 1, "65537"), (2**15, "32768")])
def test_large_powers_of_two_are_written_as_powers(bound, text):
  @dataclasses.dataclass
  class Limited:
    count: int = declare(1, "A whole number.", below=bound)

  with pytest.raises(UserError) as error:
    fields.convert_and_check(Limited(bound))
  assert str(error.value) == f"count={bound} is out of range; it must be below {text}."


@pytest.mark.parametrize(
  "name, value, expected",
  [
    *[("count", value, "a whole number") for value in (1.0, "1", True, None, (1,))],
    *[("side", value, "a whole number") for value in (2.0, False)],
    *[("rate", value, "a finite number") for value in ("1", True, None, math.nan, math.inf, 1j)],
    *[("cache", value, "True or False") for value in (0, "true", None)],
    *[("compiled", value, "True or False") for value in (1, "auto")],
    *[("name", value, "text") for value in (1, None, b"name")],
    *[("levels", value, "a list of finite numbers") for value in (1.0, "1", None, {1.0})],
    *[("levels", (1.0, bad), "a list of finite numbers") for bad in ("2", True, math.nan)],
  ],
)
def test_a_value_of_another_type_is_refused(name, value, expected):
  assert refusal(name, value) == f"{name}={value!r} is not accepted; it must be {expected}."


@pytest.mark.parametrize(
  "name, value, choices",
  [
    *[("mode", value, "fast, exact") for value in ("slow", "", "FAST", None, 1, ["fast"])],
    ("style", "oval", "round, square"),
  ],
)
def test_an_unknown_choice_is_refused_with_the_choices(name, value, choices):
  assert refusal(name, value) == f"{name}={value!r} is unknown; use one of {choices}."


def test_require_names_the_field_and_its_value():
  settings = Settings(count=7)
  fields.require(settings, "count", True, "even")
  with pytest.raises(UserError, match=r"^count=7 is out of range; it must be even\.$"):
    fields.require(settings, "count", False, "even")


_VALUES = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.sampled_from(["fast", "exact", "round"])
  | st.lists(st.integers(-5, 300) | st.floats(-5, 300) | st.text(max_size=2), max_size=3)
)


@hypothesis.given(st.sampled_from(sorted(FIELDS)), _VALUES)
def test_any_value_gets_the_fields_type_or_is_refused_by_name(name, value):
  try:
    found = getattr(Settings(**{name: value}), name)
  except UserError as error:
    assert str(error).startswith(f"{name}=")
    return
  kind, optional = fields.kind_of(FIELDS[name])
  assert found == (tuple(value) if isinstance(value, list) else value)
  assert (found is None and optional) or type(found) is (getattr(kind, "__origin__", None) or kind)
