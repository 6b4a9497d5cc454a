"""The curvature meter against exact Hessians."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.small_steps import make_batches, make_model, make_recipe
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.training.curvature import make_curvature


def _loss(batch, kernel, gamma, beta, dense, bias):
  """The mean over all images, each worker's normalised on their own, in plain operations."""
  losses = []
  for images, labels in zip(*map(tf.unstack, batch), strict=True):
    x = tf.nn.conv2d(tf.cast(images, tf.float64) / 100, kernel, 1, "VALID")
    mean = tf.reduce_mean(x, [0, 1, 2])
    variance = tf.reduce_mean(x**2, [0, 1, 2]) - mean**2
    x = gamma * (x - mean) / tf.sqrt(variance + 1e-5) + beta
    x = tf.reduce_mean(tf.nn.relu(x), [1, 2]) @ dense + bias
    losses.append(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, x))
  return tf.reduce_mean(losses)


def _gradient_and_hessian(model, batch):
  """In float64: `[parameters]`, `[parameters, parameters]`."""
  weights = [tf.cast(weight, tf.float64) for weight in model.trainable_variables]
  flat = tf.concat([tf.reshape(weight, [-1]) for weight in weights], 0)

  @tf.function(autograph=False)
  def gradient_and_row(flat, direction):
    with tf.GradientTape() as outer:
      outer.watch(flat)
      with tf.GradientTape() as inner:
        inner.watch(flat)
        parts = tf.split(flat, [tf.size(weight) for weight in weights])
        parts = [tf.reshape(p, w.shape) for p, w in zip(parts, weights, strict=True)]
        loss = _loss(batch, *parts)
      gradient = inner.gradient(loss, flat)
      slope = tf.reduce_sum(gradient * direction)
    return gradient, outer.gradient(slope, flat)

  rows = [gradient_and_row(flat, row) for row in np.eye(len(flat))]
  return rows[0][0].numpy(), np.array([row.numpy() for _, row in rows])


def _measure(recipe, batch, g, weights=None, tolerance=1e-9):
  model, precise = (make_model(recipe.per_worker_batch_size, "float64") for _ in range(2))
  if weights is not None:
    model.set_weights(weights(model.get_weights()))
  options = RunOptions(workers_per_pass=g)
  strategy = tf.distribute.get_strategy()
  return model, make_curvature(strategy, model, precise, recipe, options, tolerance)(batch)


def _far_from_the_start(weights):
  """Weights where the smallest eigenvalue is near minus the largest, and below it."""
  random = np.random.RandomState(37)
  trained = [w + 3 * random.normal(size=w.shape) for w in [*weights[:3], *weights[5:]]]
  return [*trained[:3], *weights[3:5], *trained[3:]]


@pytest.mark.parametrize("workers, g, weights", [(1, 1, _far_from_the_start), (4, 2, None)])
def test_the_exact_hessian(workers, g, weights):
  recipe = make_recipe(workers=workers, dtype="float64")
  (batch,) = make_batches(recipe, 1)
  model, found = _measure(recipe, batch, g, weights)
  gradient, hessian = _gradient_and_hessian(model, batch)
  eigenvalues = np.linalg.eigvalsh(hessian)
  if weights:
    assert -eigenvalues[0] > eigenvalues[-1] > -0.9999 * eigenvalues[0]
  sharpness = gradient @ hessian @ gradient / (gradient @ gradient)
  assert found["batch_sharpness"] == pytest.approx(sharpness, rel=1e-12)
  assert found["largest_eigenvalue"] == pytest.approx(eigenvalues[-1], rel=1e-12)
  assert found["eigenvalue_residual"] <= 1e-9 * eigenvalues[-1]


def test_few_products_are_within_the_residual():
  """An eigenvalue lies within it; weights that are not finite have no curvature."""
  recipe = make_recipe(workers=1, dtype="float64")
  (batch,) = make_batches(recipe, 1)
  model, found = _measure(recipe, batch, 1, tolerance=0.1)
  eigenvalues = np.linalg.eigvalsh(_gradient_and_hessian(model, batch)[1])
  residual = found["eigenvalue_residual"]
  assert 1e-6 < residual <= 0.1 * found["largest_eigenvalue"]
  assert np.min(np.abs(eigenvalues - found["largest_eigenvalue"])) <= residual
  assert _measure(recipe, batch, 1, lambda weights: [np.nan * w for w in weights])[1] == {}


class _Dilation(keras.layers.Layer):
  def call(self, x):
    return tf.nn.dilation2d(x, tf.zeros([2, 2, 2], x.dtype), [1] * 4, "SAME", "NHWC", [1] * 4)


def test_a_network_without_second_derivatives_gets_one_line():
  recipe = make_recipe(workers=1)
  (batch,) = make_batches(recipe, 1)
  layers = [keras.layers.Rescaling(0.01), keras.layers.Conv2D(2, 1), _Dilation()]
  layers += [keras.layers.Flatten(), keras.layers.Dense(3)]
  model = keras.Sequential([keras.Input((6, 6, 2), dtype="float32"), *layers])
  strategy = tf.distribute.get_strategy()
  curvature = make_curvature(strategy, model, model, recipe, RunOptions())
  with pytest.raises(
    UserError,
    match=r"^--curvature_every_steps .* \(that of Dilation2DBackpropInput .* leave it out\.$",
  ):
    curvature(batch)
