"""The reference itself: gradients against finite differences, rules against hand figures."""

import math

import numpy as np
import pytest

from tools.conformance import reference

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 55.0, 50.0]
CLASSES = 5


def _blocks(counts):
  return [(s, b) for s, count in enumerate(counts, 1) for b in range(1, count + 1)]


def _layers(network):
  """Every layer, at widths of 2 to 8: (name, kernel size, channels in, channels out)."""
  if network == "plain":
    return [("conv1", 3, 3, 4), ("conv2", 3, 4, 5)], 5
  if network == "small_residual":
    return [
      ("stem", 3, 3, 3),
      ("block1_1", 1, 3, 2),
      ("block1_2", 3, 2, 3),
      ("block1_3", 1, 3, 4),
      ("block1_shortcut", 1, 3, 4),
      ("block2_1", 3, 4, 2),
      ("block2_2", 3, 2, 4),
    ], 4
  layers = [("stem", 3 if network == "resnet20" else 7, 3, 2)]
  channels = 2
  if network == "resnet20":
    for stage, block in _blocks((3, 3, 3)):
      width = {1: 2, 2: 5, 3: 8}[stage]  # An odd number of added channels, and another.
      name = f"stage{stage}_block{block}"
      layers += [(f"{name}_1", 3, channels, width), (f"{name}_2", 3, width, width)]
      channels = width
    return layers, channels
  for stage, block in _blocks((3, 4, 6, 3)):
    name = f"stage{stage}_block{block}"
    layers += [(f"{name}_1", 1, channels, 2), (f"{name}_2", 3, 2, 2), (f"{name}_3", 1, 2, 4)]
    if block == 1:
      layers.append((f"{name}_shortcut", 1, channels, 4))
    channels = 4
  return layers, channels


def _parameters(network, seed=0):
  rng = np.random.default_rng(seed)
  layers, features = _layers(network)
  parameters = {
    "logits/kernel": rng.normal(size=(features, CLASSES)),
    "logits/bias": rng.normal(size=CLASSES),
  }
  for name, size, channels, width in layers:
    conv = name if network == "plain" else f"{name}_conv"
    scale = math.sqrt(2 / (size * size * channels))
    parameters[f"{conv}/kernel"] = rng.normal(scale=scale, size=(size, size, channels, width))
    if network != "plain":
      parameters[f"{name}_bn/gamma"] = rng.uniform(0.5, 1.5, width)
      parameters[f"{name}_bn/beta"] = rng.normal(scale=0.3, size=width)
  return parameters


def _batch(*shape, size=8, seed=1):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*shape, size, size, 3)), rng.integers(0, CLASSES, shape)


def _slope(function, array, direction, step):
  """The central difference of function() along direction, array changed in place."""
  original = array.copy()
  array[...] = original + step * direction
  ahead = function()
  array[...] = original - step * direction
  behind = function()
  array[...] = original
  return (ahead - behind) / (2 * step)


def _assert_gradient(function, array, gradient, *, step=1e-5, tolerance=1e-8):
  """Every element of a small array's gradient, relative to the largest of them."""
  assert gradient.shape == array.shape
  numeric = np.zeros_like(array)
  for index in np.ndindex(array.shape):
    direction = np.zeros_like(array)
    direction[index] = 1.0
    numeric[index] = _slope(function, array, direction, step)
  np.testing.assert_allclose(gradient, numeric, rtol=0, atol=tolerance * np.abs(numeric).max())


# Each operation alone.


def _convolution(stride):
  return lambda tape, x: tape.convolution(x, "layer", stride=stride)


