"""Networks that are not the paper's: of `keras.applications`, and of a user's module."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from tests.training.small_runs import RECIPE, STEPS, interrupting, train
from tf_largebatch.errors import UserError
from tf_largebatch.models.networks import build_model
from tf_largebatch.recipe import Recipe
from tf_largebatch.training.metrics import MetricsWriter

HERE = "tests.models.other_networks_test"
OWN = dataclasses.replace(RECIPE, network=f"{HERE}:own", dtype="float32", workers=4)


def own(input_shape, num_classes):
  """Batch normalisation, dropout and flips inside."""
  return keras.Sequential(
    [
      keras.Input(input_shape),
      keras.layers.RandomFlip("horizontal"),
      keras.layers.Conv2D(6, 3, strides=2, use_bias=False),
      keras.layers.BatchNormalization(),
      keras.layers.ReLU(),
      keras.layers.GlobalAveragePooling2D(),
      keras.layers.Dropout(0.3),
      keras.layers.Dense(num_classes),
    ]
  )


def regularised(input_shape, num_classes):
  head = keras.layers.Dense(num_classes, kernel_regularizer="l2")
  return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(), head])


def one_logit(input_shape, num_classes):
  return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(1)])


def no_model(input_shape, num_classes):
  return 3


def fails(input_shape, num_classes):
  raise ZeroDivisionError("too small")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("own") / "run"
  return directory, train(directory, OWN)


def test_a_run_of_a_users_network(run):
  directory, result = run
  assert result["steps"] == 3 * (70 // 40)
  model = keras.models.load_model(directory / "model.keras")  # Of Keras' own layers.
  assert {type(layer).__module__.partition(".")[0] for layer in model._flatten_layers()} == {
    "keras"
  }
  kept = json.loads((directory / "recipe.json").read_text())["recipe"]
  assert kept["network"] == f"{HERE}:own"


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, monkeypatch):
  """The states of the random seeds are in the checkpoint."""
  recipe = dataclasses.replace(OWN, workers=2)
  whole = train(tmp_path / "whole", recipe, checkpoint_every_steps=2)
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "train", interrupting("train", 4))
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path / "cut", recipe, checkpoint_every_steps=2)
  again = train(tmp_path / "cut", recipe, checkpoint_every_steps=2)
  assert again["weights_sha256"] == whole["weights_sha256"] and whole["steps"] == STEPS


def test_workers_with_random_numbers_take_a_pass_each(tmp_path):
  with pytest.raises(UserError, match=r"workers_per_pass=2 does not work with network=.*; use 1"):
    train(tmp_path / "run", OWN, workers_per_pass=2)


def test_a_network_of_keras_applications():
  recipe = Recipe(
    network="MobileNetV3Small", image_size=32, workers=1, per_worker_batch_size=2, seed=3,
    channel_mean=(120.0, 110.0, 100.0), channel_std=(60.0, 50.0, 40.0), dtype="bfloat16",
  )  # fmt: skip
  models = [build_model(recipe, 7, purpose) for purpose in ("training", "evaluation", "export")]
  arrays = [model.get_weights() for model in models]
  for some in arrays[1:]:  # The same initial weights, in the same order.
    assert all(np.array_equal(a, b) for a, b in zip(arrays[0], some, strict=True))
  images = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype("float32")
  logits = [np.asarray(model(images, training=False)) for model in models]
  assert [str(x.dtype) for x in logits] == ["float32"] * 3 and logits[0].shape == (4, 7)
  np.testing.assert_allclose(logits[1], logits[2], atol=1e-6)
  body = keras.applications.MobileNetV3Small(
    input_shape=(32, 32, 3), classes=7, weights=None, classifier_activation=None,
    include_preprocessing=False,
  )  # fmt: skip
  body.set_weights(arrays[0])
  normalised = (images - recipe.channel_mean) / np.array(recipe.channel_std)
  np.testing.assert_allclose(body(normalised.astype("float32")), logits[1], atol=1e-6)
  other = build_model(dataclasses.replace(recipe, seed=4), 7)
  assert not np.array_equal(other.get_weights()[0], arrays[0][0])


@pytest.mark.parametrize(
  "network, message",
  [
    ("ResNet18", "network=ResNet18 is not in keras.applications: .*ResNet50V2"),
    ("nowhere:own", "network=nowhere:own: cannot be imported .*nowhere"),
    (f"{HERE}:missing", "cannot be imported .*missing"),
    (f"{HERE}:regularised", "it has regularisers.*--weight_decay"),
    (f"{HERE}:one_logit", r"its output is \(None, 1\) .* must be \(None, 5\)"),
    (f"{HERE}:no_model", "returned int, not a built keras.Model"),
    (f"{HERE}:fails", "cannot be built .*too small"),
  ],
)
def test_refuses_in_one_line(network, message):
  recipe = Recipe(
    network=network, image_size=8, workers=1, per_worker_batch_size=2,
    channel_mean=(0.0,), channel_std=(1.0,),
  )  # fmt: skip
  with pytest.raises(UserError, match=message) as caught:
    build_model(recipe, 5)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["", "resnet51", "a b:c", "module:", "../x:y"])
def test_other_names_are_refused_at_once(network):
  with pytest.raises(UserError, match=f"network='{network}' is unknown; use one of resnet8"):
    Recipe(network=network)
