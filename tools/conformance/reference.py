"""The paper's equations 2 to 10, written out in NumPy: what the package is judged by.

Goyal et al. 2017, "Accurate, Large Minibatch SGD". Everything is float64, every sum is a loop over
what the paper sums over, and every gradient is derived by hand. Nothing here uses the package.
On a busy machine OPENBLAS_NUM_THREADS=1 is several times faster: the matmuls are small.

Symbols: k workers of n images each, so a minibatch B of kn images; η the learning rate of the
reference minibatch, η̂ the scaled one; m momentum; λ weight decay; w the parameters.

Parameters are a dict of arrays: "<layer>/kernel" (convolution [kh, kw, C, D], dense [C, classes]),
"<layer>/bias" (dense [classes]), "<bn>/gamma" and "<bn>/beta" ([C]). Their shapes set the widths.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

BATCH_NORM_EPSILON = 1e-5

Arrays = dict[str, np.ndarray]


def rate(
  t: int,
  *,
  steps_per_epoch: float,
  batch: int,
  reference_rate: float,
  reference_batch: int,
  scaling: str = "linear",
  warmup: str = "gradual",
  warmup_epochs: float = 5.0,
  decay_epochs: tuple[float, ...] = (30.0, 60.0, 80.0),
  decay_factor: float = 0.1,
) -> float:
  """The learning rate of step t, counted from 0 (§2.1, §2.2, §5.1).

  scaling: "linear" is the paper's rule η̂ = η·kn/256; "sqrt" and "none" are its ablations.
  warmup: "gradual" goes from η by a constant amount each step and is at η̂ at step
  T = round(warmup_epochs·steps_per_epoch); "constant" stays at η until T; "none".
  There is no warmup for a minibatch no larger than the reference's (§5.3).
  From T on, the rate is what it would be without warmup: times decay_factor at each boundary.
  """
  ratio = batch / reference_batch
  scaled_rate = reference_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[scaling]
  if warmup not in ("gradual", "constant", "none"):
    raise ValueError(f"unknown warmup {warmup!r}")
  warmup_steps = round(warmup_epochs * steps_per_epoch)
  if batch > reference_batch and t < warmup_steps:
    if warmup == "gradual":
      return reference_rate + (scaled_rate - reference_rate) * t / warmup_steps
    if warmup == "constant":
      return reference_rate
  boundaries_passed = 0
  for epoch in decay_epochs:
    if t >= round(epoch * steps_per_epoch):
      boundaries_passed += 1
  return scaled_rate * decay_factor**boundaries_passed


class Node:
  """A value on the tape, and the gradient of the summed loss with respect to it."""

  def __init__(self, value: np.ndarray, *, wants_gradient: bool = True):
    self.value = value
    self.wants_gradient = wants_gradient
    self.gradient: np.ndarray | None = None

  def receive(self, gradient: np.ndarray) -> None:
    """Adds one consumer's share: a value used twice (a block's input) has two."""
    if self.wants_gradient:
      self.gradient = gradient if self.gradient is None else self.gradient + gradient


class Tape:
  """One worker's pass over its own n images: the operations, and their gradients by hand.

  Activations are [n, H, W, C]. Only batch normalisation couples images; a convolution's matmul
  covers all n of them at once for speed, which is the same sum as image by image.
  statistics: None trains, by the batch's own statistics (eq. 5 to 7); a dict of moving ones infers.
  gradients has each parameter's gradient once backward has run; no parameter is used twice.
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
    """The chain rule, from the gradient at `end` back through everything recorded before it."""
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
      """The padded pixels that kernel position (i, j) meets, one for each output pixel."""
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
          if x.wants_gradient:  # The images want none.
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
    # The running average estimates the population, hence N/(N − 1); the pass itself does not.
    self.variances[name] = variance * count / (count - 1)

    def propagate(gradient: np.ndarray) -> None:
      beta_gradient = gradient.sum(axis=axes)
      gamma_gradient = (gradient * normalised).sum(axis=axes)
      self.gradients[f"{name}/beta"] = beta_gradient
      self.gradients[f"{name}/gamma"] = gamma_gradient
      # Through μ, every value gets its share of −Σ dL/dx̂; through σ, of −x̂·Σ (dL/dx̂)·x̂.
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
    """A residual block's sum: both branches get the whole gradient."""

    def propagate(gradient: np.ndarray) -> None:
      x.receive(gradient)
      y.receive(gradient)

    return self._record(x.value + y.value, propagate)

  def max_pool(self, x: Node, *, size: int = 3, stride: int = 2) -> Node:
    """The maximum of each window, padded by (size − 1)//2; its first maximum gets the gradient."""
    n, input_height, input_width, channels = x.value.shape
    edge = (size - 1) // 2
    margins = ((0, 0), (edge, edge), (edge, edge), (0, 0))
    # The input is a ReLU's, so −∞ gives what 0 would; but a gradient cannot end in the padding.
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
    """He et al.'s shortcut A: subsampled pixels, and zero channels on both sides."""
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


