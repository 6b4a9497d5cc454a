"""`fit` and `evaluate` on one device: against loops written by hand and against Keras' own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training import fit_scenarios
from tf_largebatch import MomentumCorrectedSGD, fit


def crossentropy():
  return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def float64():
  with fit_scenarios.floatx("float64"):
    yield


def values(model):
  """Everything that training changes, apart from the states of random seeds."""
  return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def assert_equal(some, others, tolerance=1e-12):
  for a, b in zip(some, others, strict=True):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(b), initial=0))
    )


def mlp(optimizer, metrics=("accuracy",), dtype=None, **compiled):
  """Has BN, whose statistics change with the grouping, but no random numbers."""
  keras.utils.set_random_seed(0)
  model = keras.Sequential(
    [
      keras.Input((6,)),
      keras.layers.Dense(8, use_bias=False, dtype=dtype),
      keras.layers.BatchNormalization(momentum=0.9, dtype=dtype),
      keras.layers.ReLU(dtype=dtype),
      keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(1e-2), dtype=dtype),
    ]
  )
  model.compile(optimizer, **{"loss": crossentropy(), "metrics": list(metrics), **compiled})
  return model


def examples(count=64, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, 6)), rng.integers(0, 3, count)


OPTIMIZERS = {
  "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
  "adam": lambda: keras.optimizers.Adam(0.01, clipnorm=0.05),
  "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, clipvalue=0.02),
  "ours": lambda: MomentumCorrectedSGD(0.1, weight_decay=0.01, clipvalue=0.05),
}


def train_by_hand(model, x, y, workers, n):
  """Steps of k workers of n examples, as the paper defines them."""
  weights, (mean, variance) = model.trainable_variables, model.non_trainable_variables
  losses = []
  for first in range(0, len(x), workers * n):
    gradients, means, variances = [], [], []
    start = mean.numpy(), variance.numpy()
    for worker in range(workers):
      part = slice(first + worker * n, first + (worker + 1) * n)
      with tf.GradientTape() as tape:
        loss = crossentropy()(y[part], model(x[part], training=True)) + sum(model.losses)
      losses.append(float(loss))
      gradients.append(tape.gradient(loss, weights))
      means.append(mean.numpy())
      variances.append(variance.numpy())
      mean.assign(start[0])
      variance.assign(start[1])
    model.optimizer.apply([sum(g) / workers for g in zip(*gradients, strict=True)], weights)
    mean.assign(sum(means) / workers)
    variance.assign(sum(variances) / workers)
  return np.mean(losses)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_workers_against_a_loop_written_by_hand(name):
  x, y = examples()
  expected = mlp(OPTIMIZERS[name]())
  loss = train_by_hand(expected, x, y, workers=4, n=4)
  actual = mlp(OPTIMIZERS[name]())
  history = fit(actual, x, y, workers=4, per_worker_batch_size=4, shuffle=False, verbose=0)
  assert_equal(values(actual), values(expected))
  np.testing.assert_allclose(history.history["loss"], [loss], rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_against_keras(name):
  """With dropout, whose masks are then those of Keras."""
  x, y = fit_scenarios.images(40, 8)
  models = [
    fit_scenarios.make("resnet", tf.distribute.get_strategy(), OPTIMIZERS[name]()) for _ in range(2)
  ]
  options = {"epochs": 2, "shuffle": False, "verbose": 0, "validation_split": 0.2}
  expected = models[0].fit(x, y, batch_size=8, **options).history
  actual = fit(models[1], x, y, workers=1, per_worker_batch_size=8, **options).history
  assert_equal(values(models[1]), values(models[0]))
  assert actual.keys() == expected.keys()
  for key, series in expected.items():
    np.testing.assert_allclose(actual[key], series, rtol=1e-6 if "acc" in key else 1e-12)


def test_each_worker_draws_numbers_of_its_own():
  """The gradient of |100 − Σ mask · w| by w is minus the mask, which holds 0 and 2."""
  moved = {}
  for workers in (1, 2):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
      [
        keras.Input((200,)),
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
      ]
    )
    model.compile(keras.optimizers.SGD(1.0), "mae")
    x, y = np.ones((workers, 200)), np.full((workers, 1), 1e6)
    fit(model, x, y, workers=workers, per_worker_batch_size=1, verbose=0)
    moved[workers] = model.get_weights()[0][:, 0]
  assert set(moved[1]) == {0.0, 2.0}
  assert set(moved[2]) == {0.0, 1.0, 2.0}
  second = 2 * moved[2] - moved[1]  # Worker 0 drops what Keras does.
  assert set(second) == {0.0, 2.0} and np.any(second != moved[1])
