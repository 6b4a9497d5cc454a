"""The gradient noise scale against sums over all samples, and against each worker's gradient."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

from tests.training.small_steps import make_batches, make_model, make_recipe
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.options import RunOptions
from tf_largebatch.training.noise_scale import NoiseScale, estimate
from tf_largebatch.training.step import make_train_step


@pytest.mark.parametrize("b, passes, population", [(1, 2, 5), (1, 4, 4), (2, 2, 6), (3, 2, 6)])
def test_estimates_are_unbiased_over_all_samples_without_replacement(b, passes, population):
  gradients = np.random.default_rng(0).normal(1, 2, (population, 3))
  found = []
  for order in itertools.permutations(range(population), b * passes):
    means = gradients[list(order)].reshape(passes, b, 3).mean(axis=1)
    squared_norms = np.sum((means / passes) ** 2)
    squared_norm = np.sum(means.mean(axis=0) ** 2)
    found.append(estimate(squared_norms, squared_norm, passes, b * passes, population))
  variance = np.trace(np.cov(gradients.T, ddof=1))
  expected = variance, np.sum(gradients.mean(axis=0) ** 2)
  np.testing.assert_allclose(np.mean(found, axis=0), expected, rtol=1e-12)


def test_estimates_are_unbiased_over_all_samples_with_replacement():
  gradients = np.random.default_rng(1).normal(1, 2, (4, 3))
  found = [
    estimate(np.sum((gradients[list(i)] / 3) ** 2), np.sum(gradients[list(i)].mean(0) ** 2), 3, 3)
    for i in itertools.product(range(4), repeat=3)
  ]
  expected = np.trace(np.cov(gradients.T, ddof=0)), np.sum(gradients.mean(axis=0) ** 2)
  np.testing.assert_allclose(np.mean(found, axis=0), expected, rtol=1e-12)


def _worker_gradients(recipe, batch):
  """Each worker's gradient of its mean loss: `[k, parameters]`."""
  model, rows = make_model(recipe.per_worker_batch_size, "float64"), []
  for images, labels in zip(*batch, strict=True):
    with tf.GradientTape() as tape:
      losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images, training=True))
      loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    rows.append(np.concatenate([gradient.numpy().ravel() for gradient in gradients]))
  return np.array(rows)


@pytest.mark.parametrize(
  "g, jit, train_examples", [(1, False, None), (2, False, 100), (2, True, 100)]
)
def test_a_step_measures_the_spread_of_its_passes(g, jit, train_examples):
  recipe = make_recipe(dtype="float64")
  k, n = recipe.workers, recipe.per_worker_batch_size
  options = RunOptions(workers_per_pass=g, jit_compile=jit)
  model = make_model(n, "float64")
  optimizer = MomentumCorrectedSGD(0.1, weight_decay=0.1, jit_compile=jit)
  optimizer.build(model.trainable_variables)
  train_step = make_train_step(
    tf.distribute.get_strategy(), model, optimizer, recipe, options, None, train_examples
  )
  batch = next(make_batches(recipe))
  scalars = train_step(batch)
  means = _worker_gradients(recipe, batch).reshape(k // g, g, -1).mean(axis=1)
  variance = g * n * np.sum(np.var(means, axis=0, ddof=1))
  left = 1 - k * n / train_examples if train_examples else 1
  squared = np.sum(means.mean(axis=0) ** 2) - variance / (k * n) * left
  np.testing.assert_allclose(float(scalars["gradient_variance"]), variance, rtol=1e-12)
  np.testing.assert_allclose(float(scalars["squared_gradient"]), squared, rtol=1e-11)


def test_one_pass_has_no_spread():
  recipe = make_recipe(workers=1)
  model, optimizer = make_model(5, "float32"), MomentumCorrectedSGD(0.1)
  optimizer.build(model.trainable_variables)
  train_step = make_train_step(tf.distribute.get_strategy(), model, optimizer, recipe)
  assert "gradient_variance" not in train_step(next(make_batches(recipe)))


def _record(step, variance, squared):
  return {
    "kind": "train",
    "step": step,
    "gradient_variance": variance,
    "squared_gradient": squared,
  }


def test_averages_weigh_each_step_by_its_age():
  recipe = make_recipe(workers=8, n=4)
  noise = NoiseScale(recipe)
  noise.update(10, 3.0, 2.0)
  found = noise.update(25, 5.0, 0.5)
  # Steps 1 to 10 and 11 to 25, each with the weight of its age; one step is 1/100 of the memory.
  ages = 25 - np.arange(1, 26)
  weights = np.exp(-ages / 100)
  variance = np.sum(weights * np.where(ages < 15, 5.0, 3.0))
  squared = np.sum(weights * np.where(ages < 15, 0.5, 2.0))
  scale = variance / squared
  gain = 8 * (scale + 4) / (scale + 8 * 4)
  assert math.isclose(found["noise_scale"], scale, rel_tol=1e-12)
  assert math.isclose(found["adascale_gain"], gain, rel_tol=1e-12)
  assert 1 < gain < 8
  # A run that continues takes its averages from the records.
  again = NoiseScale(recipe, [_record(10, 3.0, 2.0), {"kind": "eval", "step": 10}])
  assert again.update(25, 5.0, 0.5) == found


def test_noise_without_signal():
  found = NoiseScale(make_recipe(workers=8, n=4)).update(10, 3.0, -0.1)
  assert found == {"adascale_gain": 8.0}
  assert NoiseScale(make_recipe(workers=8, n=4)).update(10, 0.0, 2.0) == {
    "noise_scale": 0.0,
    "adascale_gain": 1.0,
  }