OPERATIONS = {
  "convolution_stride1": _convolution(1),
  "convolution_stride2": _convolution(2),
  "batch_norm": lambda tape, x: tape.batch_norm(x, "layer"),
  "relu": lambda tape, x: tape.relu(x),
  "tanh": lambda tape, x: tape.tanh(x),
  "add": lambda tape, x: tape.add(x, tape.relu(x)),
  "max_pool": lambda tape, x: tape.max_pool(x),
  "subsample_and_pad": lambda tape, x: tape.subsample_and_pad(x, stride=2, width=6),
  "global_average": lambda tape, x: tape.global_average(x),
  "dense": lambda tape, x: tape.dense(tape.global_average(x), "layer_dense"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [5, 6])
def test_operation_gradient(operation, size):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, size, size, 3))
  parameters = {
    "layer/kernel": rng.normal(size=(3, 3, 3, 2)),
    "layer/gamma": rng.normal(size=3),
    "layer/beta": rng.normal(size=3),
    "layer_dense/kernel": rng.normal(size=(3, 4)),
    "layer_dense/bias": rng.normal(size=4),
  }

  def run():
    tape = reference.Tape(parameters, epsilon=0.1)
    node = reference.Node(x.copy())
    return tape, node, OPERATIONS[operation](tape, node)

  tape, node, output = run()
  weights = rng.normal(size=output.value.shape)
  tape.backward(output, weights)

  def loss():
    return float((run()[2].value * weights).sum())

  _assert_gradient(loss, x, node.gradient)
  used = {
    "convolution_stride1": ["layer/kernel"],
    "convolution_stride2": ["layer/kernel"],
    "batch_norm": ["layer/gamma", "layer/beta"],
    "dense": ["layer_dense/kernel", "layer_dense/bias"],
  }
  assert sorted(tape.gradients) == sorted(used.get(operation, []))
  for key, gradient in tape.gradients.items():
    _assert_gradient(loss, parameters[key], gradient)


def _tape(**arrays):
  return reference.Tape(arrays, epsilon=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("image", [7, 8])
def test_convolution_is_the_sum_pixel_by_pixel(stride, size, image):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, image, image, 3)), rng.normal(size=(size, size, 3, 2))
  value = _tape(**{"c/kernel": kernel}).convolution(reference.Node(x), "c", stride=stride).value
  padding, output = (size - 1) // 2, math.ceil(image / stride)
  assert value.shape == (2, output, output, 2)
  for n, h, w in np.ndindex(2, output, output):
    expected = np.zeros(2)
    for i, j in np.ndindex(size, size):
      row, column = h * stride + i - padding, w * stride + j - padding
      if 0 <= row < image and 0 <= column < image:
        expected += x[n, row, column] @ kernel[i, j]
    np.testing.assert_allclose(value[n, h, w], expected, rtol=0, atol=1e-12)


def test_max_pool_by_hand():
  x = np.arange(1.0, 17.0).reshape(1, 4, 4, 1)
  x[0, 0, 0] = 40
  tape, node = _tape(), reference.Node(x)
  output = tape.max_pool(node)
  assert output.value[0, :, :, 0].tolist() == [[40, 8], [14, 16]]
  tape.backward(output, np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 2, 1))
  expected = np.zeros((4, 4))
  expected[0, 0], expected[1, 3], expected[3, 1], expected[3, 3] = 1, 2, 3, 4
  np.testing.assert_array_equal(node.gradient[0, :, :, 0], expected)


def test_max_pool_of_equal_values_passes_the_gradient_once():
  tape, node = _tape(), reference.Node(np.ones((1, 4, 4, 1)))
  tape.backward(tape.max_pool(node), np.ones((1, 2, 2, 1)))
  assert node.gradient.sum() == 4


def test_batch_norm_values_and_statistics():
  x = np.array([1.0, 3.0, 5.0, 11.0]).reshape(2, 2, 1, 1)  # Mean 5, Σ of squares 16+4+0+36 = 56.
  tape = reference.Tape({"b/gamma": np.array([2.0]), "b/beta": np.array([1.0])}, epsilon=2.0)
  output = tape.batch_norm(reference.Node(x), "b").value.ravel()
  np.testing.assert_allclose(output, [-1, 0, 1, 4], atol=1e-15)  # 2·(x − 5)/√(14 + 2) + 1.
  assert tape.means["b"] == [5]
  np.testing.assert_allclose(tape.variances["b"], [56 / 3])


def test_activations_sum_average_and_dense_by_hand():
  tape = _tape(**{"d/kernel": np.array([[2.0, -1.0]]), "d/bias": np.array([0.5, 1.0])})
  x = reference.Node(np.array([-3.0, -0.01, 0.0, 0.02]).reshape(1, 2, 2, 1))
  rectified = tape.relu(x)
  assert rectified.value.ravel().tolist() == [0, 0, 0, 0.02]
  total = tape.add(rectified, x)
  np.testing.assert_allclose(total.value.ravel(), [-3, -0.01, 0, 0.04])
  average = tape.global_average(total)
  np.testing.assert_allclose(average.value, [[-2.97 / 4]])
  output = tape.dense(average, "d")
  np.testing.assert_allclose(output.value, [[0.5 - 1.485, 1 + 0.7425]])
  tape.backward(output, np.array([[1.0, 0.0]]))
  # 2/4 for each pixel, twice where the ReLU lets it through; at 0 it does not.
  np.testing.assert_allclose(x.gradient.ravel(), [0.5, 0.5, 0.5, 1.0])


