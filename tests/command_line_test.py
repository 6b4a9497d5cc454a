"""Flags: one for each field, their texts, and flagfiles that repeat the settings."""

import dataclasses
import pathlib
import tempfile

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

from tf_largebatch import command_line, fields
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import NETWORKS, Recipe


def parse(*arguments):
  """The parsed flags, and the arguments that are not flags; absl's global flags stay untouched."""
  values = flags.FlagValues()
  command_line.define_flags(values)
  _, *left = command_line.parse_flags(["train", *arguments], values)
  return values, left


def settings_of(*arguments):
  values, left = parse(*arguments)
  assert not left
  return command_line.recipe_from_flags(values), command_line.options_from_flags(values)


def refusal(*arguments):
  with pytest.raises(UserError) as error:
    settings_of(*arguments)
  message = str(error.value)
  assert message.isprintable()
  return message


def test_every_field_is_a_flag_with_its_default():
  declared = [*dataclasses.fields(Recipe), *dataclasses.fields(RunOptions)]
  values, _ = parse()
  assert set(values) == {field.name for field in declared}
  for field in declared:
    assert values[field.name].default == field.default
    assert field.metadata["help"] in values[field.name].help
    for choice in field.metadata["choices"] or ():
      assert choice in values[field.name].help
  assert settings_of() == (Recipe(), RunOptions())


def test_flags_set_fields():
  recipe, options = settings_of(
    *("--workers=8", "--decay_epochs=1,2.5", "--epochs=3", "--warmup_epochs=1", "--nonesterov"),
    *("--work_dir=runs/a b", "--cache", "--checkpoint_every_minutes=1e1", "--workers_per_pass=2"),
  )
  expected = Recipe(workers=8, decay_epochs=(1, 2.5), epochs=3, warmup_epochs=1, nesterov=False)
  assert recipe == expected
  assert options == RunOptions(
    work_dir="runs/a b", cache=True, checkpoint_every_minutes=10.0, workers_per_pass=2
  )


@pytest.mark.parametrize(
  "text, expected",
  [("", ()), ("1", (1.0,)), ("1,2.5", (1.0, 2.5)), (" 1, 2 ,", (1.0, 2.0))],
)
def test_lists_are_separated_by_commas(text, expected):
  recipe, _ = settings_of(f"--decay_epochs={text}")
  assert recipe.decay_epochs == expected


@pytest.mark.parametrize(
  "text, expected",
  [("auto", None), ("true", True), ("True", True), ("false", False), ("FALSE", False)],
)
def test_an_optional_boolean_is_true_false_or_auto(text, expected):
  _, options = settings_of(f"--jit_compile={text}")
  assert options.jit_compile is expected


def test_auto_stands_for_none_of_every_optional_field():
  optional = [
    field.name
    for settings in (Recipe, RunOptions)
    for field in dataclasses.fields(settings)
    if fields.kind_of(field)[1]
  ]
  assert {"workers", "image_size", "channel_mean", "workers_per_pass"} <= set(optional)
  # The last value of a flag counts.
  arguments = ("--workers=3", "--workers_per_pass=2", "--jit_compile=true", "--image_size=8")
  assert settings_of(*arguments, *(f"--{name}=auto" for name in optional)) == settings_of()


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--workers=many", "'many' is not a whole number"),
    ("--workers=1.5", "'1.5' is not a whole number"),
    ("--workers=", "'' is not a whole number"),
    ("--epochs=auto", "'auto' is not a whole number"),
    ("--momentum=auto", "'auto' is not a number"),
    ("--decay_epochs=1,x", "'x' is not a number"),
    ("--channel_mean=1;2", "'1;2' is not a number"),
    ("--jit_compile=maybe", "use true, false or auto"),
    ("--nesterov=perhaps", "perhaps: use true or false"),
    ("--cache=auto", "auto"),
  ],
)
def test_text_of_another_kind_is_refused(argument, words):
  message = refusal(argument)
  assert message.startswith(f"flag {argument}: ") and words in message
  assert message.endswith("(--helpfull lists every flag).")


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--workers=0", "workers=0 is out of range; it must be at least 1 and below 2^31."),
    ("--warmup=slow", "warmup='slow' is unknown; use one of gradual, constant, none."),
    ("--communication=mpi", "communication='mpi' is unknown; use one of auto, nccl, ring."),
    ("--momentum=nan", "momentum=nan is not accepted; it must be a finite number."),
  ],
)
def test_a_value_is_refused_by_its_dataclass(argument, message):
  assert refusal(argument) == message


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--wokers=8", "Unknown command line flag 'wokers'. Did you mean: workers"),
    ("--workers", "Missing value for flag --workers"),
    ("--nojit_compile", "Unknown command line flag 'nojit_compile'"),
  ],
)
def test_an_unknown_flag_or_a_missing_value_is_refused(argument, words):
  message = refusal(argument)
  assert message.startswith(words) and message.endswith("(--helpfull lists every flag).")