def _conv_bn(ops: Tape, x: Node, name: str, stride: int = 1) -> Node:
  return ops.batch_norm(ops.convolution(x, f"{name}_conv", stride=stride), f"{name}_bn")


def _unit(ops: Tape, x: Node, name: str, stride: int = 1, *, activation: str = "relu") -> Node:
  return getattr(ops, activation)(_conv_bn(ops, x, name, stride))


def _logits(ops: Tape, x: Node) -> Node:
  return ops.dense(ops.global_average(x), "logits")


def _bottleneck(
  ops: Tape, x: Node, name: str, *, stride: int, projection: bool, activation: str = "relu"
) -> Node:
  """§5.1's block: 1×1, 3×3, 1×1, the stride on the 3×3 and not on the first 1×1."""
  y = _unit(ops, x, f"{name}_1", activation=activation)
  y = _unit(ops, y, f"{name}_2", stride, activation=activation)
  y = _conv_bn(ops, y, f"{name}_3")
  shortcut = _conv_bn(ops, x, f"{name}_shortcut", stride) if projection else x
  return getattr(ops, activation)(ops.add(y, shortcut))


def _basic(ops: Tape, x: Node, name: str, *, stride: int = 1, activation: str = "relu") -> Node:
  """Two 3×3; where it has a stride, the shortcut is He et al.'s option A, without parameters."""
  y = _unit(ops, x, f"{name}_1", stride, activation=activation)
  y = _conv_bn(ops, y, f"{name}_2")
  width = y.value.shape[-1]
  shortcut = x if stride == 1 else ops.subsample_and_pad(x, stride=stride, width=width)
  return getattr(ops, activation)(ops.add(y, shortcut))


# The small networks have tanh where the real ones have ReLU: at a ReLU's kink a rounding error of
# float32 now and then makes a gradient jump, and no tight limit would hold.


def _plain(ops: Tape, x: Node) -> Node:
  x = ops.tanh(ops.convolution(x, "conv1"))
  x = ops.tanh(ops.convolution(x, "conv2", stride=2))
  return _logits(ops, x)


def _small_residual(ops: Tape, x: Node) -> Node:
  x = _unit(ops, x, "stem", activation="tanh")
  x = _bottleneck(ops, x, "block1", stride=2, projection=True, activation="tanh")
  x = _basic(ops, x, "block2", activation="tanh")
  return _logits(ops, x)


def _resnet20(ops: Tape, x: Node) -> Node:
  x = _unit(ops, x, "stem")
  for stage in (1, 2, 3):
    for block in (1, 2, 3):
      stride = 2 if stage > 1 and block == 1 else 1
      x = _basic(ops, x, f"stage{stage}_block{block}", stride=stride)
  return _logits(ops, x)


def _resnet50(ops: Tape, x: Node) -> Node:
  x = _unit(ops, x, "stem", 2)
  x = ops.max_pool(x, size=3, stride=2)
  for stage, blocks in enumerate((3, 4, 6, 3), start=1):
    for block in range(1, blocks + 1):
      first = block == 1
      stride = 2 if stage > 1 and first else 1
      x = _bottleneck(ops, x, f"stage{stage}_block{block}", stride=stride, projection=first)
  return _logits(ops, x)