def test_shortcut_a_pads_on_both_sides():
  x = np.arange(16.0).reshape(1, 4, 4, 1)
  value = _tape().subsample_and_pad(reference.Node(x), stride=2, width=4).value  # 3 more: 1 and 2.
  assert value[0, :, :, 1].tolist() == [[0, 2], [8, 10]]
  assert not value[..., [0, 2, 3]].any()


# The networks.


class _Shape:
  """Records the layers and strides of a network; a value is (pixels' stride so far, name)."""

  def __init__(self):
    self.value = np.zeros((1, 1, 1, 8))
    self.calls = []

  def convolution(self, x, name, *, stride=1):
    self.calls.append((name, stride))
    return x

  def batch_norm(self, x, name):
    self.calls.append((name, None))
    return x

  def relu(self, x):
    self.calls.append(("relu", None))
    return x

  def tanh(self, x):
    self.calls.append(("tanh", None))
    return x

  def add(self, x, y):
    self.calls.append(("add", None))
    return x

  def max_pool(self, x, *, size, stride):
    self.calls.append((f"max_pool{size}", stride))
    return x

  def subsample_and_pad(self, x, *, stride, width):
    self.calls.append(("subsample", stride))
    return x

  def global_average(self, x):
    self.calls.append(("average", None))
    return x

  def dense(self, x, name):
    self.calls.append((name, None))
    return x


def _calls(network):
  ops = _Shape()
  reference.NETWORKS[network](ops, ops)
  return ops.calls


def _unit(name, stride=1, activation="relu"):
  return [(f"{name}_conv", stride), (f"{name}_bn", None), (activation, None)]


def _bottleneck(name, stride, projection, activation="relu"):
  calls = _unit(f"{name}_1", 1, activation) + _unit(f"{name}_2", stride, activation)
  calls += _unit(f"{name}_3")[:2]
  calls += _unit(f"{name}_shortcut", stride)[:2] if projection else []
  return [*calls, ("add", None), (activation, None)]


END = [("average", None), ("logits", None)]


def test_plain_layers():
  assert _calls("plain") == [("conv1", 1), ("tanh", None), ("conv2", 2), ("tanh", None), *END]


def test_small_residual_layers():
  units = _unit("block2_1", 1, "tanh") + _unit("block2_2")[:2]
  block2 = [*units, ("add", None), ("tanh", None)]
  block1 = _bottleneck("block1", 2, True, "tanh")
  assert _calls("small_residual") == [*_unit("stem", 1, "tanh"), *block1, *block2, *END]


def test_resnet20_layers():
  expected = _unit("stem")
  for stage, block in _blocks((3, 3, 3)):
    down = (stage, block) in ((2, 1), (3, 1))
    name = f"stage{stage}_block{block}"
    expected += _unit(f"{name}_1", 2 if down else 1) + _unit(f"{name}_2")[:2]
    expected += ([("subsample", 2)] if down else []) + [("add", None), ("relu", None)]
  assert _calls("resnet20") == expected + END


def test_resnet50_has_its_strides_on_the_3x3():
  expected = [*_unit("stem", 2), ("max_pool3", 2)]
  for stage, block in _blocks((3, 4, 6, 3)):
    stride = 2 if (stage, block) in ((2, 1), (3, 1), (4, 1)) else 1
    expected += _bottleneck(f"stage{stage}_block{block}", stride, block == 1)
  calls = _calls("resnet50")
  assert calls == expected + END
  # 50 layers with weights: all convolutions but the 4 shortcuts, and the dense one.
  assert sum(name.endswith("_conv") for name, _ in calls) - 4 + 1 == 50


