"""`PerWorkerBatchNormalization` against a loop over the groups in NumPy float64."""

import math

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from tests.launching import run_program
from tf_largebatch.models.normalization import PerWorkerBatchNormalization

# By dtype policy: dtype of the images; tolerances of y and dx, of the gradients of gamma and beta
# (sums with cancellation), and of the moving averages.
POLICIES = {
  "float64": (np.float64, 1e-12, 1e-12, 1e-12),
  "float32": (np.float32, 2e-6, 4e-6, 1e-6),
  "mixed_bfloat16": (ml_dtypes.bfloat16, 2**-8, 4e-6, 1e-6),
}
SHAPES = [(12, 5), (12, 4, 5), (12, 3, 4, 5)]


def assert_close(actual, expected, tolerance):
  """Bounds the largest error, relative to the largest expected value unless all are zero."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  scale = np.max(np.abs(expected)) or 1
  assert np.max(np.abs(actual - expected)) <= tolerance * scale


def images(shape, dtype, seed=0):
  """Images whose mean and scale differ between images and between channels."""
  rng = np.random.default_rng(seed)
  each = (shape[0],) + (1,) * (len(shape) - 1)
  x = rng.normal(size=shape) * rng.uniform(0.5, 2, shape[-1]) + rng.normal(size=shape[-1])
  return (x * rng.uniform(0.5, 2, each) + rng.normal(size=each)).astype(dtype)


def reference(x, dy, gamma, beta, n, epsilon):
  """(y, gradients of x, gamma and beta, group averages of mean and of unbiased variance)."""
  x, dy, gamma, beta = (np.asarray(a, np.float64) for a in (x, dy, gamma, beta))
  ys, dxs, means, variances = [], [], [], []
  dgamma = dbeta = 0
  for start in range(0, len(x), n):
    group, dgroup = x[start : start + n], dy[start : start + n]
    axes = tuple(range(x.ndim - 1))
    count = group.size // group.shape[-1]
    mean = group.sum(axes) / count
    squares = ((group - mean) ** 2).sum(axes)
    deviation = np.sqrt(squares / count + epsilon)
    normal = (group - mean) / deviation
    ys.append(gamma * normal + beta)
    projection = normal * (dgroup * normal).sum(axes) / count
    dxs.append(gamma / deviation * (dgroup - dgroup.sum(axes) / count - projection))
    dgamma, dbeta = dgamma + (dgroup * normal).sum(axes), dbeta + dgroup.sum(axes)
    means.append(mean)
    variances.append(squares / max(count - 1, 1))
  kept = (np.mean(means, axis=0), np.mean(variances, axis=0))
  return (np.concatenate(ys), np.concatenate(dxs), dgamma, dbeta, *kept)


def prepared(shape, policy, seed=5, **arguments):
  """(a built layer with random gamma, beta and moving averages, these four in float64)."""
  layer = PerWorkerBatchNormalization(dtype=policy, **arguments)
  layer.build((None, *shape[1:]))
  rng = np.random.default_rng(seed)
  weights = [rng.uniform(0.5, 2, shape[-1]).astype(layer.variable_dtype) for _ in range(4)]
  layer.set_weights(weights)
  return layer, [w.astype(np.float64) for w in weights]


def forward_and_backward(layer, training=True):
  def run(x, dy):
    with tf.GradientTape() as tape:
      tape.watch(x)
      y = layer(x, training=training)
      # Its gradient by y is dy, which the sum in float64 does not round.
      loss = tf.reduce_sum(tf.cast(y, tf.float64) * tf.cast(dy, tf.float64))
    return y, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

  return run


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
  "n, batch",
  [
    *[(None, "static"), (None, "dynamic"), (12, "dynamic"), (1, "static")],
    *[(4, "static"), (4, "dynamic"), (4, "xla")],
  ],
)
def test_training_follows_the_equations(policy, shape, n, batch):
  dtype, tolerance, gradient_tolerance, moving_tolerance = POLICIES[policy]
  layer, (gamma, beta, moving_mean, moving_variance) = prepared(
    shape, policy, per_worker_batch_size=n, momentum=0.75, epsilon=0.01
  )
  x, dy = images(shape, dtype), images(shape, dtype, seed=1)
  run = forward_and_backward(layer)
  if batch != "static":
    spec = tf.TensorSpec((None, *shape[1:]), dtype)
    run = tf.function(run, input_signature=[spec, spec], jit_compile=batch == "xla")
  y, dx, dgamma, dbeta = run(tf.constant(x), tf.constant(dy))
  expected = reference(x, dy, gamma, beta, n or 12, 0.01)
  assert y.dtype == dx.dtype == x.dtype
  assert_close(y, expected[0], tolerance)
  assert_close(dx, expected[1], tolerance)
  assert_close(dgamma, expected[2], gradient_tolerance)
  assert_close(dbeta, expected[3], gradient_tolerance)
  assert_close(layer.moving_mean, 0.75 * moving_mean + 0.25 * expected[4], moving_tolerance)
  assert_close(layer.moving_variance, 0.75 * moving_variance + 0.25 * expected[5], moving_tolerance)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_inference_uses_the_moving_averages(policy, shape, frozen):
  """So does a frozen layer in training. The 12 images need not be a multiple of n = 5."""
  dtype, tolerance, gradient_tolerance, _ = POLICIES[policy]
  layer, weights = prepared(shape, policy, per_worker_batch_size=5, epsilon=0.01)
  layer.trainable = not frozen
  x, dy = images(shape, dtype), images(shape, dtype, seed=1)
  run = tf.function(forward_and_backward(layer, training=frozen))
  y, dx, dgamma, dbeta = run(tf.constant(x), tf.constant(dy))
  gamma, beta, mean, variance = weights
  normal = (x.astype(np.float64) - mean) / np.sqrt(variance + 0.01)
  dy, axes = dy.astype(np.float64), tuple(range(len(shape) - 1))
  assert y.dtype == dx.dtype == x.dtype
  assert_close(y, gamma * normal + beta, tolerance)
  assert_close(layer(x), gamma * normal + beta, tolerance)
  assert_close(dx, gamma / np.sqrt(variance + 0.01) * dy, tolerance)
  assert_close(dgamma, (dy * normal).sum(axes), gradient_tolerance)
  assert_close(dbeta, dy.sum(axes), gradient_tolerance)
  for kept, before in zip(layer.get_weights(), weights, strict=True):
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize("policy", ["float64", "float32"])
def test_moving_averages_over_steps(policy):
  """The defaults: momentum 0.9, epsilon 1e-5, averages that start at 0 and 1."""
  dtype, tolerance, _, moving_tolerance = POLICIES[policy]
  layer = PerWorkerBatchNormalization(4, dtype=policy)
  statistics = []
  for step in range(6):
    x = images((8, 2, 3, 5), dtype, seed=step)
    expected = reference(x, x, np.ones(5), np.zeros(5), 4, 1e-5)
    assert_close(layer(x, training=True), expected[0], tolerance)
    statistics.append(expected[4:])
  for i, (moving, start) in enumerate([(layer.moving_mean, 0), (layer.moving_variance, 1)]):
    terms = [0.1 * 0.9 ** (5 - t) * statistics[t][i] for t in range(6)]
    assert_close(moving, 0.9**6 * start + sum(terms), moving_tolerance)


@pytest.mark.parametrize("policy", ["float64", "float32"])
def test_a_batch_of_groups_equals_one_pass_per_group_not_one_for_all(policy):
  dtype, tolerance, _, moving_tolerance = POLICIES[policy]
  x = images((12, 3, 4, 5), dtype)
  together, _ = prepared(x.shape, policy, per_worker_batch_size=4)
  apart = [prepared(x.shape, policy)[0] for _ in range(3)]
  whole, _ = prepared(x.shape, policy)
  y = together(x, training=True).numpy()
  ys = [layer(x[4 * j : 4 * j + 4], training=True) for j, layer in enumerate(apart)]
  assert_close(y, np.concatenate(ys), tolerance)
  for name in ("moving_mean", "moving_variance"):
    copies = [getattr(layer, name).numpy() for layer in apart]
    assert_close(getattr(together, name), np.mean(copies, axis=0), moving_tolerance)
  assert np.max(np.abs(y - whole(x, training=True).numpy())) > 0.1
  assert np.max(np.abs(together.moving_variance - whole.moving_variance)) > 0.01


def test_rejects_a_batch_that_is_not_a_multiple_of_n():
  layer = PerWorkerBatchNormalization(4, name="bn")
  with pytest.raises(ValueError, match=r"bn: a batch of 10 .* per_worker_batch_size=4"):
    layer(np.ones((10, 3)), training=True)
  dynamic = tf.function(
    lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 3])]
  )
  assert dynamic(np.ones((8, 3), np.float32)).shape == (8, 3)
  with pytest.raises(tf.errors.InvalidArgumentError, match=r"bn: .* per_worker_batch_size=4"):
    dynamic(np.ones((10, 3), np.float32))


def test_rejects_such_a_batch_under_xla_which_drops_assertions():
  layer = PerWorkerBatchNormalization(4)
  layer.build((None, 3))
  compiled = tf.function(
    lambda x: layer(x, training=True),
    input_signature=[tf.TensorSpec([None, 3])],
    jit_compile=True,
  )
  with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
    compiled(images((10, 3), np.float32))


def test_mixed_precision_keeps_the_parameters_in_float32():
  layer = PerWorkerBatchNormalization(2, dtype="mixed_bfloat16")
  assert layer(np.ones((4, 3, 3, 2)), training=True).dtype == tf.bfloat16
  assert [w.dtype for w in layer.weights] == ["float32"] * 4
  assert layer.trainable_weights == [layer.gamma, layer.beta]
  assert layer.non_trainable_weights == [layer.moving_mean, layer.moving_variance]


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
@pytest.mark.parametrize("training", [False, True])
def test_low_precision_parameters_work_too(policy, training):
  layer, (gamma, beta, mean, variance) = prepared((12, 3, 4, 5), policy, per_worker_batch_size=4)
  x = images((12, 3, 4, 5), layer.compute_dtype)
  y = layer(x, training=training)
  if training:
    expected = reference(x, x, gamma, beta, 4, 1e-5)[0]
  else:
    expected = gamma * (x.astype(np.float64) - mean) / np.sqrt(variance + 1e-5) + beta
  assert y.dtype == policy
  assert_close(y, expected, 2**-8)


def test_fit_save_and_load(tmp_path):
  layer = PerWorkerBatchNormalization(
    4, momentum=0.8, epsilon=1e-3, gamma_initializer=keras.initializers.Constant(0.5), name="bn"
  )
  keras.utils.set_random_seed(0)
  model = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(5, 3), layer])
  model.compile(keras.optimizers.SGD(0.5), "mse")
  x, y = images((24, 6, 6, 3), np.float32), np.full((24, 4, 4, 5), 3, np.float32)
  start = model.evaluate(x, y, verbose=0)
  model.fit(x, y, batch_size=8, epochs=3, verbose=0)
  assert model.evaluate(x, y, verbose=0) < 0.5 * start
  model.save(tmp_path / "model.keras")
  loaded = keras.models.load_model(tmp_path / "model.keras")
  np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
  config = loaded.get_layer("bn").get_config()
  assert config == layer.get_config()
  names = ("per_worker_batch_size", "momentum", "epsilon", "name", "trainable")
  assert [config[name] for name in names] == [4, 0.8, 1e-3, "bn", True]
  assert config["gamma_initializer"]["config"]["value"] == 0.5
  assert config["beta_initializer"]["class_name"] == "Zeros"


@pytest.mark.parametrize(
  "name, value",
  [
    ("per_worker_batch_size", 0),
    ("per_worker_batch_size", 2.0),
    ("momentum", 1),
    ("momentum", -0.1),
    ("epsilon", 0),
    ("epsilon", math.nan),
  ],
)
def test_rejects_bad_arguments(name, value):
  with pytest.raises(ValueError, match=f"{name} must .* not {value}"):
    PerWorkerBatchNormalization(**{name: value})


def test_refuses_a_mask_in_words():
  layer = PerWorkerBatchNormalization(3)
  masked = keras.layers.Masking()(np.ones((6, 4, 5), np.float32))
  with pytest.raises(ValueError, match="takes no mask"):
    layer(masked)
  with pytest.raises(ValueError, match="takes no mask"):
    layer(np.ones([6, 4, 5]), training=True, mask=np.ones([6, 4], bool))
  with pytest.raises(ValueError, match="takes no mask"):
    layer(keras.layers.Masking()(keras.Input((4, 5))))
  layer(np.ones([6, 4, 5]), training=True, mask=None)


@pytest.mark.parametrize("training", [False, True])
def test_takes_integers_as_keras_does(training):
  x = np.arange(12).reshape(4, 3)
  y = PerWorkerBatchNormalization(4, epsilon=1e-3)(x, training=training)
  assert y.dtype == "float32"
  assert_close(y, keras.layers.BatchNormalization()(x, training=training), 1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("center, scale", [(True, False), (False, True), (False, False)])
def test_without_beta_or_gamma(center, scale, policy, training):
  dtype, tolerance, _, _ = POLICIES[policy]
  x, shape = images((12, 3, 4, 5), dtype), (12, 3, 4, 5)
  layer = PerWorkerBatchNormalization(
    4, center=center, scale=scale, dtype=policy, beta_initializer="ones", gamma_initializer="ones"
  )
  layer.build(shape)
  assert [w.name for w in layer.trainable_weights] == ["gamma"] * scale + ["beta"] * center
  gamma, beta = np.full(5, 1.5 if scale else 1.0), np.full(5, 0.5 if center else 0.0)
  for weight, value in ((layer.gamma, gamma), (layer.beta, beta)):
    if weight is not None:
      weight.assign(value)
  expected = reference(x, np.zeros(shape), gamma, beta, 4, 1e-5)[0]
  if not training:  # The moving averages are 0 and 1.
    expected = gamma * x.astype(np.float64) / np.sqrt(1 + 1e-5) + beta
  assert_close(layer(x, training=training), expected, tolerance)
  assert (
    PerWorkerBatchNormalization.from_config(layer.get_config()).get_config() == layer.get_config()
  )


@pytest.mark.parametrize("shape", [(4,), (4, None), (None, 3, None)])
def test_rejects_an_input_without_known_channels(shape):
  with pytest.raises(ValueError, match="channels"):
    PerWorkerBatchNormalization().build(shape)


# Takes one step with different data on each replica and prints each copy of the moving averages.
MIRRORED = """
import json
import keras
import numpy as np
import tensorflow as tf
from tf_largebatch.models.normalization import PerWorkerBatchNormalization

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

