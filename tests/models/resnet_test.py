"""The networks against known sizes, a reference forward pass in TensorFlow, and Keras' own."""

import collections
import functools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch.models import resnet
from tf_largebatch.models.normalization import PerWorkerBatchNormalization

STOCK = functools.partial(keras.layers.BatchNormalization, momentum=0.9, epsilon=1e-5)
# By network: blocks per stage, side of each stage's output (for images of 224 or 32 pixels), number
# of trainable parameters. ResNet-20: stem 432 + 32, stages 14016 + 51072 + 203520, dense 650; one
# more block per stage adds 4672 + 18560 + 73984. ResNet-8: stem 232, stages 1184 + 3520 + 13952,
# dense 330. ResNet-50: 25 557 032 as published, and as in torchvision.
NETWORKS = {
  "resnet8": ((1, 1, 1), (32, 16, 8), 19_218),
  "resnet20": ((3, 3, 3), (32, 16, 8), 269_722),
  "resnet32": ((5, 5, 5), (32, 16, 8), 464_154),
  "resnet56": ((9, 9, 9), (32, 16, 8), 853_018),
  "resnet50": ((3, 4, 6, 3), (56, 28, 14, 7), 25_557_032),
  "resnet101": ((3, 4, 23, 3), (56, 28, 14, 7), 44_549_160),
  "resnet152": ((3, 8, 36, 3), (56, 28, 14, 7), 60_192_808),
}
CIFAR = ("resnet8", "resnet20", "resnet32", "resnet56")
MEAN, STD = (120, 110, 100), (64, 32, 128)


def build(network, normalization=PerWorkerBatchNormalization, **arguments):
  """The network for its usual images; `arguments` are those of `Layers` and `resnet.build`."""
  side, classes = (32, 10) if network in CIFAR else (224, 1000)
  values = {"input_shape": (side, side, 3), "num_classes": classes, "channel_mean": MEAN}
  values |= {"channel_std": STD, **arguments}
  shared = {name: values.pop(name) for name in ("last_gamma", "dtype", "seed") if name in values}
  return resnet.build(network, resnet.Layers(normalization, **shared), **values)


@functools.cache
def default(network):
  """The network with default options; tests must not change its weights."""
  return build(network)


def layers_of(model, kind):
  return [layer for layer in model.layers if isinstance(layer, kind)]


def convolutions(model):
  return layers_of(model, keras.layers.Conv2D)


def normalizations(model):
  """All layers with a gamma, whatever their class."""
  return [layer for layer in model.layers if hasattr(layer, "gamma")]


def randomize(model, seed=0):
  """Sets weights that hide no mistake: gammas neither 0 nor equal, statistics not 0 and 1."""
  rng = np.random.default_rng(seed)
  for layer in normalizations(model):
    channels = layer.gamma.shape
    values = [rng.uniform(0.5, 1, channels), rng.normal(size=channels)]
    layer.set_weights([*values, rng.normal(size=channels), rng.uniform(0.5, 1.5, channels)])


def pixels(model, batch=2, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (batch, *model.input_shape[1:])).astype("f4")


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes(network):
  """Number of parameters, depth, and the shape after each block."""
  blocks, sides, parameters = NETWORKS[network]
  model = default(network) if network in ("resnet20", "resnet50") else build(network)
  assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == parameters
  # The name counts the convolutions, except those of the shortcuts, and the dense layer.
  shortcuts = 0 if network in CIFAR else 4
  assert network == f"resnet{len(convolutions(model)) - shortcuts + 1}"
  first = {"resnet8": 8}.get(network, 16) if network in CIFAR else 256
  assert [tuple(layer.output.shape) for layer in layers_of(model, keras.layers.Add)] == [
    (None, side, side, first * 2**stage)
    for stage, side in enumerate(sides)
    for _ in range(blocks[stage])
  ]
  assert model.output_shape == ((None, 10) if network in CIFAR else (None, 1000))


