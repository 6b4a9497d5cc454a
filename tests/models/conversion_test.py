"""`per_worker_batch_normalization` against the models that it copies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models.normalization_test import assert_close
from tf_largebatch import PerWorkerBatchNormalization, fit, per_worker_batch_normalization
from tf_largebatch.errors import UserError

layers = keras.layers

# Of keras.applications: batch normalisations, and the smallest image.
NETWORKS = {
  "ConvNeXtTiny": (0, 32),
  "DenseNet121": (121, 32),
  "EfficientNetV2B0": (59, 32),
  "InceptionV3": (94, 75),
  "MobileNetV3Small": (34, 32),
  "ResNet50V2": (49, 32),
}


@pytest.fixture
def float64():
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy("float64")
  yield
  keras.config.set_dtype_policy(before)


def randomise(model, seed=0):
  """Gives each weight values of its own, so that two of a shape cannot be confused."""
  rng = np.random.default_rng(seed)
  for weight in model.weights:
    if weight.name in ("gamma", "moving_variance"):
      weight.assign(rng.uniform(0.8, 1.2, weight.shape))
    else:
      weight.assign_add(rng.normal(0, 0.02, weight.shape))


def described(model):
  return [(w.path, w.name, tuple(w.shape), w.dtype) for w in model.weights]


def assert_equal_copy(model, copy):
  assert type(copy) is type(model) and copy.name == model.name
  assert described(copy) == described(model)
  for old, new in zip(model.get_weights(), copy.get_weights(), strict=True):
    np.testing.assert_array_equal(old, new)
  old, new = model._flatten_layers(), copy._flatten_layers()
  assert not set(map(id, old)) & set(map(id, new))
  assert [layer.trainable for layer in new] == [layer.trainable for layer in old]
  assert [w.trainable for w in copy.weights] == [w.trainable for w in model.weights]


def normalisations(model, kind):
  return [layer for layer in model._flatten_layers() if isinstance(layer, kind)]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_keras(name):
  """Copies have the same weights and the same outputs in inference."""
  count, size = NETWORKS[name]
  make = getattr(keras.applications, name)
  model = make(weights=None, include_top=False, pooling="avg", input_shape=(size, size, 3))
  randomise(model)
  copy = per_worker_batch_normalization(model, 4)
  assert_equal_copy(model, copy)
  assert len(normalisations(model, layers.BatchNormalization)) == count
  assert normalisations(copy, layers.BatchNormalization) == []
  ours = normalisations(copy, PerWorkerBatchNormalization)
  assert [layer.per_worker_batch_size for layer in ours] == [4] * count
  x = np.random.default_rng(1).uniform(0, 255, (8, size, size, 3)).astype(np.float32)
  assert_close(copy(x, training=False), model(x, training=False), 1e-5)
  if name == "MobileNetV3Small":
    halves = np.concatenate([model(x[:4], training=True), model(x[4:], training=True)])
    assert_close(copy(x, training=True), halves, 1e-3)
    assert np.max(np.abs(halves - model(x, training=True))) > 0.1 * np.max(np.abs(halves))


def small_model():
  """Nested models, a shared layer, a frozen one, ranks 4 and 2."""
  normalise = layers.BatchNormalization
  initial = keras.initializers.Constant(0.5)
  inner = keras.Sequential(
    [
      keras.Input((4, 4, 3)),
      layers.Conv2D(5, 3, padding="same"),
      normalise(
        name="quick",
        momentum=0.8,
        epsilon=0.01,
        gamma_initializer=initial,
        beta_initializer="ones",
      ),
      layers.Activation("tanh"),
    ],
    name="inner",
  )
  images = keras.Input((4, 4, 3))
  middle = keras.Model(images, normalise(scale=False, axis=3)(inner(images)), name="middle")
  images = keras.Input((4, 4, 3))
  x = middle(images)
  x = normalise(name="frozen", trainable=False)(x) + normalise()(x)
  shared = normalise(name="shared")
  x = layers.Concatenate()([shared(x), shared(x * x)])
  x = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
  return keras.Model(images, [normalise(center=False)(x), x], name="outer")


def trained(model, x, start):
  """(outputs, gradients, non-trainable weights) of a training pass from the weights `start`."""
  model.set_weights(start)
  with tf.GradientTape() as tape:
    outputs = model(x, training=True)
    loss = sum(tf.reduce_sum(y * tf.range(4.0, dtype=y.dtype) * y) for y in outputs)
  gradients = tape.gradient(loss, model.trainable_weights)
  return outputs, gradients, [w.numpy() for w in model.non_trainable_weights]


def test_a_pass_of_two_workers_equals_two_passes(float64):
  model = small_model()
  randomise(model)
  copy, start = per_worker_batch_normalization(model, 3), model.get_weights()
  assert_equal_copy(model, copy)
  x = np.random.default_rng(1).normal(size=(6, 4, 4, 3))
  for a, b in zip(model(x, training=False), copy(x, training=False), strict=True):
    assert_close(b, a, 1e-12)
  before = [w.numpy() for w in model.non_trainable_weights]
  first, second, both = (trained(model, part, start) for part in (x[:3], x[3:], x))
  ours = trained(copy, x, start)
  for y, a, b in zip(ours[0], first[0], second[0], strict=True):
    assert_close(y, np.concatenate([a, b]), 1e-12)
  assert np.max(np.abs(ours[0][0] - both[0][0])) > 0.1
  for gradient, a, b in zip(ours[1], first[1], second[1], strict=True):
    assert np.max(np.abs(gradient - a - b)) <= 1e-11
  paths = [w.path for w in copy.non_trainable_weights]
  for path, new, old, a, b in zip(paths, ours[2], before, first[2], second[2], strict=True):
    mean = (a + b) / 2
    if path.endswith("moving_variance"):
      # Of n · positions values, Keras takes the biased variance.
      count = 3 * (16 if len(new) == 5 else 1)
      decay = 0.8 if "quick" in path else 0.99 ** (2 if "shared" in path else 1)
      mean = decay * old + (mean - decay * old) * count / (count - 1)
      mean = old if "frozen" in path else mean
    assert_close(new, mean, 1e-12)


def test_options_of_the_layers():
  copy = per_worker_batch_normalization(small_model(), np.int64(3))
  found = normalisations(copy, PerWorkerBatchNormalization)
  configs = {layer.name: layer.get_config() for layer in found}
  inner = copy.get_layer("middle").get_layer("inner").layers[1].get_config()
  assert (inner["momentum"], inner["epsilon"]) == (0.8, 0.01)
  assert inner["gamma_initializer"]["config"]["value"] == 0.5
  assert inner["beta_initializer"]["class_name"] == "Ones"
  assert configs["shared"]["momentum"] == 0.99 and configs["shared"]["epsilon"] == 1e-3
  assert sorted((c["center"], c["scale"]) for c in configs.values())[:2] == [
    (False, True),
    (True, False),
  ]
  again = per_worker_batch_normalization(copy, 5)
  assert_equal_copy(copy, again)
  found = normalisations(again, PerWorkerBatchNormalization)
  assert [layer.per_worker_batch_size for layer in found] == [5] * 6


def test_mixed_precision_stays():
  layer = layers.BatchNormalization(dtype="mixed_bfloat16")
  copy = per_worker_batch_normalization(keras.Sequential([keras.Input((3,)), layer]), 2)
  assert copy.layers[0].dtype_policy == layer.dtype_policy
  assert copy(np.ones((2, 3))).dtype == "bfloat16"


def test_save_and_load(tmp_path):
  model = small_model()
  randomise(model)
  copy = per_worker_batch_normalization(model, 3)
  copy.save(tmp_path / "copy.keras")
  loaded = keras.models.load_model(tmp_path / "copy.keras")
  assert [layer.get_config() for layer in normalisations(loaded, PerWorkerBatchNormalization)] == [
    layer.get_config() for layer in normalisations(copy, PerWorkerBatchNormalization)
  ]
  x = np.random.default_rng(1).normal(size=(6, 4, 4, 3)).astype(np.float32)
  for a, b in zip(copy(x, training=True), loaded(x, training=True), strict=True):
    np.testing.assert_array_equal(a, b)
  assert_equal_copy(loaded, per_worker_batch_normalization(loaded, 3))


def test_states_that_are_not_weights():
  """Random numbers continue, adapted layers stay adapted, variables of one layer may be frozen."""
  scale, look_up = layers.Normalization(axis=-1), layers.StringLookup()
  scale.adapt(np.array([[1.0, 5.0], [3.0, 9.0]]))
  look_up.adapt(np.array(["a", "b", "b"]))
  words, numbers = keras.Input((2,), dtype="string"), keras.Input((2,))
  x = layers.Concatenate()([layers.Flatten()(layers.Embedding(4, 3)(look_up(words))), numbers])
  x = layers.Concatenate()([layers.BatchNormalization()(x), scale(numbers)])
  model = keras.Model([words, numbers], layers.Dropout(0.5)(layers.Dense(20)(x)))
  model.layers[-2].kernel.trainable = False
  batch = [tf.constant([["a", "b"], ["b", "c"]]), tf.constant([[1.0, 2.0], [3.0, 5.0]])]
  model(batch, training=True)
  copy = per_worker_batch_normalization(model, 2)
  assert_equal_copy(model, copy)
  for _ in range(2):
    assert_close(copy(batch, training=True), model(batch, training=True), 1e-5)


def test_a_copy_is_not_compiled_and_shares_the_strategy():
  strategy = tf.distribute.OneDeviceStrategy("CPU:0")
  with strategy.scope():
    inner = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    model = keras.Sequential([keras.Input((3,)), inner, layers.Dense(2)])
  inner.compile("sgd", "mse")
  model.compile("sgd", "mse")
  copy = per_worker_batch_normalization(model, 2)
  assert not copy.compiled and not copy.layers[0].compiled
  assert model.compiled and inner.compiled
  assert copy.distribute_strategy is model.distribute_strategy is strategy
  with pytest.raises(UserError):
    model.layers[0].layers[0].renorm = True
    per_worker_batch_normalization(model, 2)
  assert model.compiled and inner.compiled


def test_fit_takes_several_workers_through_a_copy_at_once(float64):
  """It trains the weights that the stock model gets with one worker per pass."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(24, 5)), rng.normal(size=(24, 2))
  model = keras.Sequential(
    [
      keras.Input((5,)),
      layers.Dense(4, use_bias=False),
      layers.BatchNormalization(),
      layers.Dense(2),
    ]
  )
  copy = per_worker_batch_normalization(model, 3)
  for trained, workers_per_pass in ((model, 1), (copy, 2)):
    trained.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    arguments = {"workers": 4, "per_worker_batch_size": 3, "workers_per_pass": workers_per_pass}
    fit(trained, x, y, verbose=0, **arguments)
  for a, b in zip(model.trainable_weights, copy.trainable_weights, strict=True):
    assert_close(b, a, 1e-12)
  model.set_weights(copy.get_weights())
  assert_close(model(x), copy(x), 1e-12)


