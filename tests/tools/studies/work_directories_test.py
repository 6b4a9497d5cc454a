"""Damaged work directories."""

import pytest

from tests.tools.studies.made_up_runs import make_run
from tf_largebatch.errors import UserError
from tools import compare_runs


def _without_recipe(root):
  (root / "base" / "recipe.json").unlink()
  return "has no recipe.json; give the --work_dir of a run"


def _with_torn_recipe(root):
  path = root / "base" / "recipe.json"
  path.write_text(path.read_text()[:40])
  return "recipe.json is not the recipe of a run (Unterminated string"


def _with_empty_recipe(root):
  (root / "base" / "recipe.json").write_text('{"recipe": {"warmup": "none"}}')
  return "recipe.json is not the recipe of a run (workers is not chosen yet"


def _with_foreign_recipe(root):
  (root / "base" / "recipe.json").write_text('{"recipe": {"depth": 3}}')
  return "unexpected keyword argument 'depth'"


def _with_torn_result(root):
  (root / "base" / "result.json").write_text("[]")
  return "result.json is not the result of a run"


def _without_metrics(root):
  (root / "base" / "metrics.jsonl").unlink()
  return "has no metrics.jsonl"


def _with_metrics_that_are_not_text(root):
  (root / "base" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
  return "metrics.jsonl cannot be read"


def _with_a_damaged_line(root):
  path = root / "base" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
  return "metrics.jsonl is damaged in line 2 of 3"


def _with_nan(root):
  path = root / "base" / "metrics.jsonl"
  path.write_text(path.read_text().replace('"error": 0.5}', '"error": NaN}'))
  return "metrics.jsonl line 3: error is nan, not a finite number"


def _with_an_epoch_that_is_text(root):
  path = root / "base" / "metrics.jsonl"
  path.write_text(path.read_text().replace('"epoch": 1,', '"epoch": "1",'))
  return "metrics.jsonl is damaged in line 3 of 3"


def _before_the_first_evaluation(root):
  (root / "base" / "result.json").unlink()
  path = root / "base" / "metrics.jsonl"
  path.write_text(path.read_text().splitlines()[0] + "\n")
  return "base has no evaluation yet; wait for its first epoch to end, or leave"


@pytest.mark.parametrize(
  "damage",
  [
    _without_recipe,
    _with_torn_recipe,
    _with_empty_recipe,
    _with_foreign_recipe,
    _with_torn_result,
    _without_metrics,
    _with_metrics_that_are_not_text,
    _with_a_damaged_line,
    _with_nan,
    _with_an_epoch_that_is_text,
    _before_the_first_evaluation,
  ],
)
def test_damaged_runs_are_refused_in_one_line(tmp_path, damage):
  base = make_run(tmp_path, "base", [0.5])
  message = damage(tmp_path)
  with pytest.raises(UserError) as refused:
    compare_runs.compare_runs([base], str(tmp_path / "out"), 0.01, None)
  assert message in str(refused.value)
  assert str(tmp_path / "base") in str(refused.value)
  assert "\n" not in str(refused.value)
  assert not (tmp_path / "out").exists()
