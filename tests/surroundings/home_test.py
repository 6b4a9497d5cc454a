"""Users without a home directory, as in many containers."""

import dataclasses
import os
import pathlib
import pwd

import pytest

from tests.training import small_runs
from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions


@pytest.fixture
def no_home(monkeypatch, tmp_path):
  """HOME is not set, and the user has no entry in /etc/passwd; returns an empty directory."""

  def unknown(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")

  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(pwd, "getpwuid", unknown)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path / "here"


def test_a_directory_in_an_unknown_home_is_refused(no_home):
  with pytest.raises(UserError, match=r"^--work_dir='~/run' .*; set HOME or name a directory"):
    RunOptions(work_dir="~/run")
  with pytest.raises(UserError, match=r"^--data_dir='~/data' .*; set HOME or name a directory"):
    preparation.prepare("cifar10", "~/data")
  assert os.listdir(no_home) == []


@pytest.mark.parametrize("path", ["~", "~/run", "~nobodyelse/run"])
def test_an_empty_HOME_is_not_the_root_directory(monkeypatch, path):
  monkeypatch.setenv("HOME", "")
  with pytest.raises(UserError, match=f"^--work_dir='{path}' "):
    RunOptions(work_dir=path)


def test_a_run_needs_no_home(no_home, encoded_set):
  """Not even for the index of the records, which by default is kept there."""
  dataset, data_dir = encoded_set
  recipe = dataclasses.replace(
    small_runs.RECIPE,
    dataset=dataset,
    train_split="train",
    validation_split="test",
    epochs=1,
    warmup_epochs=0,
    decay_epochs=(),
  )
  before = {path: path.stat().st_mtime_ns for path in pathlib.Path(data_dir).rglob("*")}
  result = small_runs.train("run", recipe, data_dir=data_dir)
  assert result["status"] == "complete"
  assert os.listdir(no_home) == ["run"]
  # Nothing is written to data_dir, which may be read-only and shared.
  assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path(data_dir).rglob("*")}
