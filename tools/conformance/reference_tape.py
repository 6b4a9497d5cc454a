"""The operations of the reference's networks and their gradients, in NumPy float64.

Shares no code with the package.
"""

from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]


class Node:
  """A value, and the gradient of the summed loss with respect to it."""

  def __init__(self, value: np.ndarray, *, wants_gradient: bool = True):
    self.value = value
    self.wants_gradient = wants_gradient
    self.gradient: np.ndarray | None = None

  def receive(self, gradient: np.ndarray) -> None:
    """Adds the gradient from one consumer; a value used twice (a block's input) has two."""
    if self.wants_gradient:
      self.gradient = gradient if self.gradient is None else self.gradient + gradient


class Tape:
  """One worker's pass over its own n images: the operations, and the gradient of each.

  Activations are [n, H, W, C]. Only batch normalisation couples images. A convolution multiplies
  all n of them at once for speed, which gives the same sums as image by image. No parameter may be
  used twice.

  Args:
    parameters: by name, see `reference`.
    epsilon: ε of the batch normalisation.
    statistics: None normalises by the batch's own statistics, as in training (eq. 5 to 7); a dict
      of "<bn>/moving_mean" and "<bn>/moving_variance" normalises by those, as in evaluation.

  Attributes:
    gradients: of each parameter, once `backward` has run.
    means, variances: the batch statistics by layer; the variances are unbiased.
  """

  def __init__(self, parameters: Arrays, *, epsilon: float, statistics: Arrays | None = None):
    self.parameters = {key: np.asarray(p, np.float64) for key, p in parameters.items()}
    self.epsilon = epsilon
    self.statistics = statistics
    self.gradients: Arrays = {}
    self.means: Arrays = {}
    self.variances: Arrays = {}
    self._backward: list[tuple[Node, Callable[[np.ndarray], None]]] = []

  def backward(self, end: Node, gradient: np.ndarray) -> None:
    """Applies the chain rule from `end` back through everything recorded before it."""
    end.receive(gradient)
    for output, propagate in reversed(self._backward):
      if output.gradient is not None:
        propagate(output.gradient)

  def _record(self, value: np.ndarray, propagate: Callable[[np.ndarray], None]) -> Node:
    output = Node(value)
    self._backward.append((output, propagate))
    return output

  def convolution(self, x: Node, name: str, *, stride: int = 1) -> Node:
    """y[h, w] = Σ_ij padded[h·stride + i, w·stride + j] @ kernel[i, j]; padding (size − 1)//2."""
    kernel = self.parameters[f"{name}/kernel"]
    kernel_height, kernel_width, channels, width = kernel.shape
    n, input_height, input_width, _ = x.value.shape
    top, left = (kernel_height - 1) // 2, (kernel_width - 1) // 2
    padded = np.pad(x.value, ((0, 0), (top, top), (left, left), (0, 0)))
    height = (input_height + 2 * top - kernel_height) // stride + 1
    breadth = (input_width + 2 * left - kernel_width) // stride + 1

    def pixels_under(i: int, j: int) -> tuple[slice, ...]:
      """Returns the padded pixels under kernel position (i, j), one for each output pixel."""
      rows = slice(i, i + stride * height, stride)
      return slice(None), rows, slice(j, j + stride * breadth, stride), slice(None)

    value = np.zeros((n * height * breadth, width))
    for i in range(kernel_height):
      for j in range(kernel_width):
        value += padded[pixels_under(i, j)].reshape(-1, channels) @ kernel[i, j]

    def propagate(gradient: np.ndarray) -> None:
      flat = gradient.reshape(-1, width)
      kernel_gradient = np.empty_like(kernel)
      padded_gradient = np.zeros_like(padded)
      for i in range(kernel_height):
        for j in range(kernel_width):
          pixels = pixels_under(i, j)
          kernel_gradient[i, j] = padded[pixels].reshape(-1, channels).T @ flat
          if x.wants_gradient:  # The images do not.
            shape = n, height, breadth, channels
            padded_gradient[pixels] += (flat @ kernel[i, j].T).reshape(shape)
      self.gradients[f"{name}/kernel"] = kernel_gradient
      x.receive(padded_gradient[:, top : top + input_height, left : left + input_width])

    return self._record(value.reshape(n, height, breadth, width), propagate)

  def batch_norm(self, x: Node, name: str) -> Node:
    """y = γ·x̂ + β with x̂ = (x − μ)/√(σ² + ε), μ and σ² over this worker's n·H·W values (§2.3)."""
    gamma, beta = self.parameters[f"{name}/gamma"], self.parameters[f"{name}/beta"]
    if self.statistics is not None:
      mean = np.asarray(self.statistics[f"{name}/moving_mean"], np.float64)
      variance = np.asarray(self.statistics[f"{name}/moving_variance"], np.float64)
      return Node(gamma * (x.value - mean) / np.sqrt(variance + self.epsilon) + beta)

    axes = (0, 1, 2)
    count = x.value.shape[0] * x.value.shape[1] * x.value.shape[2]
    if count < 2:
      raise ValueError(f"{name}: a single value has no variance")
    mean = x.value.sum(axis=axes) / count
    centred = x.value - mean
    variance = (centred**2).sum(axis=axes) / count
    deviation = np.sqrt(variance + self.epsilon)
    normalised = centred / deviation
    self.means[name] = mean
    # Unbiased, N/(N − 1), because the moving average estimates the population.
    self.variances[name] = variance * count / (count - 1)

    def propagate(gradient: np.ndarray) -> None:
      beta_gradient = gradient.sum(axis=axes)
      gamma_gradient = (gradient * normalised).sum(axis=axes)
      self.gradients[f"{name}/beta"] = beta_gradient
      self.gradients[f"{name}/gamma"] = gamma_gradient
      # Through μ each value gets 1/N of −Σ dL/dx̂, and through σ of −x̂·Σ (dL/dx̂)·x̂.
      through_mean = gamma * beta_gradient / count
      through_deviation = normalised * gamma * gamma_gradient / count
      x.receive((gamma * gradient - through_mean - through_deviation) / deviation)

    return self._record(gamma * normalised + beta, propagate)

  def relu(self, x: Node) -> Node:
    """max(x, 0); its derivative at 0 is 0."""
    positive = x.value > 0
    return self._record(x.value * positive, lambda gradient: x.receive(gradient * positive))

  def tanh(self, x: Node) -> Node:
    value = np.tanh(x.value)
    return self._record(value, lambda gradient: x.receive(gradient * (1 - value**2)))

  def add(self, x: Node, y: Node) -> Node:
    """A residual block's sum; each branch gets the whole gradient."""

    def propagate(gradient: np.ndarray) -> None:
      x.receive(gradient)
      y.receive(gradient)

    return self._record(x.value + y.value, propagate)

  def max_pool(self, x: Node, *, size: int = 3, stride: int = 2) -> Node:
    """The maximum of each window, padded by (size − 1)//2; its first maximum gets the gradient."""
    n, input_height, input_width, channels = x.value.shape
    edge = (size - 1) // 2
    margins = ((0, 0), (edge, edge), (edge, edge), (0, 0))
    # The input comes from a ReLU, so padding with 0 gives the same maxima; with −∞ no gradient can
    # end in the padding.
    padded = np.pad(x.value, margins, constant_values=-np.inf)
    height = (input_height + 2 * edge - size) // stride + 1
    breadth = (input_width + 2 * edge - size) // stride + 1
    windows = [
      (slice(None), slice(i, i + stride * height, stride), slice(j, j + stride * breadth, stride))
      for i in range(size)
      for j in range(size)
    ]
    value = np.full((n, height, breadth, channels), -np.inf)
    for pixels in windows:
      value = np.maximum(value, padded[pixels])

    def propagate(gradient: np.ndarray) -> None:
      padded_gradient = np.zeros_like(padded)
      open_windows = np.ones(value.shape, bool)
      for pixels in windows:
        winner = (padded[pixels] == value) & open_windows
        padded_gradient[pixels] += gradient * winner
        open_windows &= ~winner
      x.receive(padded_gradient[:, edge : edge + input_height, edge : edge + input_width])

    return self._record(value, propagate)

  def subsample_and_pad(self, x: Node, *, stride: int, width: int) -> Node:
    """He et al.'s shortcut A: every stride-th pixel, with zero channels added on both sides."""
    extra = width - x.value.shape[-1]
    front, behind = extra // 2, extra - extra // 2
    value = np.pad(x.value[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (front, behind)))

    def propagate(gradient: np.ndarray) -> None:
      input_gradient = np.zeros_like(x.value)
      input_gradient[:, ::stride, ::stride] = gradient[..., front : width - behind]
      x.receive(input_gradient)

    return self._record(value, propagate)

  def global_average(self, x: Node) -> Node:
    """[n, H, W, C] to [n, C]: the mean over an image's pixels."""
    n, height, breadth, channels = x.value.shape
    area = height * breadth

    def propagate(gradient: np.ndarray) -> None:
      share = gradient.reshape(n, 1, 1, channels) / area
      x.receive(np.broadcast_to(share, x.value.shape))

    return self._record(x.value.sum(axis=(1, 2)) / area, propagate)

  def dense(self, x: Node, name: str) -> Node:
    """[n, C] to [n, classes], image by image: x @ kernel + bias."""
    kernel, bias = self.parameters[f"{name}/kernel"], self.parameters[f"{name}/bias"]
    value = np.stack([features @ kernel + bias for features in x.value])

    def propagate(gradient: np.ndarray) -> None:
      kernel_gradient, bias_gradient = np.zeros_like(kernel), np.zeros_like(bias)
      for features, image_gradient in zip(x.value, gradient, strict=True):
        kernel_gradient += np.outer(features, image_gradient)
        bias_gradient += image_gradient
      self.gradients[f"{name}/kernel"] = kernel_gradient
      self.gradients[f"{name}/bias"] = bias_gradient
      x.receive(np.stack([kernel @ image_gradient for image_gradient in gradient]))

    return self._record(value, propagate)