def faults(model):
  """Structural differences between a bottleneck ResNet and the paper's network (§5.1)."""
  found = set()
  strided = [layer for layer in convolutions(model) if layer.strides != (1, 1)]
  kernels = collections.Counter(layer.kernel_size for layer in strided)
  # Three stages halve the image, each in one 3x3 convolution and in the shortcut's widening 1x1.
  narrowing = [
    layer.name
    for layer in strided
    if layer.kernel_size == (1, 1) and layer.filters < layer.input.shape[-1]
  ]
  if kernels != {(7, 7): 1, (3, 3): 3, (1, 1): 3} or narrowing:
    found.add("stride")
  if any(layer.strides not in {(1, 1), (2, 2)} for layer in strided):
    found.add("stride")
  if any(layer.use_bias for layer in convolutions(model)):
    found.add("bias")
  if any(layer.momentum != 0.9 for layer in normalizations(model)):
    found.add("momentum")
  gammas = [layer.gamma.numpy() for layer in normalizations(model)]
  zeros = sum(np.all(gamma == 0) for gamma in gammas)
  ones = sum(np.all(gamma == 1) for gamma in gammas)
  adds = len(layers_of(model, keras.layers.Add))
  if (zeros, ones) != (adds, len(gammas) - adds):
    found.add("gamma")
  return found


def test_builds_the_papers_network_unlike_keras():
  """The same checks find all four differences in keras.applications' ResNet-50."""
  assert faults(default("resnet50")) == set()
  assert faults(build("resnet50", STOCK, last_gamma=1.0)) == {"gamma"}
  stock = keras.applications.ResNet50(weights=None)
  assert faults(stock) == {"stride", "bias", "momentum", "gamma"}


@pytest.mark.parametrize("network", ["resnet20", "resnet50"])
def test_each_block_is_relu_of_its_shortcut_at_initialisation(network):
  """Holds exactly only if the last gamma of each branch, and no other gamma, is 0."""
  model = build(network, input_shape=(32, 32, 3))
  names = [layer.name.removesuffix("_add") for layer in layers_of(model, keras.layers.Add)]
  projected = {
    layer.name.removesuffix("_shortcut_bn"): layer.output
    for layer in normalizations(model)
    if layer.name.endswith("_shortcut_bn")
  }
  assert len(projected) == (4 if network == "resnet50" else 0)
  outputs = [model.get_layer(f"{name}_out").output for name in names]
  # The first block follows the pooling in resnet50 and the stem in resnet20.
  start = model.get_layer("stem_pool" if network == "resnet50" else "stem_relu").output
  inside = keras.Model(model.input, [start, outputs, projected])
  for training in (False, True):
    values = inside(pixels(model), training=training)
    previous, ys, shortcuts = keras.tree.map_structure(np.asarray, values)
    for name, y in zip(names, ys, strict=True):
      shortcut = shortcuts.get(name, previous)
      if shortcut.shape != y.shape:
        # Option A: every second pixel, and equally many zero channels before and after.
        shortcut = shortcut[:, ::2, ::2]
        zeros = np.zeros_like(shortcut[..., : shortcut.shape[-1] // 2])
        shortcut = np.concatenate([zeros, shortcut, zeros], axis=-1)
      assert np.max(shortcut) > 0.1
      np.testing.assert_array_equal(y, np.maximum(shortcut, 0))
      previous = y


def reference_logits(model, images, blocks):
  """A second implementation of the network in float64, with explicit padding and named weights."""

  def convolution(x, name, strides=1):
    kernel = model.get_layer(f"{name}_conv").kernel.numpy()
    pad = [(kernel.shape[0] - 1) // 2] * 2
    return tf.nn.conv2d(x, kernel, strides, [[0, 0], pad, pad, [0, 0]])

  def normalize(x, name):
    layer = model.get_layer(f"{name}_bn")
    gamma, beta, mean, variance = (w.astype(np.float64) for w in layer.get_weights())
    return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta

  def unit(x, name, strides=1):
    return tf.nn.relu(normalize(convolution(x, name, strides), name))

  bottleneck = len(blocks) == 4
  x = (images.astype(np.float64) - MEAN) / STD
  x = unit(x, "stem", 2 if bottleneck else 1)
  if bottleneck:
    x = tf.nn.max_pool2d(x, 3, 2, [[0, 0], [1, 1], [1, 1], [0, 0]])
  for stage, count in enumerate(blocks):
    for block in range(count):
      name = f"stage{stage + 1}_block{block + 1}"
      strides = 2 if stage and not block else 1
      shortcut = x
      if bottleneck:
        if not block:
          shortcut = convolution(x, f"{name}_shortcut", strides)
          shortcut = normalize(shortcut, f"{name}_shortcut")
        y = unit(unit(x, f"{name}_1"), f"{name}_2", strides)
        y = normalize(convolution(y, f"{name}_3"), f"{name}_3")
      else:
        if strides == 2:
          half = x.shape[-1] // 2
          shortcut = tf.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [half, half]])
        y = normalize(convolution(unit(x, f"{name}_1", strides), f"{name}_2"), f"{name}_2")
      x = tf.nn.relu(y + shortcut)
  kernel, bias = model.get_layer("logits").get_weights()
  return tf.reduce_mean(x, [1, 2]).numpy() @ kernel + bias


@pytest.mark.parametrize("network, side", [("resnet20", 32), ("resnet50", 76)])
def test_the_whole_forward_pass_equals_the_reference(network, side):
  """Covers symmetric padding, strides, shortcuts, pooling and the normalisation of pixels.

  76 pixels become 38, 19, 10, 5 and 3, so the strided layers see even and odd sides. Keras' "same"
  would pad the even ones on one side only.
  """
  model = build(network, input_shape=(side, side, 3), dtype="float64")
  randomize(model)
  images = pixels(model)
  expected = reference_logits(model, images, NETWORKS[network][0])
  actual = model(images).numpy()
  assert actual.dtype == np.float64
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.max(np.abs(expected)))


