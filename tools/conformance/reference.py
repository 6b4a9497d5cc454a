"""The paper's equations 2 to 10 in NumPy, against which the package is checked.

Goyal et al. 2017, "Accurate, Large Minibatch SGD". Everything is float64, every sum is a loop over
what the paper sums over, and every gradient is written out (`reference_tape`). Shares no code with
the package. The matrix products are small: on a busy machine, OPENBLAS_NUM_THREADS=1 is several
times faster.

Symbols: k workers of n images each, so a minibatch B of kn images; η the learning rate of the
reference minibatch, η̂ the scaled one; m momentum; λ weight decay; w the parameters.

Parameters are a dict of arrays: "<layer>/kernel" (convolution [kh, kw, C, D], dense [C, classes]),
"<layer>/bias" (dense [classes]), "<bn>/gamma" and "<bn>/beta" ([C]). Their shapes set the widths.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from tools.conformance.reference_networks import NETWORKS
from tools.conformance.reference_tape import Arrays, Node, Tape

BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Schedule:
  """What the learning rate depends on besides the step (§2.1, §2.2, §5.1).

  Attributes:
    steps_per_epoch: need not be a whole number.
    batch: kn, images in a step.
    reference_rate, reference_batch: η, and the minibatch that it belongs to.
    scaling: "linear" is the paper's rule η̂ = η·kn/256; "sqrt" and "none" are its ablations.
    warmup: "gradual" rises from η by a constant amount each step and reaches η̂ at step
      T = round(warmup_epochs·steps_per_epoch); "constant" stays at η until T; or "none".
    warmup_epochs: see `warmup`.
    decay_epochs, decay_factor: the boundaries, and what each multiplies the rate by.
  """

  steps_per_epoch: float
  batch: int
  reference_rate: float
  reference_batch: int
  scaling: str = "linear"
  warmup: str = "gradual"
  warmup_epochs: float = 5.0
  decay_epochs: tuple[float, ...] = (30.0, 60.0, 80.0)
  decay_factor: float = 0.1


def rate(t: int, schedule: Schedule) -> float:
  """Returns the learning rate of step t, counted from 0.

  A minibatch no larger than the reference's has no warmup (§5.3). From T on, the rate is the same
  as without warmup: η̂ times decay_factor for each boundary passed.
  """
  ratio = schedule.batch / schedule.reference_batch
  scaling = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[schedule.scaling]
  scaled_rate = schedule.reference_rate * scaling
  if schedule.warmup not in ("gradual", "constant", "none"):
    raise ValueError(f"unknown warmup {schedule.warmup!r}")
  warmup_steps = round(schedule.warmup_epochs * schedule.steps_per_epoch)
  if schedule.batch > schedule.reference_batch and t < warmup_steps:
    if schedule.warmup == "gradual":
      increase = scaled_rate - schedule.reference_rate
      return schedule.reference_rate + increase * t / warmup_steps
    if schedule.warmup == "constant":
      return schedule.reference_rate
  boundaries_passed = 0
  for epoch in schedule.decay_epochs:
    if t >= round(epoch * schedule.steps_per_epoch):
      boundaries_passed += 1
  return scaled_rate * schedule.decay_factor**boundaries_passed


def _normalised(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Node:
  """Pixels 0..255 [n, H, W, C], normalised by each channel's mean and standard deviation (§5.1)."""
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
  """Returns the logits [n, classes] of images [n, H, W, C] of raw pixels 0..255.

  statistics: see `Tape`.
  """
  tape = Tape(parameters, epsilon=epsilon, statistics=statistics)
  return NETWORKS[network](tape, _normalised(images, mean, std)).value


def cross_entropy(logits: np.ndarray, label: int, smoothing: float) -> tuple[float, np.ndarray]:
  """Returns l(x, w) of one image, and its gradient with respect to the image's logits [classes].

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

  gradients are those of loss_sum, before any division; variances are unbiased, over n·H·W values.
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
  """Computes eq. 5 and 6, times n: Σ_{x in B_j} l_{B_j}(x, w) and its gradient, for one worker.

  Through batch normalisation, the loss of an image depends on all n images of its worker, and on no
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
  """Means over a minibatch of kn images; means and variances are averaged over the k workers.

  squared_gradients are the workers' own, |g_j|² with g_j the mean over the worker's n images.
  """

  loss: float
  error: float
  gradients: Arrays
  means: Arrays
  variances: Arrays
  squared_gradients: list[float] = field(default_factory=list)


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
  """Computes the gradient of eq. 4 with eq. 7's per-worker losses.

      1/(kn) Σ_{j<k} Σ_{x in B_j} ∇l_{B_j}(x, w)

  Remark 3: the workers' sums are added up and divided by kn, the whole minibatch, not by n.
  images [k, n, H, W, C], labels [k, n].
  """
  k, n = np.shape(labels)
  loss, errors = 0.0, 0
  gradients: Arrays = {}
  means: Arrays = {}
  variances: Arrays = {}
  squared_gradients = []
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
    squared_gradients.append(sum(np.sum((g / n) ** 2) for g in worker.gradients.values()))
    for name in worker.means:
      means[name] = means.get(name, 0.0) + worker.means[name] / k
      variances[name] = variances.get(name, 0.0) + worker.variances[name] / k
  return Minibatch(loss, errors / (k * n), gradients, means, variances, squared_gradients)


@dataclass
class State:
  """What a step changes. momentum holds u of eq. 9, or v of eq. 10 without the correction."""

  parameters: Arrays
  momentum: Arrays
  statistics: Arrays = field(default_factory=dict)


def initial_state(parameters: Arrays, statistics: Arrays) -> State:
  """Returns the state before the first step, with momentum 0.

  statistics: "<bn>/moving_mean" and "<bn>/moving_variance".
  """
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
  """Takes one step of minibatch SGD (eq. 2) with momentum and weight decay (eq. 8).

  g is the minibatch's gradient, plus λ·w once, for kernels only: γ, β and biases are not decayed
  (remark 1: η multiplies both terms, so scaling the loss is not the same as scaling η).
  momentum_correction: eq. 9, u ← m·u + g and w ← w − η·u, which needs no correction if η changes.
  Without it: eq. 10 unchanged, v ← m·v + η·g and w ← w − v, with the old η left in v (remark 2).
  nesterov: looks ahead: w ← w − η·(m·u + g), or w ← w − (m·v + η·g).
  Moving statistics: moving ← a·moving + (1 − a)·(mean over workers), a = batch_norm_momentum.

  Returns:
    The state after the step; `state` is not changed.
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
