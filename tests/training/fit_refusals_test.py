"""What `fit` and `evaluate` refuse, each in one line."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.fit_features_test import by_class
from tests.training.fit_test import crossentropy, examples, float64, mlp
from tf_largebatch import evaluate, fit, make_strategy, read_cluster
from tf_largebatch.errors import UserError

assert float64  # A fixture of every test here.


class Largest(keras.metrics.Metric):
  def __init__(self):
    super().__init__(name="largest")
    self.value = self.add_variable((), "zeros", name="value")

  def update_state(self, y_true, y_pred, sample_weight=None):
    self.value.assign(keras.ops.maximum(self.value, keras.ops.max(keras.ops.abs(y_pred))))

  def result(self):
    return self.value


class OwnStep(keras.Sequential):
  def train_step(self, data):
    return super().train_step(data)


def own_step():
  model = OwnStep([keras.Input((6,)), keras.layers.Dense(3)])
  model.compile("sgd", crossentropy())
  return model


def compiled(**options):
  return mlp(keras.optimizers.SGD(0.1), **options)


SUM = {"reduction": "sum", "from_logits": True}
REFUSED = {
  "not compiled": (lambda: keras.Sequential([keras.layers.Dense(3)]), {}, "is not compiled"),
  "own train_step": (own_step, {}, "OwnStep overrides train_step"),
  "sum": (
    lambda: compiled(loss=keras.losses.SparseCategoricalCrossentropy(**SUM)),
    {},
    "not a mean over the examples",
  ),
  "maximum": (lambda: compiled(metrics=[Largest()]), {}, "'largest/value' does not add up"),
  "eager": (lambda: compiled(run_eagerly=True), {}, "run_eagerly=True"),
  "several steps": (lambda: compiled(steps_per_execution=2), {}, "steps_per_execution=2"),
  "accumulation": (
    lambda: mlp(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    {},
    "give more workers",
  ),
  "no workers": (compiled, {"workers": 0}, "workers=0 is not a positive whole number"),
  "half a worker": (compiled, {"per_worker_batch_size": 1.5}, "per_worker_batch_size=1.5"),
  "few examples": (compiled, {"workers": 9}, r"fewer than the kn = 9 x 8 = 72 examples"),
  "workers per pass": (compiled, {"workers_per_pass": 3}, "does not divide the 2 workers"),
  "stock BN in groups": (
    compiled, {"workers_per_pass": 2}, "'sequential.*/batch_normalization.*/moving_.*per_worker_"
  ),
  "metric of batches in groups": (
    lambda: compiled(metrics=[by_class]), {"workers_per_pass": 2}, "depends on how examples are gr"
  ),
  "class weights twice": (
    compiled, {"class_weight": {0: 2.0}, "sample_weight": np.ones(64)}, "no sample_weight"
  ),
  "nothing left": (compiled, {"validation_split": 0.999}, "leaves training or validation"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case):
  make, options, message = REFUSED[case]
  x, y = examples(64)
  options = {"workers": 2, "per_worker_batch_size": 8, "verbose": 0} | options
  with pytest.raises(UserError) as caught:
    fit(make(), x, y, **options)
  assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "data, message",
  [
    ((tf.data.Dataset.range(5),), "must be batches"),
    ((tf.data.Dataset.range(5).batch(2), np.ones(5)), "part of the data set's elements"),
    ((tf.data.Dataset.range(5).batch(2).repeat(),), "has no end"),
    ((iter([]),), "give arrays, a tf.data.Dataset"),
    ((np.ones((5, 6)), np.ones(4)), r"differ in their number of examples: \[4, 5\]"),
    ((lambda epoch: 3,), r"x\(epoch\) returned int"),
  ],
)
def test_refuses_other_data(data, message):
  with pytest.raises(UserError, match=message):
    fit(compiled(), *data, workers=1, per_worker_batch_size=2, verbose=0)


def test_refuses_to_be_called_in_the_scope():
  with tf.distribute.MirroredStrategy(["CPU:0"]).scope(), pytest.raises(UserError, match="outside"):
    evaluate(compiled(), *examples(8))


def test_the_strategy_of_one_device_is_the_default():
  assert make_strategy(read_cluster({})) is tf.distribute.get_strategy()