@pytest.mark.parametrize(
  "dtype, tolerance",
  [
    ("float32", 1e-6),
    ("float64", 1e-14),
  ],
)
def test_normalises_pixels_per_channel(dtype, tolerance):
  model = build("resnet20", channel_mean=(10, 20, 30), channel_std=(2, 4, 5), dtype=dtype)
  normalized = keras.Model(model.input, model.get_layer("normalize_channels").output)
  image = np.zeros((1, 32, 32, 3))
  image[0, 0, 0], image[0, 31, 31] = (12, 28, 20), (255, 0, 31)
  actual = normalized(image).numpy()[0]
  assert actual.dtype == dtype
  actual = [actual[0, 0], actual[31, 31], actual[5, 7]]
  expected = [(1, 2, -2), (122.5, -5, 0.2), (-5, -5, -6)]
  # The offset -6 and the terms of 122.5 are rounded before the addition.
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=6 * tolerance)


def test_initial_values():
  """He et al.: untruncated normal with variance 2 / fan-out; dense layer N(0, 0.01²), bias 0."""
  model = default("resnet50")
  dense, bias = model.get_layer("logits").weights
  spreads = [(dense, 0.01)]
  for layer in convolutions(model):
    spreads.append((layer.kernel, np.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.filters))))
  for weight, spread in spreads:
    values = weight.numpy().astype(np.float64) / spread
    # Five standard errors of the mean and of the standard deviation of a normal distribution.
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * values.size)
    if values.size > 1e5:
      # Keras' truncated normal ends at 2.27; one in 200 normal values lies beyond 2.8.
      assert np.mean(np.abs(values) > 2.8) == pytest.approx(0.0051103, rel=0.25)
  np.testing.assert_array_equal(bias, 0)
  for layer in normalizations(model):
    np.testing.assert_array_equal(layer.beta, 0)
    np.testing.assert_array_equal(layer.moving_mean, 0)
    np.testing.assert_array_equal(layer.moving_variance, 1)


