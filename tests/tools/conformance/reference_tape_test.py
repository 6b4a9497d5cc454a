"""Each operation of the reference: values by hand, gradients against finite differences."""

import math

import numpy as np
import pytest

from tests.tools.conformance.finite_differences import assert_gradient
from tools.conformance.reference_tape import Node, Tape


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
    tape = Tape(parameters, epsilon=0.1)
    node = Node(x.copy())
    return tape, node, OPERATIONS[operation](tape, node)

  tape, node, output = run()
  weights = rng.normal(size=output.value.shape)
  tape.backward(output, weights)

  def loss():
    return float((run()[2].value * weights).sum())

  assert_gradient(loss, x, node.gradient)
  used = {
    "convolution_stride1": ["layer/kernel"],
    "convolution_stride2": ["layer/kernel"],
    "batch_norm": ["layer/gamma", "layer/beta"],
    "dense": ["layer_dense/kernel", "layer_dense/bias"],
  }
  assert sorted(tape.gradients) == sorted(used.get(operation, []))
  for key, gradient in tape.gradients.items():
    assert_gradient(loss, parameters[key], gradient)


def _tape(**arrays):
  return Tape(arrays, epsilon=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("image", [7, 8])
def test_convolution_is_the_sum_pixel_by_pixel(stride, size, image):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, image, image, 3)), rng.normal(size=(size, size, 3, 2))
  value = _tape(**{"c/kernel": kernel}).convolution(Node(x), "c", stride=stride).value
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
  tape, node = _tape(), Node(x)
  output = tape.max_pool(node)
  assert output.value[0, :, :, 0].tolist() == [[40, 8], [14, 16]]
  tape.backward(output, np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 2, 1))
  expected = np.zeros((4, 4))
  expected[0, 0], expected[1, 3], expected[3, 1], expected[3, 3] = 1, 2, 3, 4
  np.testing.assert_array_equal(node.gradient[0, :, :, 0], expected)


def test_max_pool_of_equal_values_passes_the_gradient_once():
  tape, node = _tape(), Node(np.ones((1, 4, 4, 1)))
  tape.backward(tape.max_pool(node), np.ones((1, 2, 2, 1)))
  assert node.gradient.sum() == 4


def test_batch_norm_values_and_statistics():
  x = np.array([1.0, 3.0, 5.0, 11.0]).reshape(2, 2, 1, 1)  # Mean 5, Σ of squares 16+4+0+36 = 56.
  tape = Tape({"b/gamma": np.array([2.0]), "b/beta": np.array([1.0])}, epsilon=2.0)
  output = tape.batch_norm(Node(x), "b").value.ravel()
  np.testing.assert_allclose(output, [-1, 0, 1, 4], atol=1e-15)  # 2·(x − 5)/√(14 + 2) + 1.
  assert tape.means["b"] == [5]
  np.testing.assert_allclose(tape.variances["b"], [56 / 3])


def test_activations_sum_average_and_dense_by_hand():
  tape = _tape(**{"d/kernel": np.array([[2.0, -1.0]]), "d/bias": np.array([0.5, 1.0])})
  x = Node(np.array([-3.0, -0.01, 0.0, 0.02]).reshape(1, 2, 2, 1))
  rectified = tape.relu(x)
  assert rectified.value.ravel().tolist() == [0, 0, 0, 0.02]
  total = tape.add(rectified, x)
  np.testing.assert_allclose(total.value.ravel(), [-3, -0.01, 0, 0.04])
  average = tape.global_average(total)
  np.testing.assert_allclose(average.value, [[-2.97 / 4]])
  output = tape.dense(average, "d")
  np.testing.assert_allclose(output.value, [[0.5 - 1.485, 1 + 0.7425]])
  tape.backward(output, np.array([[1.0, 0.0]]))
  # 2/4 for each pixel, twice where the ReLU passes the gradient, which it does not at 0.
  np.testing.assert_allclose(x.gradient.ravel(), [0.5, 0.5, 0.5, 1.0])


def test_shortcut_a_pads_on_both_sides():
  x = np.arange(16.0).reshape(1, 4, 4, 1)
  value = _tape().subsample_and_pad(Node(x), stride=2, width=4).value  # 1 + 2 more.
  assert value[0, :, :, 1].tolist() == [[0, 2], [8, 10]]
  assert not value[..., [0, 2, 3]].any()
