"""Clocks that jump during a run, and clocks that were never set."""

import random
import time

import pytest

from tests.training.small_runs import RECIPE, STEPS, train
from tf_largebatch.errors import UserError
from tf_largebatch.training import environment
from tf_largebatch.training.metrics import read_metrics


def test_a_clock_that_jumps_during_a_run(tmp_path, monkeypatch, undisturbed_sha256):
  """Hours back and forth at each look, but all durations are true, and nothing else changes."""
  now, rng = time.time, random.Random(0)
  monkeypatch.setattr(time, "time", lambda: now() + rng.uniform(-40_000, 40_000))
  began = time.monotonic()
  result = train(tmp_path, checkpoint_every_minutes=60)
  took = time.monotonic() - began
  assert result["weights_sha256"] == undisturbed_sha256
  assert 0 < result["seconds"] < took
  assert STEPS * RECIPE.global_batch_size / took < result["images_per_second"]
  rates = [r["images_per_second"] for r in read_metrics(str(tmp_path)) if r["kind"] == "train"]
  assert min(rates) > 0
  assert len(list((tmp_path / "checkpoints").glob("*.json"))) == RECIPE.epochs


@pytest.mark.parametrize("year", [1970, 2108])
def test_a_clock_that_is_not_set_is_named_before_training(tmp_path, monkeypatch, year):
  """ZIP files, which model.keras is one of, hold dates from 1980 to 2107."""
  date = time.struct_time((year, 1, 2, 0, 0, 0, 0, 2, 0))
  monkeypatch.setattr(environment.time, "localtime", lambda *seconds: date)
  with pytest.raises(UserError, match=r"clock says .* set the clock"):
    train(tmp_path / "run")
  assert not (tmp_path / "run").exists()
