"""Results that are found, and those that are refused."""

import dataclasses
import json

import pytest

from tests.tools.studies.made_up_studies import make_study
from tf_largebatch.errors import UserError
from tools.studies import run_files
from tools.studies.plan import read_study


@pytest.mark.parametrize("field, value", [("workers", 7), ("epochs", 1)])
def test_a_result_of_another_recipe_is_refused(tmp_path, field, value):
  (run,) = read_study(make_study(tmp_path, "seeds = 1"))
  path = tmp_path / "results" / "tiny" / f"{run.name}.json"
  path.parent.mkdir(parents=True)
  recipe = run.recipe.to_dict() | {"workers": 1}  # The cluster chooses k, which is not given.
  # k may have any value if the flagfile leaves it to the cluster; other fields may not differ.
  path.write_text(json.dumps({"recipe": recipe | {field: value}}))
  if field == "workers":
    assert run_files.find_result(run, tmp_path / "results")["recipe"]["workers"] == value
    return
  with pytest.raises(UserError, match=r"small_seed0.json has another recipe than small has now"):
    run_files.find_result(run, tmp_path / "results")


def test_a_name_is_not_a_pattern(tmp_path):
  (run,) = read_study(make_study(tmp_path, "seeds = 1"))
  run = dataclasses.replace(run, group="tiny [a]")
  path = tmp_path / "results" / "tiny" / "tiny [a]_seed0.json"
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps({"recipe": run.recipe.to_dict()}))
  assert run_files.find_result(run, tmp_path / "results")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}', '{"recipe": {"wrong": 1}}'])
def test_a_damaged_result_is_refused(tmp_path, text):
  (run,) = read_study(make_study(tmp_path, "seeds = 1"))
  path = tmp_path / "results" / "tiny" / f"{run.name}.json"
  path.parent.mkdir(parents=True)
  path.write_text(text)
  message = "has another recipe" if text == '{"recipe": {}}' else "is not the result of a run"
  with pytest.raises(UserError, match=message):
    run_files.find_result(run, tmp_path / "results")