def test_arguments_that_are_not_flags_are_returned():
  values, left = parse("--workers=2", "runs/1", "--epochs=9", "--", "--seed=1")
  assert left == ["runs/1", "--seed=1"]
  assert (values.workers, values.epochs, values.seed) == (2, 9, 0)


def test_a_flagfile_has_a_line_for_each_value_that_is_not_none():
  lines = command_line.to_flagfile(
    Recipe(workers=8, decay_epochs=(1, 2.5), epochs=3, warmup_epochs=1, nesterov=False),
    RunOptions(work_dir="runs/a b", jit_compile=False),
  ).splitlines()
  assert {"--workers=8", "--decay_epochs=1.0,2.5", "--nesterov=False"} <= set(lines)
  assert {"--work_dir=runs/a b", "--jit_compile=False", "--weight_decay=0.0001"} <= set(lines)
  names = [line.removeprefix("--").partition("=")[0] for line in lines]
  assert len(names) == len(set(names))
  assert not {"image_size", "validation_split", "workers_per_pass"} & set(names)


@pytest.mark.parametrize(
  "text, words",
  [
    (None, "Unable to open flagfile"),
    ("--workers=8\n--no_such_flag=1\n", "Unknown command line flag 'no_such_flag'"),
    ("--workers=x\n", "flag --workers=x: 'x' is not a whole number"),
    ("--flagfile={}\n", "circular flagfile"),
    (b"\xff\xfe", "not a file of flags"),
  ],
)
def test_a_bad_flagfile_is_refused(text, words, tmp_path):
  path = tmp_path / "bad.flags"
  if isinstance(text, bytes):
    path.write_bytes(text)
  elif text is not None:
    path.write_text(text.format(path))
  message = refusal(f"--flagfile={path}")
  assert words in message and not message.startswith("ERROR")


# A line of a flagfile is stripped, `auto` stands for None, and a ~ must stand for a known home.
_TEXTS = st.from_regex(r"[\w./~=,\-#\"' ]{0,20}", fullmatch=True).map(str.strip)
_SPECIAL = {
  # Shorter than any run, in increasing order, and finite when scaled to the minibatch.
  "warmup_epochs": st.floats(0, 1, exclude_max=True),
  "decay_epochs": st.lists(st.floats(0.001, 1e9), unique=True, max_size=4).map(sorted),
  "reference_learning_rate": st.floats(1e-9, 1e9),
  "network": st.sampled_from([*NETWORKS, "EfficientNetV2B0", "own.networks:small_2"]),
}


def values_of(field):
  """Values that the field accepts."""
  kind, optional = fields.kind_of(field)
  bounds = field.metadata["bounds"]
  low = bounds.get("at least", bounds.get("above"))
  high = bounds.get("at most", bounds.get("below"))
  numbers = st.floats(
    low,
    high,
    exclude_min="above" in bounds,
    exclude_max="below" in bounds,
    allow_nan=False,
    allow_infinity=False,
  )
  if field.name in _SPECIAL:
    values = _SPECIAL[field.name]
  elif field.metadata["choices"]:
    values = st.sampled_from(field.metadata["choices"])
  elif kind is int:
    values = st.integers(low, None if high is None else high - 1)
  elif kind is float:
    values = numbers
  elif kind is bool:
    values = st.booleans()
  elif kind is str:
    values = _TEXTS.filter(lambda text: text not in ("", "auto") and text[0] != "~")
  else:
    values = st.lists(numbers, min_size=1, max_size=4)
  return values | st.none() if optional else values


def any_settings(settings):
  return st.builds(settings, **{f.name: values_of(f) for f in dataclasses.fields(settings)})


@hypothesis.given(any_settings(Recipe), any_settings(RunOptions))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow])
def test_a_flagfile_of_any_settings_gives_equal_ones(recipe, options):
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, "flags.txt")
    path.write_text(command_line.to_flagfile(recipe, options), encoding="utf-8")
    assert settings_of(f"--flagfile={path}") == (recipe, options)