class OwnNormalisation(layers.BatchNormalization):
  """A user's subclass."""


class OwnModel(keras.Model):
  """A subclassed model."""

  def __init__(self, **arguments):
    super().__init__(**arguments)
    self.normalise = layers.BatchNormalization(name="bn")

  def call(self, x):
    return self.normalise(x)

  def compute_output_shape(self, shape):
    return shape


class OwnConstructor(keras.Model):
  """A functional model with a constructor of its own."""

  def __init__(self, width):
    x = keras.Input((2, 3))
    super().__init__(x, layers.Dense(width)(x), name="own")


class OwnLayer(layers.Layer):
  """A layer that cannot be made from its configuration."""

  def __init__(self, value):
    super().__init__()
    self.value = value

  def call(self, x):
    return x


def stack(*items):
  return keras.Sequential([keras.Input((2, 3)), *items], name="stack")


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: layers.Dense(2), "A Dense is not a Sequential or functional model"),
    (OwnModel, "A OwnModel is not .* use PerWorkerBatchNormalization in its code"),
    (lambda: stack(OwnModel()), "Layer 'bn' is part of a layer that .* cannot be replaced"),
    (
      lambda: stack(layers.TimeDistributed(layers.BatchNormalization(name="bn"))),
      "Layer 'bn' is part of a layer that .* cannot be replaced",
    ),
    (lambda: OwnConstructor(2), "OwnConstructor does not take .* 'own' would be a plain"),
    (lambda: stack(OwnLayer(object())), "'stack' cannot be copied: .* OwnLayer"),
    (lambda: stack(OwnNormalisation(name="bn")), "'bn' is a OwnNormalisation"),
    (lambda: keras.Sequential([layers.BatchNormalization()]), "is not built; give it a keras.I"),
    (lambda: stack(layers.Masking(), layers.BatchNormalization(name="bn")), "bn takes no mask"),
  ],
)
def test_refuses_models_that_it_cannot_copy(make, message):
  with pytest.raises(UserError, match=message) as raised:
    per_worker_batch_normalization(make(), 2)
  assert len(str(raised.value)) < 800