@pytest.mark.parametrize("network", reference.NETWORKS)
def test_last_batch_norms(network):
  """The batch normalisation before each sum, of the main branch."""
  expected, previous = [], None
  for name, _ in _calls(network):
    if name.endswith("_bn") and not name.endswith("_shortcut_bn"):
      previous = name
    if name == "add":
      expected.append(previous)
  assert reference.last_batch_norms(network) == expected
  assert len(expected) == {"plain": 0, "small_residual": 2, "resnet20": 9, "resnet50": 16}[network]


@pytest.mark.parametrize(("network", "smoothing"), [("plain", 0.0), ("small_residual", 0.1)])
def test_every_gradient_of_a_small_network(network, smoothing):
  parameters = _parameters(network)
  images, labels = _batch(4)

  def run():
    return reference.worker_pass(
      network, parameters, images, labels, mean=MEAN, std=STD, label_smoothing=smoothing
    )

  gradients = run().gradients
  assert gradients.keys() == parameters.keys()
  for key, gradient in gradients.items():
    # A step small enough that no ReLU changes its side.
    _assert_gradient(lambda: run().loss_sum, parameters[key], gradient, step=1e-6, tolerance=1e-7)


@pytest.mark.parametrize(("network", "n", "size"), [("resnet20", 4, 8), ("resnet50", 6, 40)])
def test_deep_network_gradient_of_every_array(network, n, size):
  """Along a random direction in each array: 65 and 161 of them."""
  parameters = _parameters(network)
  images, labels = _batch(n, size=size)
  rng = np.random.default_rng(2)
  worker = reference.worker_pass(network, parameters, images, labels, mean=MEAN, std=STD)
  assert worker.gradients.keys() == parameters.keys()

  def loss():
    logits = reference.forward(network, parameters, images, mean=MEAN, std=STD)
    return sum(reference.cross_entropy(*pair, 0.0)[0] for pair in zip(logits, labels, strict=True))

  assert worker.loss_sum == pytest.approx(loss(), rel=1e-12)
  for key, gradient in worker.gradients.items():
    direction = rng.normal(size=gradient.shape)
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
    # The loss moves by some 1e-5 at most: so little that no ReLU changes its side.
    numeric = _slope(loss, parameters[key], direction, 1e-5 / scale)
    assert (gradient * direction).sum() == pytest.approx(numeric, rel=0, abs=1e-6 * scale), key


def test_forward_infers_by_moving_statistics():
  """By the batch's own statistics as moving ones, inference is training; by others it is not."""
  parameters = _parameters("small_residual")
  images, labels = _batch(6)
  keywords = {"mean": MEAN, "std": STD}
  worker = reference.worker_pass("small_residual", parameters, images, labels, **keywords)
  counts = {name: 6 * (64 if name in ("stem_bn", "block1_1_bn") else 16) for name in worker.means}
  statistics = {}
  for name, count in counts.items():
    statistics[f"{name}/moving_mean"] = worker.means[name]
    statistics[f"{name}/moving_variance"] = worker.variances[name] * (count - 1) / count
  trained = reference.forward("small_residual", parameters, images, **keywords)
  keywords["statistics"] = statistics
  inferred = reference.forward("small_residual", parameters, images, **keywords)
  np.testing.assert_allclose(inferred, trained, rtol=1e-10)
  # An image's logits then depend on no other image.
  alone = reference.forward("small_residual", parameters, images[2:3], **keywords)
  np.testing.assert_allclose(alone[0], inferred[2], rtol=1e-10)
  statistics["stem_bn/moving_mean"] = statistics["stem_bn/moving_mean"] + 0.1
  other = reference.forward("small_residual", parameters, images, **keywords)
  assert np.abs(other - trained).max() > 1e-3


def test_pixels_are_normalised_by_channel():
  """A dense network's worth: zero kernels but one 1, so a logit is one pixel's tanh(tanh(x))."""
  parameters = {key: np.zeros_like(p) for key, p in _parameters("plain").items()}
  parameters["conv1/kernel"][1, 1, 2, 0] = 1
  parameters["conv2/kernel"][1, 1, 0, 0] = 1
  parameters["logits/kernel"][0, 3] = 1
  images = np.full((1, 8, 8, 3), 200, np.uint8)
  logits = reference.forward("plain", parameters, images, mean=MEAN, std=STD)
  np.testing.assert_allclose(
    logits, [[0, 0, 0, math.tanh(math.tanh((200 - 100) / 50)), 0]], rtol=1e-12
  )