def kernels_of(model):
  return {layer.name: layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel")}


def test_initial_weights_depend_on_seed_and_layer_only():
  keras.utils.set_random_seed(1)
  kernels = kernels_of(default("resnet20"))
  keras.utils.set_random_seed(2)
  other = kernels_of(build("resnet20", seed=1))
  same = [build("resnet20"), build("resnet20", STOCK, dtype="mixed_bfloat16"), build("resnet32")]
  for twin in map(kernels_of, same):
    for name, kernel in kernels.items():
      np.testing.assert_array_equal(kernel, twin[name])
  for name, kernel in kernels.items():
    assert not np.any(kernel == other[name])
  # No two layers share their draws. Compares as many as the smallest kernel has, standardised.
  draws = [np.ravel(kernel)[:432] / kernel.std() for kernel in kernels.values()]
  correlation = np.corrcoef(draws) - np.eye(20)
  assert np.max(np.abs(correlation)) < 0.25  # 5 standard errors of 432 pairs.


@pytest.mark.parametrize("network", ["resnet20", "resnet50"])
def test_mixed_bfloat16(network):
  """Input, weights, global pooling, dense layer and logits are float32, the rest is bfloat16."""
  model = build(network, input_shape=(64, 64, 3), dtype="mixed_bfloat16")
  twin = build(network, input_shape=(64, 64, 3))
  randomize(model)
  twin.set_weights(model.get_weights())
  assert {w.dtype for w in model.weights} == {"float32"}
  for layer in [*convolutions(model), *normalizations(model), *layers_of(model, keras.layers.Add)]:
    assert layer.compute_dtype == "bfloat16"
  for name in ("normalize_channels", "pool", "logits"):
    assert model.get_layer(name).compute_dtype == "float32"
  images = pixels(model)
  actual, expected = model(images), twin(images).numpy()
  assert model.output.dtype == actual.dtype == "float32"
  assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
  # The logits are not rounded to bfloat16.
  assert np.any(tf.cast(tf.cast(actual, tf.bfloat16), tf.float32) != actual)


@functools.cache
def exported(network):
  """(a network of our layers with random weights, one of Keras' layers with the same weights)."""
  ours = functools.partial(PerWorkerBatchNormalization, 4)
  trained = build(network, ours, input_shape=(32, 32, 3))
  export = build(network, STOCK, input_shape=(32, 32, 3))
  randomize(trained)
  export.set_weights(trained.get_weights())
  return trained, export


@pytest.mark.parametrize("network", ["resnet20", "resnet50"])
def test_keras_layers_take_the_weights_in_the_same_order(network):
  trained, export = exported(network)
  names = [[(w.name, w.shape) for w in model.weights] for model in (trained, export)]
  assert names[0] == names[1]
  assert [layer.name for layer in trained.layers] == [layer.name for layer in export.layers]
  assert all(type(layer).__module__.startswith("keras.") for layer in export.layers)
  expected = trained(pixels(trained)).numpy()
  actual = export(pixels(trained)).numpy()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


LOAD = """
import sys
sys.modules["tf_largebatch"] = None  # Any import of it fails.
import keras
import numpy as np
model = keras.models.load_model("model.keras")
np.save("logits.npy", model(np.load("images.npy")))
"""


def test_a_saved_export_loads_without_this_package(tmp_path):
  trained, export = exported("resnet20")
  export.save(tmp_path / "model.keras")
  np.save(tmp_path / "images.npy", pixels(trained))
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  subprocess.run(
    [sys.executable, "-c", LOAD],
    cwd=tmp_path,
    env={**environment, "TF_CPP_MIN_LOG_LEVEL": "2"},
    check=True,
  )
  expected = trained(pixels(trained)).numpy()
  actual = np.load(tmp_path / "logits.npy")
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize(
  "network, bad, message",
  [
    ("resnet51", {}, "resnet51.*resnet50"),
    ("resnet20", {"channel_std": (1, 1)}, "channel_std"),
  ],
)
def test_rejects_bad_arguments(network, bad, message):
  with pytest.raises(ValueError, match=message):
    build(network, **bad)
