"""`tools.bn_statistics` on a small run, against NumPy in float64."""

import dataclasses
import json
import shutil
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.launching import run_module
from tests.training.small_runs import RECIPE, train
from tf_largebatch.data import sources
from tf_largebatch.errors import UserError
from tools import bn_statistics
from tools.studies import batch_statistics

HERE = "tests.tools.bn_statistics_test"
_N, _TRAIN, _VALIDATION = 4, 203, 206
_SMALL_RECIPE = dataclasses.replace(
  RECIPE,
  dataset="four_classes",
  train_split=f"train[:{_TRAIN}]",
  validation_split=f"validation[:{_VALIDATION}]",
  image_size=4,
  channel_mean=(120.0, 110.0, 100.0),
  channel_std=(40.0, 30.0, 50.0),
  network=f"{HERE}:two_normalizations",
  dtype="float32",
  per_worker_batch_size=_N,
  reference_batch_size=8,
  epochs=1,
  warmup_epochs=0,
  decay_epochs=(),
  seed=3,
)


class FourClasses:
  """Noise whose mean depends a little on the class."""

  SPLITS = {"train": 1000, "validation": 1000}  # noqa: RUF012
  CHANNELS = 3
  num_classes = 4
  fingerprint = None

  def __init__(self, num_examples, image_size):
    self.num_examples, self.image_shape = num_examples, (image_size, image_size, 3)
    rng = np.random.default_rng(num_examples)  # The splits differ in size, and so in their images.
    self.labels = rng.integers(0, 4, num_examples).astype(np.int32)
    means = rng.integers(60, 120, (num_examples, 1, 1, 3))
    means += 40 * (self.labels[:, None] == np.arange(3))[:, None, None]
    noise = rng.integers(0, 50, (num_examples, *self.image_shape))
    self.images = (means + noise).astype(np.uint8)

  def read(self, indices):
    return tf.gather(self.images, indices), tf.gather(self.labels, indices)


def two_normalizations(input_shape, num_classes, *further):
  return keras.Sequential(
    [
      keras.Input(input_shape),
      keras.layers.Conv2D(6, 1),
      keras.layers.BatchNormalization(),
      keras.layers.ReLU(),
      keras.layers.GlobalAveragePooling2D(),
      keras.layers.Dense(5),
      keras.layers.BatchNormalization(momentum=0.9),
      keras.layers.ReLU(),
      *further,
      keras.layers.Dense(num_classes),
    ]
  )


def with_dropout(input_shape, num_classes):
  return two_normalizations(input_shape, num_classes, keras.layers.Dropout(0.5))


def without_normalization(input_shape, num_classes):
  layers = [keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(num_classes)]
  return keras.Sequential(layers)


@pytest.fixture(scope="module", autouse=True)
def four_classes():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sources.GENERATED, "four_classes", FourClasses)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  work_dir = tmp_path_factory.mktemp("runs") / "n4"
  train(work_dir, _SMALL_RECIPE)
  return work_dir


def _measure(monkeypatch, tmp_path, *work_dirs, images=8192):
  """Calls the program and returns what it wrote."""
  path = tmp_path / "new" / "statistics.json"
  values = {"data_dir": str(tmp_path), "output": str(path), "images": images}
  flags = types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values))
  monkeypatch.setattr(bn_statistics, "flags", flags)
  bn_statistics.main([str(work_dir) for work_dir in work_dirs])
  return json.loads(path.read_text())