NETWORKS: dict[str, Callable[[Tape, Node], Node]] = {
  "plain": _plain,
  "small_residual": _small_residual,
  "resnet20": _resnet20,
  "resnet50": _resnet50,
}


def last_batch_norms(network: str) -> list[str]:
  """The last batch normalisation of every residual block, whose γ starts at 0 (§5.1)."""
  if network == "small_residual":
    return ["block1_3_bn", "block2_2_bn"]
  blocks, last = {"plain": ((), 0), "resnet20": ((3, 3, 3), 2), "resnet50": ((3, 4, 6, 3), 3)}[
    network
  ]
  return [
    f"stage{stage}_block{block}_{last}_bn"
    for stage, count in enumerate(blocks, start=1)
    for block in range(1, count + 1)
  ]


def _normalised(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Node:
  """Pixels 0..255 [n, H, W, C], by each channel's mean and standard deviation (§5.1)."""
  pixels = np.asarray(images, np.float64)
  value = (pixels - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)
  return Node(value, wants_gradient=False)


def forward(
  network: str,
  parameters: Arrays,
  images: np.ndarray,
  *,
  mean: np.ndarray,
  std: np.ndarray,
  epsilon: float = BATCH_NORM_EPSILON,
  statistics: Arrays | None = None,
) -> np.ndarray:
  """Logits [n, classes] of images [n, H, W, C] of raw pixels 0..255.

  statistics: None normalises by the batch's own mean and biased variance, as in training;
  a dict of "<bn>/moving_mean" and "<bn>/moving_variance" by those, as in evaluation.
  """
  tape = Tape(parameters, epsilon=epsilon, statistics=statistics)
  return NETWORKS[network](tape, _normalised(images, mean, std)).value


def cross_entropy(logits: np.ndarray, label: int, smoothing: float) -> tuple[float, np.ndarray]:
  """l(x, w) of one image, and its gradient with respect to its logits [classes].

  The target is 1 − smoothing on the label, plus smoothing/classes on every class.
  """
  target = np.full(logits.shape, smoothing / logits.size)
  target[label] += 1.0 - smoothing
  shifted = logits - logits.max()
  log_probabilities = shifted - math.log(np.exp(shifted).sum())
  return -float((target * log_probabilities).sum()), np.exp(log_probabilities) - target


@dataclass
class WorkerPass:
  """What one worker has after backprop over its batch B_j of n images.

  gradients are those of loss_sum, before any division; variances are unbiased, of N = n·H·W values.
  """

  loss_sum: float
  error_count: int
  gradients: Arrays
  means: Arrays
  variances: Arrays


def worker_pass(
  network: str,
  parameters: Arrays,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  mean: np.ndarray,
  std: np.ndarray,
  epsilon: float = BATCH_NORM_EPSILON,
  label_smoothing: float = 0.0,
) -> WorkerPass:
  """Eq. 5 and 6, times n: Σ_{x in B_j} l_{B_j}(x, w) and its gradient, over one worker's batch.

  The loss of an image depends, through batch normalisation, on all n images of its worker and on no
  other worker's. images [n, H, W, C], labels [n].
  """
  tape = Tape(parameters, epsilon=epsilon)
  logits = NETWORKS[network](tape, _normalised(images, mean, std))
  loss_sum, error_count = 0.0, 0
  logits_gradient = np.zeros_like(logits.value)
  for image, label in enumerate(labels):
    loss, logits_gradient[image] = cross_entropy(logits.value[image], int(label), label_smoothing)
    loss_sum += loss
    error_count += int(np.argmax(logits.value[image]) != label)
  tape.backward(logits, logits_gradient)
  return WorkerPass(loss_sum, error_count, tape.gradients, tape.means, tape.variances)


@dataclass
class Minibatch:
  """Means over a minibatch of kn images; means and variances are averaged over the k workers."""

  loss: float
  error: float
  gradients: Arrays
  means: Arrays
  variances: Arrays


def minibatch(
  network: str,
  parameters: Arrays,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  mean: np.ndarray,
  std: np.ndarray,
  epsilon: float = BATCH_NORM_EPSILON,
  label_smoothing: float = 0.0,
) -> Minibatch:
  """The gradient of eq. 4, with eq. 7's per-worker losses: 1/(kn) Σ_{j<k} Σ_{x in B_j} ∇l(x, w).

  Remark 3: the workers' sums are added up and normalised by kn, the whole minibatch, not by n.
  images [k, n, H, W, C], labels [k, n].
  """
  k, n = np.shape(labels)
  loss, errors = 0.0, 0
  gradients: Arrays = {}
  means: Arrays = {}
  variances: Arrays = {}
  for j in range(k):
    worker = worker_pass(
      network,
      parameters,
      images[j],
      labels[j],
      mean=mean,
      std=std,
      epsilon=epsilon,
      label_smoothing=label_smoothing,
    )
    loss += worker.loss_sum / (k * n)
    errors += worker.error_count
    for key, gradient in worker.gradients.items():
      gradients.setdefault(key, np.zeros_like(gradient))
      gradients[key] += gradient / (k * n)
    for name in worker.means:
      means[name] = means.get(name, 0.0) + worker.means[name] / k
      variances[name] = variances.get(name, 0.0) + worker.variances[name] / k
  return Minibatch(loss, errors / (k * n), gradients, means, variances)


@dataclass
class State:
  """What a step changes. momentum holds u of eq. 9, or v of eq. 10 as it stands."""

  parameters: Arrays
  momentum: Arrays
  statistics: Arrays = field(default_factory=dict)


def initial_state(parameters: Arrays, statistics: Arrays) -> State:
  """Before the first step: momentum 0. statistics: "<bn>/moving_mean", "<bn>/moving_variance"."""
  w = {key: np.array(p, np.float64) for key, p in parameters.items()}
  u = {key: np.zeros_like(p) for key, p in w.items()}
  return State(w, u, {key: np.array(s, np.float64) for key, s in statistics.items()})


def sgd_step(
  state: State,
  batch: Minibatch,
  rate: float,
  *,
  momentum: float = 0.9,
  nesterov: bool = True,
  momentum_correction: bool = True,
  weight_decay: float = 0.0,
  batch_norm_momentum: float = 0.9,
) -> State:
  """One step of minibatch SGD (eq. 2) with momentum and weight decay (eq. 8), as a new State.

  g is the minibatch's gradient, plus λ·w once, for kernels only: γ, β and biases are not decayed
  (remark 1: η multiplies both terms, so scaling the loss would not be scaling η).
  momentum_correction: eq. 9, u ← m·u + g and w ← w − η·u, where a changing η needs no correction.
  Without it: eq. 10 as it stands, v ← m·v + η·g and w ← w − v, with the old η left in v (remark 2).
  nesterov: the step looks ahead: w ← w − η·(m·u + g), or w ← w − (m·v + η·g).
  Moving statistics: moving ← a·moving + (1 − a)·(mean over workers), a = batch_norm_momentum.
  """
  w: Arrays = {}
  moments: Arrays = {}
  for key, old_w in state.parameters.items():
    g = batch.gradients[key]
    if key.endswith("/kernel"):
      g = g + weight_decay * old_w
    if momentum_correction:
      u = momentum * state.momentum[key] + g  # Eq. 9.
      w[key] = old_w - rate * (momentum * u + g if nesterov else u)
      moments[key] = u
    else:
      v = momentum * state.momentum[key] + rate * g  # Eq. 10.
      w[key] = old_w - (momentum * v + rate * g if nesterov else v)
      moments[key] = v

  statistics = dict(state.statistics)
  a = batch_norm_momentum
  for name in batch.means:
    for key, new in (
      (f"{name}/moving_mean", batch.means[name]),
      (f"{name}/moving_variance", batch.variances[name]),
    ):
      statistics[key] = a * state.statistics[key] + (1.0 - a) * new
  return State(w, moments, statistics)
