"""`RunOptions`: valid defaults, and directories that can exist."""

import dataclasses
import os

import pytest

from tf_largebatch import fields
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe

PATHS = ("work_dir", "data_dir", "index_dir")


def test_the_defaults_are_valid_and_unchanged():
  options = RunOptions()
  for field in dataclasses.fields(RunOptions):
    expected = os.path.expanduser(field.default) if field.name in PATHS else field.default
    assert getattr(options, field.name) == expected


def test_every_option_has_a_help_and_a_name_that_no_recipe_field_has():
  for field in dataclasses.fields(RunOptions):
    assert len(field.metadata["help"]) > 15
  names = {field.name for field in dataclasses.fields(RunOptions)}
  assert not names & {field.name for field in dataclasses.fields(Recipe)}


def test_optional_fields_are_none_by_default():
  """A flagfile leaves out None, so no other default may stand for it."""
  for settings in (Recipe, RunOptions):
    for field in dataclasses.fields(settings):
      assert fields.kind_of(field)[1] == (field.default is None)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
  "given, expanded",
  [
    *[("~", "/elsewhere"), ("~/runs/1", "/elsewhere/runs/1")],
    *[("runs/~", "runs/~"), ("a~b", "a~b"), ("gs://bucket/~", "gs://bucket/~")],
  ],
)
def test_only_a_leading_tilde_is_expanded(name, given, expanded, monkeypatch):
  monkeypatch.setenv("HOME", "/elsewhere")
  assert getattr(RunOptions(**{name: given}), name) == expanded


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("path", ["a\0b", "a\nb", "a\udcff", "x" * 3001])
def test_a_path_that_no_directory_can_have_is_refused(name, path):
  with pytest.raises(UserError) as error:
    RunOptions(**{name: path})
  message = str(error.value)
  assert message.startswith(f"--{name}='") and message.isprintable()
  assert message.endswith(
    "cannot be a directory's name; give 1 to 3000 characters of UTF-8 without control characters."
  )


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("path", ["ü", "a b", "-", "x" * 3000])
def test_an_unusual_path_is_accepted(name, path):
  assert getattr(RunOptions(**{name: path}), name) == path


def test_only_the_work_dir_may_be_empty():
  """A run requires it, but a program that only reads the data does not."""
  assert RunOptions(work_dir="").work_dir == ""
  for name in ("data_dir", "index_dir"):
    with pytest.raises(UserError, match=f"^--{name}='' cannot be a directory's name"):
      RunOptions(**{name: ""})


@pytest.mark.parametrize(
  "name, value",
  [
    *[("log_every_steps", 0), ("evaluation_batch_size", 0), ("evaluation_batch_size", 2**31)],
    *[("checkpoint_every_steps", -1), ("checkpoint_every_minutes", -0.5)],
    *[("cluster_timeout_minutes", 0.05), ("workers_per_pass", 0), ("bytes_per_pack", -1)],
  ],
)
def test_a_value_out_of_range_is_refused(name, value):
  with pytest.raises(UserError, match=f"^{name}={value} is out of range; it must be at least "):
    RunOptions(**{name: value})


def test_options_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    RunOptions().cache = True