class Reference:
  """The network in NumPy and float64."""

  def __init__(self, work_dir):
    model = keras.models.load_model(work_dir / "model.keras")
    weights = [weight.numpy().astype(np.float64) for weight in model.weights]
    self.dense = [weights[0][0, 0], *weights[1:2], *weights[6:8], *weights[12:]]
    self.affine = weights[2:4], weights[8:10]
    self.running = [*weights[4:6], *weights[10:12]]

  def logits(self, images, given=None):
    """Returns (logits, statistics of the images); normalises by the given ones, or by these."""
    first, first_bias, second, second_bias, last, last_bias = self.dense
    x = (images - np.array(_SMALL_RECIPE.channel_mean)) / np.array(_SMALL_RECIPE.channel_std)
    x, statistics = self._normalize(0, x @ first + first_bias, given and given[:2])
    x = np.maximum(x, 0).mean((1, 2)) @ second + second_bias
    x, more = self._normalize(1, x, given and given[2:])
    return np.maximum(x, 0) @ last + last_bias, [*statistics, *more]

  def _normalize(self, layer, x, given):
    """Returns the output, and the mean and unbiased variance of the input."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = given or (x.mean(axes), x.var(axes))
    gamma, beta = self.affine[layer]
    outputs = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
    return outputs, [x.mean(axes), x.var(axes, ddof=1)]

  def errors(self, given=None, n=_N):
    """Errors on minibatches of n validation images, and images."""
    source = FourClasses(_VALIDATION, 4)
    starts = range(0, _VALIDATION // n * n, n)
    wrong = [
      np.argmax(self.logits(source.images[i : i + n], given)[0], -1) != source.labels[i : i + n]
      for i in starts
    ]
    return {
      "error": pytest.approx(np.sum(wrong) / (n * len(starts)), abs=1e-9),
      "images": n * len(starts),
    }

  def recomputed(self, minibatches):
    """The means over minibatches of training images."""
    images = FourClasses(_TRAIN, 4).images
    found = [self.logits(images[i * _N : (i + 1) * _N])[1] for i in range(minibatches)]
    return [np.mean(values, 0) for values in zip(*found, strict=True)]


# All 50 minibatches of the training split, and 9: with 6 in a pass, the last pass has 2 and 3.
@pytest.mark.parametrize("images, minibatches", [(8192, 50), (38, 9)])
def test_the_three_errors(run, tmp_path, monkeypatch, images, minibatches):
  models = []
  make_evaluation = batch_statistics.make_evaluation

  def remember(strategy, model, *arguments):
    models.append(model)
    return make_evaluation(strategy, model, *arguments)

  monkeypatch.setattr(batch_statistics, "make_evaluation", remember)
  monkeypatch.setattr(batch_statistics, "_IMAGES_PER_PASS", 6 * _N + 1)
  found = _measure(monkeypatch, tmp_path, run, images=images)["n4"]
  reference, result = Reference(run), json.loads((run / "result.json").read_text())
  recomputed = reference.recomputed(minibatches)
  expected = {
    "running": reference.errors(reference.running, _VALIDATION),
    "recomputed": {
      **reference.errors(recomputed, _VALIDATION),
      "training_images": minibatches * _N,
    },
    "minibatch": reference.errors(),
  }
  assert {kind: found[kind] for kind in expected} == expected
  assert expected["minibatch"]["images"] == 204 and expected["running"]["images"] == _VALIDATION
  assert found["running"]["error"] == pytest.approx(result["val_error"], abs=1e-9)
  assert len({found[kind]["error"] for kind in expected}) == 3
  assert found["weights_sha256"] == result["weights_sha256"]
  assert (found["workers"], found["per_worker_batch_size"], found["seed"]) == (2, _N, 3)
  variables = models[0].non_trainable_variables
  for variable, value in zip(variables, recomputed, strict=True):
    np.testing.assert_allclose(variable.numpy(), value, rtol=2e-5, atol=1e-6)


def test_results_are_merged_and_known_runs_are_not_measured_again(
  run, tmp_path, monkeypatch, capsys
):
  measured = []
  kinds = {kind: {"error": 0.25, "images": 4} for kind in ("running", "recomputed", "minibatch")}

  def measure(work_dir, recipe, result, data_dir, images):
    measured.append((work_dir, images))
    return kinds

  monkeypatch.setattr(batch_statistics, "measure", measure)
  other = tmp_path / "other"
  shutil.copytree(run, other)
  _measure(monkeypatch, tmp_path, run)
  found = _measure(monkeypatch, tmp_path, other, run)
  assert list(found) == ["n4", "other"] and found["n4"] == found["other"]
  assert measured == [(str(run), 8192), (str(other), 8192)]
  assert capsys.readouterr().out.splitlines()[-2:-1] == [
    "n4        2     4      25.00%      25.00%      25.00%"
  ]
  _edit(other / "result.json", lambda result: result.update(weights_sha256="of other weights"))
  found = _measure(monkeypatch, tmp_path, other, run)
  assert found["other"]["weights_sha256"] == "of other weights"
  _measure(monkeypatch, tmp_path, run, images=64)
  assert measured[2:] == [(str(other), 8192), (str(run), 64)]


def _edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def _result(**changed):
  return lambda work_dir: _edit(work_dir / "result.json", lambda result: result.update(changed))


def _recipe(**changed):
  return lambda work_dir: _edit(
    work_dir / "recipe.json", lambda content: content["recipe"].update(changed)
  )


def _cut_model(work_dir):
  path = work_dir / "model.keras"
  path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
  "damage, expected",
  [
    (lambda work_dir: (work_dir / "result.json").unlink(), "is not complete; wait until"),
    (lambda work_dir: shutil.rmtree(work_dir), "is not a directory; give the --work_dir of a run"),
    (_result(val_error=None), "and val_error None, which are needed"),
    (_result(val_error=0.99), "but result.json has 99.0000%"),
    (_result(weights_sha256="0" * 64), "does not hold the weights whose SHA-256"),
    (_cut_model, "model.keras cannot be read (File is not a zip file"),
    (lambda work_dir: (work_dir / "model.keras").unlink(), "model.keras cannot be read ("),
    (_recipe(dataset="no_such_set"), "has no dataset 'no_such_set'"),
    (_recipe(per_worker_batch_size=512), "=512 images is more than the 203 of four_classes train"),
    (_recipe(network=f"{HERE}:with_dropout"), "draws random numbers in training"),
    (_recipe(network=f"{HERE}:without_normalization"), "has no batch normalisation"),
  ],
)
def test_a_run_that_cannot_be_measured_is_refused(run, tmp_path, monkeypatch, damage, expected):
  shutil.copytree(run, tmp_path / "run")
  damage(tmp_path / "run")
  with pytest.raises(UserError) as error:
    _measure(monkeypatch, tmp_path, tmp_path / "run")
  assert expected in str(error.value)
  assert not (tmp_path / "new").exists()


def test_other_mistakes_are_refused(run, tmp_path, monkeypatch):
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "statistics.json").write_text('{"n4": {"workers": 2}}')
  with pytest.raises(UserError, match=r"does not hold what tools\.bn_statistics writes"):
    _measure(monkeypatch, tmp_path, run)
  shutil.copytree(run, tmp_path / "n4")
  with pytest.raises(UserError, match="Two runs are named n4"):
    _measure(monkeypatch, tmp_path, run, tmp_path / "n4")
  finished = run_module("tools.bn_statistics")
  assert finished.returncode == 1
  assert finished.stderr == "error: No run was given; give the work directories of complete runs.\n"
