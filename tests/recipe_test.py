"""`Recipe`: the paper's defaults, derived values, and values that are refused."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

import tf_largebatch
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe, scaled_learning_rate
from tools.conformance.properties.defaults import PAPER


def test_the_defaults_are_the_papers():
  assert dataclasses.asdict(Recipe()) == {
    "dataset": "imagenet2012",
    "train_split": "train",
    "validation_split": None,
    "image_size": None,
    "augmentation": None,
    "channel_mean": None,
    "channel_std": None,
    "dtype": "float32",
    "evaluation_dtype": "weights",
    "workers": None,
    "decay_power": 2.0,
    "trust_coefficient": 0.001,
    **PAPER,
    "seed": 0,
  }


@pytest.mark.parametrize(
  "changes, kn, peak, steps_per_epoch, total_steps",
  [
    ({"workers": 8}, 256, 0.1, 5004, 450360),
    ({"workers": 256}, 8192, 3.2, 156, 14040),
    ({"workers": 2}, 64, 0.025, 20018, 1801620),
    ({"workers": 256, "learning_rate_scaling": "sqrt"}, 8192, 0.5656854249492381, 156, 14040),
    ({"workers": 256, "learning_rate_scaling": "none"}, 8192, 0.1, 156, 14040),
    (
      {
        "workers": 6,
        "per_worker_batch_size": 4,
        "epochs": 10,
        "reference_learning_rate": 0.05,
        "reference_batch_size": 16,
      },
      24, 0.075, 53381, 533810,
    ),
  ],
)  # fmt: skip
def test_derived_values_on_imagenet(changes, kn, peak, steps_per_epoch, total_steps):
  recipe = Recipe(**changes)
  assert recipe.global_batch_size == kn
  assert math.isclose(recipe.peak_learning_rate, peak, rel_tol=1e-14)
  assert recipe.steps_per_epoch(1281167) == steps_per_epoch
  assert recipe.total_steps(1281167) == total_steps


def test_an_epoch_is_at_least_one_step():
  recipe = Recipe(workers=4, per_worker_batch_size=8, dataset="mnist")
  assert recipe.steps_per_epoch(32) == recipe.steps_per_epoch(63) == 1
  with pytest.raises(UserError) as error:
    recipe.steps_per_epoch(31)
  message = str(error.value)
  assert "\n" not in message
  for part in ("workers=4", "per_worker_batch_size=8", "32 images", "31 of mnist train"):
    assert part in message


def test_derived_values_need_workers():
  with pytest.raises(ValueError, match="workers"):
    _ = Recipe().global_batch_size


@pytest.mark.parametrize(
  "name, value",
  [
    *[("augmentation", "crop"), ("dtype", "float8"), ("warmup", "slow")],
    *[("network", "resnet51"), ("learning_rate_scaling", "cubic")],
    *[(name, 0) for name in ("workers", "image_size", "per_worker_batch_size", "epochs")],
    ("reference_batch_size", -256),
    *[("reference_learning_rate", 0.0), ("batch_norm_epsilon", 0.0), ("decay_factor", -0.1)],
    *[(name, 1.0) for name in ("momentum", "batch_norm_momentum", "label_smoothing")],
    *[(name, -0.1) for name in ("momentum", "batch_norm_momentum", "label_smoothing")],
    *[("weight_decay", -1e-4), ("seed", -1), ("seed", 2**31)],
    *[("warmup_epochs", -1.0), ("warmup_epochs", 90.0)],
    *[("decay_epochs", (0.0, 30.0)), ("decay_epochs", (30.0, 30.0))],
    *[("decay_epochs", (60.0, 30.0)), ("decay_epochs", (math.nan,))],
    ("channel_std", (1.0, 0.0, 1.0)),
    *[("last_gamma", math.nan), ("weight_decay", math.inf), ("reference_learning_rate", math.inf)],
  ],
)
def test_a_bad_value_is_named_with_its_field_in_one_line(name, value):
  with pytest.raises(UserError) as error:
    Recipe(**{name: value})
  message = str(error.value)
  assert message.startswith((f"{name}={value} is ", f"{name}={value!r} is "))
  assert "\n" not in message


@pytest.mark.parametrize(
  "name, value",
  [
    *[("momentum", 0.0), ("batch_norm_momentum", 0.0), ("label_smoothing", 0.0)],
    *[("weight_decay", 0.0), ("warmup_epochs", 0.0), ("warmup_epochs", 89.9)],
    *[("seed", 2**31 - 1), ("workers", 1), ("image_size", 1), ("epochs", 6)],
    *[("decay_epochs", ()), ("decay_epochs", (1e-3, 30.0)), ("last_gamma", -1.0)],
    *[("augmentation", choice) for choice in ("area_crop", "pad_crop", "none")],
    *[("dtype", choice) for choice in ("float32", "bfloat16", "float64")],
  ],
)
def test_values_within_the_bounds_are_accepted(name, value):
  assert getattr(Recipe(**{name: value}), name) == value


def test_scaled_learning_rate_refuses_an_unknown_scaling():
  with pytest.raises(UserError, match="learning_rate_scaling='cubic'"):
    scaled_learning_rate(0.1, 512, 256, "cubic")


def test_to_dict_goes_through_json_and_back():
  recipe = Recipe(
    workers=3, channel_mean=[1, 2, 3], channel_std=(4, 5, 6), decay_epochs=[10, 20], nesterov=False
  )
  values = recipe.to_dict()
  assert values["channel_mean"] == [1.0, 2.0, 3.0]
  assert values["decay_epochs"] == [10.0, 20.0]
  assert values.keys() == {field.name for field in dataclasses.fields(Recipe)}
  restored = json.loads(json.dumps(values, allow_nan=False))
  assert restored == values
  assert Recipe(**restored) == recipe
  assert hash(Recipe(**restored)) == hash(recipe)
  assert Recipe(**{**restored, "seed": 1}) != recipe


def test_a_recipe_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Recipe().seed = 1


def test_the_recipe_imports_only_the_standard_library():
  code = """
import sys
import tf_largebatch.recipe
print(sorted({"tensorflow", "keras", "numpy"} & set(sys.modules)))
"""
  package = pathlib.Path(tf_largebatch.__file__).parent
  result = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONPATH": str(package.parent)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout == "[]\n"