def copies(make_layer):
  with strategy.scope():
    layer = make_layer()
    layer.build((None, 2))

  x = np.array([[1, 10], [3, 14], [2, 0], [2, 0]], np.float32)
  xs = strategy.experimental_distribute_values_from_function(
    lambda context: tf.constant(x * (1, 5)[context.replica_id_in_sync_group])
  )
  step = tf.function(lambda xs: strategy.run(lambda x: layer(x, training=True), args=(xs,)))
  step(xs)
  return [
    np.array([value.numpy() for value in weight.value.values], np.float64).tolist()
    for weight in (layer.moving_mean, layer.moving_variance)
  ]

print(json.dumps({
  "ours": copies(lambda: PerWorkerBatchNormalization(2)),
  "stock": copies(lambda: keras.layers.BatchNormalization(momentum=0.9)),
}))
"""


def test_replicas_keep_equal_moving_averages_unlike_those_of_keras():
  """Two replicas with two groups of two images each; means (2, 12), (2, 0), and 5 times these.

  Keras' own layer treats each replica as a group and keeps different averages on each replica.
  """
  copies = run_program(MIRRORED)
  mean, variance = np.array(copies["ours"])
  # Averages over four groups: means (2, 12), (2, 0), (10, 60), (10, 0); unbiased variances (2, 8),
  # (0, 0), (50, 200), (0, 0).
  assert_close(mean, [[0.1 * 6, 0.1 * 18]] * 2, 1e-6)
  assert_close(variance, [[0.9 + 0.1 * 13, 0.9 + 0.1 * 52]] * 2, 1e-6)
  mean, variance = np.array(copies["stock"])
  assert_close(mean, [[0.1 * 2, 0.1 * 6], [0.1 * 10, 0.1 * 30]], 1e-6)
  assert np.min(np.abs(variance[1] - variance[0])) > 1


def _second_derivative(layer, x, dy, v):
  """d/dε of the gradient of Σ dy·tanh(y) at x + ε v, by two tapes."""
  with tf.GradientTape() as outer:
    outer.watch(x)
    with tf.GradientTape() as inner:
      inner.watch(x)
      loss = tf.reduce_sum(dy * tf.tanh(layer(x, training=True)))
    slope = tf.reduce_sum(inner.gradient(loss, x) * v)
  return outer.gradient(slope, x).numpy()


@pytest.mark.parametrize("policy, tolerance", [("float64", 1e-8), ("float32", 1e-5)])
def test_second_derivatives(policy, tolerance):
  """Against central differences of the first; Keras' own layer is off by percents."""
  dtype = POLICIES[policy][0]
  x, dy, v = (images((6, 3), np.float64, seed) for seed in range(3))

  def gradient(x):
    y = reference(x, x, np.ones(3), np.zeros(3), 6, 1e-3)[0]
    return reference(x, dy * (1 - np.tanh(y) ** 2), np.ones(3), np.zeros(3), 6, 1e-3)[1]

  expected = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
  arguments = [tf.constant(array, dtype) for array in (x, dy, v)]
  ours = PerWorkerBatchNormalization(6, epsilon=1e-3, dtype=policy)
  assert_close(_second_derivative(ours, *arguments), expected, tolerance)
  theirs = keras.layers.BatchNormalization(dtype=policy)
  difference = _second_derivative(theirs, *arguments) - expected
  assert 0.01 < np.linalg.norm(difference) / np.linalg.norm(expected) < 0.3
