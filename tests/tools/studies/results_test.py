"""Result files that are damaged or do not belong together."""

import pytest

from tests.tools.studies.made_up_results import KN, make_recipe, read, write_result
from tf_largebatch.errors import UserError


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"seconds": None}, "seconds is None"),
    ({"seed": True}, "seed is True"),
    ({"seed": 1}, "seed is 1, the recipe's 0"),
    ({"val_error_median_last_5": 90.0}, "val_error_median_last_5 is 90.0"),
    ({"val_error": float("nan")}, "val_error is nan"),
    ({"training_error": {"1": "x"}}, "training_error.1 is 'x'"),
    ({"validation_error": {"one": 0.5}}, "validation_error has an epoch 'one'"),
    ({"validation_error": None}, "validation_error is None"),
    ({"recipe": None}, "recipe is None"),
    ({"recipe": {"epoch": 3}}, "recipe is invalid ("),
    ({"status": "cut off"}, "status is 'cut off'"),
    ({"status": "diverged"}, "reason is None"),
    ({"versions": {"python": "3"}}, "versions.tensorflow is None"),
    ({"hardware": "a CPU"}, "hardware.cpu is None"),
    ({"derived": {}}, "derived.train_examples is None"),
  ],
)
def test_a_wrong_field_is_named(tmp_path, changes, message):
  path = write_result(tmp_path, make_recipe(f"{KN}16"), f"{KN}16", 0.1, **changes)
  with pytest.raises(UserError) as error:
    read(tmp_path)
  assert str(error.value).startswith(f"{path}: {message}")


def test_groups_hold_runs_of_one_recipe_each_once(tmp_path):
  stem = f"{KN}16"
  first = write_result(tmp_path, make_recipe(stem), stem, 0.1, study="a")
  again = write_result(tmp_path, make_recipe(stem), stem, 0.1, study="b")
  with pytest.raises(UserError, match=f"{first} and {again} are the same run"):
    read(tmp_path)
  again = write_result(
    tmp_path, make_recipe(stem, "none", seed=1), stem, 0.1, study="b", name=again.name
  )
  with pytest.raises(
    UserError, match=f"{first} and {again} have the same group, but their recipes differ"
  ):
    read(tmp_path)
  write_result(tmp_path, make_recipe(stem, seed=1), stem, 0.1, study="b", name=again.name)
  assert [r.run.recipe.seed for r in read(tmp_path)[stem].results] == [0, 1]
  other = write_result(tmp_path, make_recipe(f"{KN}128"), f"{KN}64", 0.1)
  with pytest.raises(UserError, match=f"{other}: kn is 128, not 4 times the baseline's"):
    read(tmp_path)