@pytest.mark.parametrize(
  "options, message",
  [
    ({"axis": 1}, "normalises axis 1 of 3; use the last one"),
    ({"gamma_regularizer": "l2"}, "gamma_regularizer=L2, .* use gamma_regularizer=None"),
    ({"beta_regularizer": "l2"}, "beta_regularizer=L2"),
    ({"gamma_constraint": "non_neg"}, "gamma_constraint=NonNeg"),
    ({"beta_constraint": "non_neg"}, "beta_constraint=NonNeg"),
    ({"renorm": True}, "renorm=True, .* use renorm=False"),
    ({"synchronized": True}, "synchronized=True"),
    ({"momentum": 1}, "momentum must lie in"),
  ],
)
def test_refuses_layers_that_ours_cannot_replace(options, message):
  model = stack(layers.BatchNormalization(name="bn", **options))
  with pytest.raises(UserError, match=f"Layer 'bn'.* {message}"):
    per_worker_batch_normalization(model, 2)


@pytest.mark.parametrize("n", [0, -1, 2.5, None, "2"])
def test_refuses_a_size_that_is_not_a_positive_whole_number(n):
  with pytest.raises(UserError, match=r"per_worker_batch_size=.* is not a positive whole number"):
    per_worker_batch_normalization(stack(layers.BatchNormalization()), n)
