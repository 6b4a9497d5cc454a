"""Tests of a campaign: its draws, and how it resumes; its runs are replaced by stubs."""

import contextlib
import json

import pytest

from tf_largebatch.errors import UserError
from tools.resilience import campaign
from tools.resilience.campaign import Campaign, Settings, locked
from tools.resilience.faults import KINDS, Fault

_SETTINGS = Settings(
  arguments=["--epochs=1"], tasks=[1, 2], kinds=["kill", "stop", "cut"], faults_per_run=3, seed=5
)
_OUTCOME = {"weights_sha256": "ab", "curve": [["train", 1, 6.9, 1.0]]}


class _Run:
  """Stands in for a `LaunchedRun` that ends well."""

  def __init__(self, directory, arguments):
    directory.mkdir()
    self.work_dir = directory

  def launch(self, tasks, max_restarts):
    pass

  def wait(self):
    return 0

  def kill(self):
    pass

  def outcome(self):
    return _OUTCOME


@pytest.fixture(autouse=True)
def _stubs(monkeypatch):
  monkeypatch.setattr(campaign, "harm", _harm)
  monkeypatch.setattr(campaign, "LaunchedRun", _Run)
  monkeypatch.setattr(
    campaign.harness,
    "train_undisturbed",
    lambda directory, tasks, arguments: _Run(directory, arguments),
  )


def _harm(run, tasks, kind, rng, disk):
  """Draws whether the run ended before the fault; its measurements are the draw."""
  draw = rng.random()
  return Fault(tasks, kind, step=3, seconds=draw) if draw > 0.2 else None


def test_every_kind_comes_first_before_one_comes_again():
  settings = Settings([], [1, 2, 3], list(KINDS), faults_per_run=4, seed=1)
  for index, tasks in enumerate(settings.tasks):
    expected = [kind for kind in KINDS if tasks > 1 or kind != "cut"]
    for block in range(3):
      places = range(block * len(expected), (block + 1) * len(expected))
      drawn = [settings.draw_kinds(3 * place + index) for place in places]
      assert sorted(kinds[0] for kinds in drawn) == sorted(expected)
      assert all(len(kinds) == 4 and set(kinds) <= set(expected) for kinds in drawn)


def _make_directory(path):
  path.mkdir()
  return path


def test_an_interrupted_campaign_injects_the_same_faults(tmp_path, monkeypatch):
  whole = Campaign(_make_directory(tmp_path / "whole"), _SETTINGS)
  whole.inject(14)
  assert whole.num_faults == 14 and len({run["tasks"] for run in whole.runs}) == 2

  calls = []

  def interrupt(*arguments):
    calls.append(arguments)
    if len(calls) % 4 == 0:
      raise SystemExit(143)
    return _harm(*arguments)

  directory = _make_directory(tmp_path / "interrupted")
  monkeypatch.setattr(campaign, "harm", interrupt)
  sessions = 0
  while Campaign(directory, _SETTINGS).num_faults < 14:
    with contextlib.suppress(SystemExit):
      Campaign(directory, _SETTINGS).inject(14)
    sessions += 1
  assert sessions > 3
  assert Campaign(directory, _SETTINGS).runs == whole.runs
  assert not list(directory.glob("run_*"))


def test_a_run_that_differs_is_the_last(tmp_path, monkeypatch):
  first = Campaign(tmp_path, _SETTINGS)
  first.inject(6)
  ended = len(first.runs)
  assert not first.differs
  assert {run["tasks"] for run in first.runs} == {1, 2}  # Both undisturbed outcomes are known.
  monkeypatch.setattr(_Run, "outcome", lambda self: {**_OUTCOME, "curve": []})
  first.inject(100)
  assert first.differs and len(first.runs) == ended + 1
  assert (tmp_path / f"run_{ended}").exists()
  again = Campaign(tmp_path, _SETTINGS)
  again.inject(200)
  assert again.differs and again.runs == first.runs


def test_a_directory_with_something_else_is_refused(tmp_path):
  with locked(tmp_path):
    Campaign(tmp_path, _SETTINGS)
    with pytest.raises(UserError, match="is in use by another process"), locked(tmp_path):
      pass
  other = Settings(**{**vars(_SETTINGS), "seed": 6})
  with pytest.raises(UserError, match="seed was 5 there and is 6 now"):
    Campaign(tmp_path, other)
  state = tmp_path / "state.json"
  for text in ("{", "[]", json.dumps({"settings": {}})):
    state.write_text(text)
    with pytest.raises(UserError, match="does not hold a campaign"):
      Campaign(tmp_path, _SETTINGS)
  state.rename(tmp_path / "notes.txt")
  with pytest.raises(UserError, match="holds other files"):
    Campaign(tmp_path, _SETTINGS)
