"""The reference's networks: their layers, and their gradients against finite differences."""

import math

import numpy as np
import pytest

from tests.tools.conformance import small_networks
from tests.tools.conformance.finite_differences import assert_gradient, slope
from tests.tools.conformance.small_networks import MEAN, STD, blocks
from tools.conformance import reference
from tools.conformance.reference_networks import NETWORKS, last_batch_norms


class _Shape:
  """Stands for the tape and for every value; records the layers and strides of a network."""

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
  NETWORKS[network](ops, ops)
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
  for stage, block in blocks((3, 3, 3)):
    down = (stage, block) in ((2, 1), (3, 1))
    name = f"stage{stage}_block{block}"
    expected += _unit(f"{name}_1", 2 if down else 1) + _unit(f"{name}_2")[:2]
    expected += ([("subsample", 2)] if down else []) + [("add", None), ("relu", None)]
  assert _calls("resnet20") == expected + END


def test_resnet50_has_its_strides_on_the_3x3():
  expected = [*_unit("stem", 2), ("max_pool3", 2)]
  for stage, block in blocks((3, 4, 6, 3)):
    stride = 2 if (stage, block) in ((2, 1), (3, 1), (4, 1)) else 1
    expected += _bottleneck(f"stage{stage}_block{block}", stride, block == 1)
  calls = _calls("resnet50")
  assert calls == expected + END
  # 50 layers with weights: all convolutions but the 4 shortcuts, and the dense one.
  assert sum(name.endswith("_conv") for name, _ in calls) - 4 + 1 == 50


@pytest.mark.parametrize("network", NETWORKS)
def test_last_batch_norms(network):
  """In each block it is the one before the sum, on the main branch."""
  expected, previous = [], None
  for name, _ in _calls(network):
    if name.endswith("_bn") and not name.endswith("_shortcut_bn"):
      previous = name
    if name == "add":
      expected.append(previous)
  assert last_batch_norms(network) == expected
  assert len(expected) == {"plain": 0, "small_residual": 2, "resnet20": 9, "resnet50": 16}[network]


@pytest.mark.parametrize(("network", "smoothing"), [("plain", 0.0), ("small_residual", 0.1)])
def test_every_gradient_of_a_small_network(network, smoothing):
  parameters = small_networks.parameters(network)
  images, labels = small_networks.batch(4)

  def run():
    return reference.worker_pass(
      network, parameters, images, labels, mean=MEAN, std=STD, label_smoothing=smoothing
    )

  gradients = run().gradients
  assert gradients.keys() == parameters.keys()
  for key, gradient in gradients.items():
    # A step so small that no ReLU switches.
    assert_gradient(lambda: run().loss_sum, parameters[key], gradient, step=1e-6, tolerance=1e-7)


@pytest.mark.parametrize(("network", "n", "size"), [("resnet20", 4, 8), ("resnet50", 6, 40)])
def test_deep_network_gradient_of_every_array(network, n, size):
  """Along a random direction in each of the 65 and 161 arrays."""
  parameters = small_networks.parameters(network)
  images, labels = small_networks.batch(n, size=size)
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
    # The loss changes by about 1e-5 at most, so little that no ReLU switches.
    numeric = slope(loss, parameters[key], direction, 1e-5 / scale)
    assert (gradient * direction).sum() == pytest.approx(numeric, rel=0, abs=1e-6 * scale), key


def test_forward_infers_by_moving_statistics():
  """With the batch's statistics as moving ones, inference equals training; with others, not."""
  parameters = small_networks.parameters("small_residual")
  images, labels = small_networks.batch(6)
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
  # In inference, the logits of an image depend on no other image.
  alone = reference.forward("small_residual", parameters, images[2:3], **keywords)
  np.testing.assert_allclose(alone[0], inferred[2], rtol=1e-10)
  statistics["stem_bn/moving_mean"] = statistics["stem_bn/moving_mean"] + 0.1
  other = reference.forward("small_residual", parameters, images, **keywords)
  assert np.abs(other - trained).max() > 1e-3


def test_pixels_are_normalised_by_channel():
  """With a single 1 in each kernel and 0 elsewhere, a logit is tanh(tanh(x)) of one pixel."""
  parameters = {key: np.zeros_like(p) for key, p in small_networks.parameters("plain").items()}
  parameters["conv1/kernel"][1, 1, 2, 0] = 1
  parameters["conv2/kernel"][1, 1, 0, 0] = 1
  parameters["logits/kernel"][0, 3] = 1
  images = np.full((1, 8, 8, 3), 200, np.uint8)
  logits = reference.forward("plain", parameters, images, mean=MEAN, std=STD)
  np.testing.assert_allclose(
    logits, [[0, 0, 0, math.tanh(math.tanh((200 - 100) / 50)), 0]], rtol=1e-12
  )