# The loss.


def test_cross_entropy_by_hand():
  logits = np.log([0.5, 0.25, 0.25]) + 1000
  loss, gradient = reference.cross_entropy(logits, 1, 0.0)
  assert loss == pytest.approx(math.log(4), rel=1e-9)
  np.testing.assert_allclose(gradient, [0.5, -0.75, 0.25], atol=1e-9)


def test_label_smoothing_by_hand():
  loss, gradient = reference.cross_entropy(np.log([0.5, 0.25, 0.25]), 1, 0.3)
  # Targets 0.1, 0.8, 0.1.
  assert loss == pytest.approx(0.1 * math.log(2) + 0.9 * math.log(4))
  np.testing.assert_allclose(gradient, [0.4, -0.55, 0.15])


def test_error_count():
  parameters = _parameters("plain")
  parameters["logits/kernel"][:] = 0
  parameters["logits/bias"][:] = [0, 0, 9, 0, 0]
  images, _ = _batch(4)
  worker = reference.worker_pass(
    "plain", parameters, images, np.array([2, 0, 2, 1]), mean=MEAN, std=STD
  )
  assert worker.error_count == 2


# Workers: eq. 5 to 7 and remark 3.


def _minibatch(network, parameters, images, labels):
  return reference.minibatch(network, parameters, images, labels, mean=MEAN, std=STD)


def test_minibatch_is_the_mean_of_its_workers():
  parameters = _parameters("small_residual")
  images, labels = _batch(3, 4)
  whole = _minibatch("small_residual", parameters, images, labels)
  workers = [
    reference.worker_pass("small_residual", parameters, *pair, mean=MEAN, std=STD)
    for pair in zip(images, labels, strict=True)
  ]
  assert whole.loss == pytest.approx(sum(w.loss_sum for w in workers) / 12, rel=1e-12)
  assert whole.error == sum(w.error_count for w in workers) / 12
  for key in parameters:
    expected = (
      workers[0].gradients[key] + workers[1].gradients[key] + workers[2].gradients[key]
    ) / 12
    np.testing.assert_allclose(whole.gradients[key], expected, rtol=1e-10, atol=1e-14)
  assert len(whole.means) == len(whole.variances) == 7
  for name in whole.means:
    for field in ("means", "variances"):
      expected = np.mean([getattr(w, field)[name] for w in workers], axis=0)
      np.testing.assert_allclose(getattr(whole, field)[name], expected, rtol=1e-12)


@pytest.mark.parametrize(("network", "same"), [("plain", True), ("small_residual", False)])
def test_the_number_of_workers_matters_only_with_batch_norm(network, same):
  """Without batch normalisation only kn counts; with it, n changes the loss itself (§2.3)."""
  parameters = _parameters(network)
  images, labels = _batch(2, 4)
  two = _minibatch(network, parameters, images, labels)
  one = _minibatch(network, parameters, images.reshape(1, 8, 8, 8, 3), labels.reshape(1, 8))
  if same:
    assert one.loss == pytest.approx(two.loss, rel=1e-12)
  else:
    assert abs(one.loss - two.loss) > 1e-3
  difference = max(np.abs(one.gradients[key] - two.gradients[key]).max() for key in parameters)
  assert difference < 1e-12 if same else difference > 1e-3


def test_permuting_images_within_and_between_workers():
  """Within a worker no order counts; an exchange between workers changes the statistics."""
  parameters = _parameters("small_residual")
  images, labels = _batch(2, 4)
  whole = _minibatch("small_residual", parameters, images, labels)
  within = _minibatch("small_residual", parameters, images[:, ::-1], labels[:, ::-1])
  assert within.loss == pytest.approx(whole.loss, rel=1e-12)
  images[[0, 1], 0], labels[[0, 1], 0] = images[[1, 0], 0], labels[[1, 0], 0]
  between = _minibatch("small_residual", parameters, images, labels)
  assert abs(between.loss - whole.loss) > 1e-6


# The learning rate.


def _rate(t, **changes):
  recipe = {"steps_per_epoch": 10, "batch": 8192, "reference_rate": 0.1, "reference_batch": 256}
  return reference.rate(t, **{**recipe, **changes})


@pytest.mark.parametrize(
  ("t", "expected"),
  [
    (0, 0.1),
    (1, 0.162),  # 0.1 + 3.1/50.
    (25, 1.65),
    (49, 3.138),
    (50, 3.2),
    (299, 3.2),
    (300, 0.32),
    (599, 0.32),
    (600, 0.032),
    (799, 0.032),
    (800, 0.0032),
    (899, 0.0032),
  ],
)
def test_rate_of_the_headline(t, expected):
  assert _rate(t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
  ("t", "changes", "expected"),
  [
    (0, {"warmup": "constant"}, 0.1),
    (49, {"warmup": "constant"}, 0.1),
    (50, {"warmup": "constant"}, 3.2),
    (0, {"warmup": "none"}, 3.2),
    (300, {"warmup": "none"}, 0.32),
    (50, {"scaling": "sqrt"}, 0.1 * math.sqrt(32)),
    (25, {"scaling": "sqrt"}, 0.05 + 0.05 * math.sqrt(32)),
    (0, {"scaling": "none"}, 0.1),
    (200, {"scaling": "none"}, 0.1),
    (0, {"batch": 256}, 0.1),
    (0, {"batch": 128}, 0.05),  # No warmup down to a smaller rate.
    (300, {"batch": 128}, 0.005),
    (0, {"batch": 512}, 0.1),
    (50, {"batch": 512}, 0.2),
    (51, {"steps_per_epoch": 10.4}, 0.1 + 3.1 * 51 / 52),
    (52, {"steps_per_epoch": 10.4}, 3.2),
    (311, {"steps_per_epoch": 10.4}, 3.2),
    (312, {"steps_per_epoch": 10.4}, 0.32),
    (309, {"steps_per_epoch": 10.32}, 3.2),
    (310, {"steps_per_epoch": 10.32}, 0.32),  # 309.6, rounded.
    (20, {"decay_epochs": (2.0,), "decay_factor": 0.5, "warmup": "none"}, 1.6),
    (20, {"decay_epochs": (2.0,), "decay_factor": 0.5}, 1.34),
    (50, {"decay_epochs": (2.0,), "decay_factor": 0.5}, 1.6),
  ],
)
def test_rate_of_the_ablations(t, changes, expected):
  assert _rate(t, **changes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", [{"warmup": "gradually"}, {"scaling": "cubic"}])
def test_rate_refuses_unknown_names(changes):
  with pytest.raises((ValueError, KeyError)):
    _rate(1000, **changes)


# The step.


def _scalar_batch(g, **arrays):
  return reference.Minibatch(0.0, 0.0, {"a/kernel": np.array([g])}, **arrays)


def _trajectory(rates, gradients, **settings):
  """The weight and the moment after each step, from w = 1."""
  state = reference.initial_state({"a/kernel": np.array([1.0])}, {})
  weights, moments = [], []
  for eta, g in zip(rates, gradients, strict=True):
    state = reference.sgd_step(state, _scalar_batch(g, means={}, variances={}), eta, **settings)
    weights.append(float(state.parameters["a/kernel"][0]))
    moments.append(float(state.momentum["a/kernel"][0]))
  return weights, moments


@pytest.mark.parametrize(
  ("correction", "nesterov", "weights", "moments"),
  [
    # m = 0.5, η = 0.1 then 0.2, g = 2 then −1: u = 2, 0.
    (True, False, [0.8, 0.8], [2, 0]),
    (True, True, [0.7, 0.9], [2, 0]),  # −0.1·(1 + 2), then −0.2·(0 − 1).
    # v = 0.2, then 0.1 − 0.2 = −0.1.
    (False, False, [0.8, 0.9], [0.2, -0.1]),
    (False, True, [0.7, 0.95], [0.2, -0.1]),  # −(0.1 + 0.2), then −(−0.05 − 0.2).
  ],
)
def test_two_steps_by_hand(correction, nesterov, weights, moments):
  settings = {"momentum": 0.5, "momentum_correction": correction, "nesterov": nesterov}
  found = _trajectory([0.1, 0.2], [2.0, -1.0], **settings)
  np.testing.assert_allclose(found, [weights, moments], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_eq_10_is_eq_9_only_at_a_constant_rate(nesterov):
  gradients = [2.0, -1.0, 0.5, 3.0]
  for rates, same in (([0.1] * 4, True), ([0.1, 0.1, 0.2, 0.2], False)):
    corrected, _ = _trajectory(rates, gradients, nesterov=nesterov, momentum_correction=True)
    stale, _ = _trajectory(rates, gradients, nesterov=nesterov, momentum_correction=False)
    np.testing.assert_allclose(stale[:2], corrected[:2], rtol=1e-12)
    assert np.allclose(stale, corrected, rtol=1e-12) == same


def test_corrected_eq_10_is_eq_9():
  """Remark 2: v ← m·(η_{t+1}/η_t)·v + η_{t+1}·g."""
  rates, gradients = [0.1, 0.3, 0.3, 0.02], [2.0, -1.0, 0.5, 3.0]
  found, _ = _trajectory(rates, gradients, nesterov=False)
  w, v, previous, expected = 1.0, 0.0, rates[0], []
  for eta, g in zip(rates, gradients, strict=True):
    v = 0.9 * eta / previous * v + eta * g
    w, previous = w - v, eta
    expected.append(w)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_weight_decay_is_for_kernels_once_and_inside_the_momentum():
  names = ["a/kernel", "a/bias", "b/gamma", "b/beta"]
  state = reference.initial_state({name: np.array([2.0]) for name in names}, {})
  batch = reference.Minibatch(0.0, 0.0, {name: np.array([1.0]) for name in names}, {}, {})
  after = reference.sgd_step(state, batch, 0.1, momentum=0.5, nesterov=False, weight_decay=0.25)
  assert {key: float(u[0]) for key, u in after.momentum.items()} == {
    "a/kernel": 1.5,
    "a/bias": 1.0,
    "b/gamma": 1.0,
    "b/beta": 1.0,
  }
  assert after.parameters["a/kernel"][0] == pytest.approx(1.85)
  assert after.parameters["b/gamma"][0] == pytest.approx(1.9)
  stale = reference.sgd_step(
    state, batch, 0.1, momentum=0.5, nesterov=False, weight_decay=0.25, momentum_correction=False
  )
  assert stale.momentum["a/kernel"][0] == pytest.approx(0.15)
  # The state before is left as it was.
  assert state.parameters["a/kernel"][0] == 2 and state.momentum["a/kernel"][0] == 0


def test_moving_statistics():
  state = reference.initial_state(
    {"a/kernel": np.array([1.0])},
    {"b/moving_mean": np.array([1.0]), "b/moving_variance": np.array([2.0])},
  )
  batch = _scalar_batch(0.0, means={"b": np.array([11.0])}, variances={"b": np.array([4.0])})
  after = reference.sgd_step(state, batch, 0.1, batch_norm_momentum=0.75)
  assert after.statistics == {"b/moving_mean": 3.5, "b/moving_variance": 2.5}
  assert state.statistics["b/moving_mean"] == 1
  after = reference.sgd_step(state, batch, 0.1)
  assert after.statistics["b/moving_mean"] == pytest.approx(2)


def test_k_small_steps_are_one_large_step_for_a_frozen_gradient():
  """Eq. 3 and 4: with ∇l(x, w_{t+j}) ≈ ∇l(x, w_t), η̂ = kη makes them one; without, nearly so."""
  k, eta = 4, 1e-3
  parameters = _parameters("plain")
  images, labels = _batch(k, 4)
  plain_sgd = {"momentum": 0.0, "nesterov": False}
  start = reference.initial_state(parameters, {})
  small, frozen = start, start
  for j in range(k):
    batch = _minibatch("plain", small.parameters, images[j : j + 1], labels[j : j + 1])
    small = reference.sgd_step(small, batch, eta, **plain_sgd)
    batch = _minibatch("plain", parameters, images[j : j + 1], labels[j : j + 1])
    frozen = reference.sgd_step(frozen, batch, eta, **plain_sgd)
  batch = _minibatch("plain", parameters, images, labels)
  large = reference.sgd_step(start, batch, k * eta, **plain_sgd)
  unscaled = reference.sgd_step(start, batch, eta, **plain_sgd)

  def distance(state):
    return math.sqrt(
      sum(((state.parameters[key] - large.parameters[key]) ** 2).sum() for key in parameters)
    )

  assert distance(frozen) < 1e-14
  assert 1e-6 < distance(small) < 0.1 * distance(start)
  assert distance(unscaled) > 0.5 * distance(start)
