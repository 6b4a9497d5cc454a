r"""Checks on your own machines, devices and collectives that the recipe is computed right.

  python -m tools.verify
  python -m tools.launch_local --tasks=2 --module=tools.verify

Runs under the same launch as a training run: alone, or on each machine with its `TF_CONFIG`. A
small problem in float32 goes through the package's own input pipeline, step, optimizer and
collectives, on all devices; each property of the paper's recipe is compared with
`conformance.reference`, the equations in NumPy float64, and gets one line with the measured
deviation and its limit. The exit status is 1 if one fails, and what was measured is left in
`--output` as JSON.

Each property is measured where the others cannot blur it: the aggregation of gradients on a network
without BN, weight decay where the loss has no gradient, the momentum with the rates that were
really used. So the line that fails names the fault. Augmentation and evaluation, whose arithmetic
does not depend on machines, are left to the tests.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator

# The reference's products are small: threads would cost more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# TensorFlow and Keras are imported where they are used, after the flags are found right.
import numpy as np
from absl import app, flags

from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.conformance import reference

CLASSES = 10
SIDE = 8
PER_WORKER_BATCH_SIZE = 5
STEPS_PER_EPOCH = 12
MEAN, STD = (120.0, 125.0, 130.0), (60.0, 65.0, 70.0)
# An image holds its example's number in its first pixel, three bytes.
_ID_BYTES = np.array([1, 256, 65536])


# Goyal et al. 2017, §5.1, and §2.1 and §2.2 for η and the warmup.
PAPER = {
  "per_worker_batch_size": 32,
  "reference_learning_rate": 0.1,
  "reference_batch_size": 256,
  "learning_rate_scaling": "linear",
  "warmup": "gradual",
  "warmup_epochs": 5.0,
  "epochs": 90,
  "decay_epochs": (30.0, 60.0, 80.0),
  "decay_factor": 0.1,
  "momentum": 0.9,
  "nesterov": True,
  "momentum_correction": True,
  "weight_decay": 1e-4,
  "label_smoothing": 0.0,
  "network": "resnet50",
  "last_gamma": 0.0,
  "batch_norm_momentum": 0.9,
  "batch_norm_epsilon": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class Line:
  """One property: it holds where the measured deviation is at most the limit."""

  name: str
  deviation: float
  limit: float
  meaning: str

  @property
  def holds(self) -> bool:
    return self.deviation <= self.limit  # False for NaN.


@dataclasses.dataclass(frozen=True)
class Observation:
  """What steps of the package did, seen from outside.

  ids: the examples of each step, int `[steps, k, n]`.
  scalars: what the step reported, float `[steps]` by name.
  variables: weights and moving statistics by name, before each step and after the last.
  spread: largest difference of a replica's weights, statistics or optimizer state from the first
    replica's, at the end.
  """

  ids: np.ndarray
  scalars: dict[str, np.ndarray]
  variables: list[dict[str, np.ndarray]]
  spread: float

  def update(self, step: int, name: str) -> np.ndarray:
    """What the step took off a variable, float64."""
    before, after = self.variables[step][name], self.variables[step + 1][name]
    return before.astype(np.float64) - after

  def parameters(self, step: int) -> dict[str, np.ndarray]:
    """The weights before a step."""
    return {name: value for name, value in self.variables[step].items() if "moving_" not in name}


def make_recipe(replicas: int, **changes) -> Recipe:
  """k = 4 workers, or two a replica, of 5 images; 3 epochs of 12 steps.

  The peak rate is 10/3 η; the warmup ends within an epoch, at step 15, and the rate decays at 27
  and 33. k, n and kn over the reference's minibatch differ, so that none can stand for another.
  Every value is spelled out: the reference must not take over a wrong default of `Recipe`.
  """
  workers = replicas * max(2, math.ceil(4 / replicas))
  values = {
    "dataset": "verify",
    "validation_split": "none",
    "image_size": SIDE,
    "augmentation": "none",
    "channel_mean": MEAN,
    "channel_std": STD,
    "last_gamma": 0.0,
    "batch_norm_momentum": 0.9,
    "batch_norm_epsilon": 1e-5,
    "dtype": "float32",
    "workers": workers,
    "per_worker_batch_size": PER_WORKER_BATCH_SIZE,
    "reference_batch_size": workers * PER_WORKER_BATCH_SIZE * 3 // 10,
    "reference_learning_rate": 0.2,
    "learning_rate_scaling": "linear",
    "epochs": 3,
    "warmup": "gradual",
    "warmup_epochs": 1.25,
    "decay_epochs": (2.25, 2.75),
    "decay_factor": 0.3,
    "momentum": 0.9,
    "nesterov": True,
    "momentum_correction": True,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "seed": 7,
  }
  return Recipe(**values | changes)


@functools.cache  # The same examples serve all steps of a run.
def make_examples(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 `[N, H, W, 3]` that tell their number, and labels; N is no multiple of kn."""
  count = recipe.global_batch_size * STEPS_PER_EPOCH + 3
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (count, recipe.image_size, recipe.image_size, 3)).astype(np.uint8)
  images[:, 0, 0] = np.arange(count)[:, None] // _ID_BYTES % 256
  return images, rng.integers(0, CLASSES, count).astype(np.int32)


def make_parameters(network: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Weights and moving statistics by name to start from, float32 values, none of them at rest.

  Empty for the package's networks, which start from what `networks.build_model` gave them.
  """
  rng = np.random.default_rng(2)
  shapes = {"plain": {"conv1": (3, 3, 3, 8), "conv2": (3, 3, 8, 12), "logits": (12, CLASSES)}}
  shapes["small_residual"] = {
    "stem": (3, 3, 3, 8),
    "block1_1": (1, 1, 8, 6),
    "block1_2": (3, 3, 6, 6),
    "block1_3": (1, 1, 6, 12),
    "block1_shortcut": (1, 1, 8, 12),
    "block2_1": (3, 3, 12, 12),
    "block2_2": (3, 3, 12, 12),
    "logits": (12, CLASSES),
  }
  weights, statistics = {}, {}
  for name, shape in shapes.get(network, {}).items():
    normalized = network != "plain" and name != "logits"
    kernel = f"{name}_conv/kernel" if normalized else f"{name}/kernel"
    weights[kernel] = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
    if name == "logits":
      weights["logits/bias"] = rng.normal(0, 0.3, CLASSES)
    if normalized:
      weights[f"{name}_bn/gamma"] = rng.uniform(0.5, 1.5, shape[-1])
      weights[f"{name}_bn/beta"] = rng.normal(0, 0.3, shape[-1])
      statistics[f"{name}_bn/moving_mean"] = rng.normal(0, 0.3, shape[-1])
      statistics[f"{name}_bn/moving_variance"] = rng.uniform(0.5, 1.5, shape[-1])
  rounded = [
    {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}
    for values in (weights, statistics)
  ]
  return tuple(rounded)


def build_network(network: str, recipe: Recipe, loss_scale: float = 1.0):
  """The Keras network whose layers bear the names of `reference.NETWORKS`.

  Args:
    network: "plain", "small_residual" or the recipe's own.
    recipe: for its dtype, and for BN.
    loss_scale: the logits' factor; 0 leaves the loss without a gradient.
  """
  import keras

  from tf_largebatch.models.networks import build_model
  from tf_largebatch.models.normalization import PerWorkerBatchNormalization

  if network == recipe.network:
    return build_model(recipe, CLASSES)
  dtype = recipe.dtype

  def convolution(x, filters, size, strides, name):
    if strides > 1 and size > 1:
      x = keras.layers.ZeroPadding2D((size - 1) // 2, dtype=dtype)(x)
    padding = "same" if strides == 1 else "valid"
    layer = keras.layers.Conv2D(
      filters, size, strides, padding=padding, use_bias=False, dtype=dtype, name=name
    )
    return layer(x)

  def normalized(x, filters, size, strides, name):
    x = convolution(x, filters, size, strides, f"{name}_conv")
    return PerWorkerBatchNormalization(
      momentum=recipe.batch_norm_momentum,
      epsilon=recipe.batch_norm_epsilon,
      dtype=dtype,
      name=f"{name}_bn",
    )(x)

  def tanh(x):
    return keras.layers.Activation("tanh", dtype=dtype)(x)

  inputs = keras.Input((SIDE, SIDE, 3), dtype=dtype)
  scale, offset = 1 / np.array(STD), -np.array(MEAN) / np.array(STD)
  x = keras.layers.Rescaling(scale, offset, dtype=dtype)(inputs)
  if network == "plain":
    x = tanh(convolution(x, 8, 3, 1, "conv1"))
    x = tanh(convolution(x, 12, 3, 2, "conv2"))
  else:
    x = tanh(normalized(x, 8, 3, 1, "stem"))
    y = tanh(normalized(x, 6, 1, 1, "block1_1"))
    y = normalized(tanh(normalized(y, 6, 3, 2, "block1_2")), 12, 1, 1, "block1_3")
    x = tanh(keras.layers.Add(dtype=dtype)([y, normalized(x, 12, 1, 2, "block1_shortcut")]))
    y = normalized(tanh(normalized(x, 12, 3, 1, "block2_1")), 12, 3, 1, "block2_2")
    x = tanh(keras.layers.Add(dtype=dtype)([x, y]))
  x = keras.layers.GlobalAveragePooling2D(dtype=dtype)(x)
  x = keras.layers.Dense(CLASSES, dtype=dtype, name="logits")(x)
  if loss_scale != 1:
    x = keras.layers.Rescaling(loss_scale, dtype=dtype)(x)
  return keras.Model(inputs, x)


def observe(
  strategy,
  recipe: Recipe,
  network: str,
  steps: int,
  loss_scale: float = 1.0,
  first_step: int = 0,
) -> Observation:
  """Takes steps of a run on all replicas, from `make_parameters`, and tells what they did.

  Args:
    strategy, recipe, network, loss_scale: see `build_network`.
    steps: how many.
    first_step: of the run, whose examples the first one takes.
  """
  import tensorflow as tf

  from tf_largebatch.data import sources
  from tf_largebatch.optim.optimizers import build_optimizer
  from tf_largebatch.training import step
  from tf_largebatch.training.batches import distribute_train_dataset

  source = sources.ArraySource(*make_examples(recipe), CLASSES)
  with strategy.scope():
    model = build_network(network, recipe, loss_scale)
    optimizer = build_optimizer(recipe, source.num_examples)
    optimizer.build(model.trainable_variables)
  weights, statistics = make_parameters(network)
  for variable in model.weights:
    variable.assign((weights | statistics).get(variable.path, variable))

  def variables():
    return {variable.path: variable.numpy() for variable in model.weights}

  def numbers(images, labels):
    return tf.tensordot(tf.cast(images[:, :, 0, 0], tf.float64), _ID_BYTES.astype(float), 1)

  def spread(images, labels):
    context, largest = tf.distribute.get_replica_context(), []
    for variable in model.weights + optimizer.variables:
      mine = tf.cast(variable.value, tf.float64)
      others = tf.zeros_like(mine)
      first = tf.where(context.replica_id_in_sync_group == 0, mine, others)
      first = context.all_reduce(tf.distribute.ReduceOp.SUM, first)
      largest.append(tf.reduce_max(tf.abs(mine - first)))
    return tf.reduce_max(tf.stack(largest))

  batches = iter(distribute_train_dataset(strategy, recipe, source, first_step))
  train_step = step.make_train_step(strategy, model, optimizer, recipe)
  gather_ids = make_gather(strategy, numbers)
  ids, scalars, history = [], [], [variables()]
  for _ in range(steps):
    batch = next(batches)
    ids.append(gather_ids(batch).reshape(recipe.workers, -1).astype(np.int64))
    scalars.append({name: float(value) for name, value in train_step(batch).items()})
    history.append(variables())
  return Observation(
    np.array(ids),
    {name: np.array([values[name] for values in scalars]) for name in scalars[0]},
    history,
    float(np.max(make_gather(strategy, spread)(batch))),
  )


def make_gather(strategy, function):
  """Returns a function that calls `function` on every replica's part of a batch.

  It returns what all of them returned, float64 `[replicas, …]`, on every task. The sum over the
  replicas is exact: each place of it is one value and zeros.
  """
  import tensorflow as tf

  def replica(*batch):
    context = tf.distribute.get_replica_context()
    value = tf.cast(function(*batch), tf.float64)
    count = strategy.num_replicas_in_sync
    places = tf.reshape(tf.range(count), [count] + [1] * len(value.shape))
    here = tf.where(places == context.replica_id_in_sync_group, value[None], 0.0)
    return context.all_reduce(tf.distribute.ReduceOp.SUM, here)

  @tf.function
  def gather(batch):
    return strategy.run(replica, args=batch)

  return lambda batch: strategy.experimental_local_results(gather(batch))[0].numpy()


def reference_step(
  state: reference.State, recipe: Recipe, network: str, ids: np.ndarray, rate: float
) -> tuple[reference.Minibatch, reference.State]:
  """The reference's sums for the examples `[k, n]` of a step, and its state after it."""
  images, labels = make_examples(recipe)
  batch = reference.minibatch(
    network,
    state.parameters,
    images[ids],
    labels[ids],
    mean=MEAN,
    std=STD,
    epsilon=recipe.batch_norm_epsilon,
    label_smoothing=recipe.label_smoothing,
  )
  return batch, reference.sgd_step(
    state,
    batch,
    rate,
    momentum=recipe.momentum,
    nesterov=recipe.nesterov,
    momentum_correction=recipe.momentum_correction,
    weight_decay=recipe.weight_decay,
    batch_norm_momentum=recipe.batch_norm_momentum,
  )


def reference_steps(
  seen: Observation, recipe: Recipe, network: str, rates: np.ndarray
) -> Iterator[tuple[reference.State, reference.Minibatch, reference.State]]:
  """For each observed step what the reference makes of it: (before, sums of the step, after).

  Each step starts from the weights and statistics that were observed before it, so that errors do
  not grow from step to step; the momentum is the reference's own all along.
  """
  state = reference.initial_state(seen.parameters(0), {})
  for step, rate in enumerate(rates):
    parameters = seen.parameters(step)
    statistics = {
      name: value for name, value in seen.variables[step].items() if name not in parameters
    }
    state = dataclasses.replace(state, parameters=parameters, statistics=statistics)
    batch, after = reference_step(state, recipe, network, seen.ids[step], rate)
    yield state, batch, after
    state = after


def _expected_update(before: reference.State, after: reference.State) -> dict[str, np.ndarray]:
  return {name: value - after.parameters[name] for name, value in before.parameters.items()}


def reference_rates(recipe: Recipe, steps: int) -> np.ndarray:
  """η_t of the reference for the first steps."""
  return np.array(
    [
      reference.rate(
        t,
        steps_per_epoch=STEPS_PER_EPOCH,
        batch=recipe.global_batch_size,
        reference_rate=recipe.reference_learning_rate,
        reference_batch=recipe.reference_batch_size,
        scaling=recipe.learning_rate_scaling,
        warmup=recipe.warmup,
        warmup_epochs=recipe.warmup_epochs,
        decay_epochs=recipe.decay_epochs,
        decay_factor=recipe.decay_factor,
      )
      for t in range(steps)
    ]
  )


def _distance(measured: dict, expected: dict) -> float:
  """‖measured − expected‖ / ‖expected‖ over all names together; where 0 is expected, 0 or ∞."""
  difference = _norm({name: measured[name] - expected[name] for name in expected})
  scale = _norm(expected)
  if scale == 0:
    return math.inf if difference else 0.0
  return difference / scale


def _scaled(values: dict, factor: float) -> dict:
  return {name: factor * value for name, value in values.items()}


def _norm(values: dict) -> float:
  return float(np.sqrt(sum(np.sum(value**2) for value in values.values())))


# The rate is high for the gradient to outweigh the rounding of the weights that it is read from.
_PLAIN_SGD = {
  "momentum": 0.0,
  "nesterov": False,
  "warmup": "none",
  "reference_learning_rate": 1.0,
}


def check_aggregation(strategy) -> list[Line]:
  """Remark 3, on a network without BN: plain SGD's step is η times the mean over kn images."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, **_PLAIN_SGD)
  seen = observe(strategy, recipe, "plain", 3)
  rates = seen.scalars["learning_rate"]
  deviations = []
  for step, (before, _, after) in enumerate(reference_steps(seen, recipe, "plain", rates)):
    expected = _expected_update(before, after)
    deviations.append(_distance({name: seen.update(step, name) for name in expected}, expected))
  meaning = "gradient that the weights moved by, against the mean over kn images; relative"
  return [Line("aggregation", float(np.max(deviations)), 1e-5, meaning)]


def check_normalization(strategy) -> list[Line]:
  """§2.3: every worker normalises over its own n images; the running averages see all workers."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, **_PLAIN_SGD)
  seen = observe(strategy, recipe, "small_residual", 4)
  rates = seen.scalars["learning_rate"]
  groups, averages = [], []
  for step, (_, batch, after) in enumerate(reference_steps(seen, recipe, "small_residual", rates)):
    # The direction alone: a wrong factor is the aggregation's fault.
    update = {name: seen.update(step, name) for name in batch.gradients}
    direction = _scaled(batch.gradients, 1 / _norm(batch.gradients))
    groups.append(_distance(_scaled(update, 1 / _norm(update)), direction))
    averages.append(_distance(seen.variables[step + 1], after.statistics))
  n = recipe.per_worker_batch_size
  return [
    Line(
      "BN groups",
      float(np.max(groups)),
      1e-4,
      f"direction of the gradient, BN over n = {n}; relative",
    ),
    Line(
      "moving statistics",
      float(np.max(averages)),
      1e-5,
      "running averages against those of the mean over the k workers; relative",
    ),
  ]


def check_weight_decay(strategy) -> list[Line]:
  """Remark 1, where the loss has no gradient: eq. 9 with g = λ·w on kernels, 0 on all else."""
  recipe = make_recipe(strategy.num_replicas_in_sync, weight_decay=0.5, warmup="none")
  seen = observe(strategy, recipe, "small_residual", 6, loss_scale=0.0)
  state = reference.initial_state(seen.parameters(0), {})
  zeros = {name: np.zeros_like(value) for name, value in state.parameters.items()}
  nothing = reference.Minibatch(loss=0.0, error=0.0, gradients=zeros, means={}, variances={})
  for rate in seen.scalars["learning_rate"]:
    state = reference.sgd_step(
      state, nothing, rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
  deviations = [
    _distance(seen.variables[-1], {name: value}) for name, value in state.parameters.items()
  ]
  meaning = "weights after 6 steps of decay alone, the worst variable; relative"
  return [Line("weight decay", float(np.max(deviations)), 1e-5, meaning)]


def check_schedule(strategy) -> list[Line]:
  """§2.1, §2.2, remark 2 and remark 4, on a run across a warmup, two decays and three epochs."""
  from tf_largebatch.optim.optimizers import build_optimizer

  recipe = make_recipe(strategy.num_replicas_in_sync)
  steps = 3 * STEPS_PER_EPOCH
  seen = observe(strategy, recipe, "plain", steps)
  rates = seen.scalars["learning_rate"]
  deviations = abs(rates / reference_rates(recipe, steps) - 1)
  warm, decayed = 15, 27
  ratio = recipe.global_batch_size / recipe.reference_batch_size
  # A minibatch below the reference's has no warmup (§5.3).
  small = dataclasses.replace(recipe, reference_batch_size=2 * recipe.global_batch_size)
  optimizer = build_optimizer(small, len(make_examples(small)[0]))
  unwarmed = abs(float(optimizer.learning_rate) / reference_rates(small, 1)[0] - 1)
  off = [name for name, value in PAPER.items() if getattr(Recipe(), name) != value]
  return [
    Line(
      "the paper's values",
      len(off),
      0,
      f"defaults that are not the paper's: {', '.join(off) or 'none'}",
    ),
    Line(
      "scaling rule",
      float(deviations[warm:decayed].max()),
      1e-6,
      f"rate after the warmup, against {ratio:.3g} η; relative",
    ),
    Line(
      "warmup",
      float(np.max([deviations[:warm].max(), unwarmed])),
      1e-6,
      "rate of each step of it, none for a small minibatch; relative",
    ),
    Line("step decay", float(deviations[decayed:].max()), 1e-6, "rate after it; relative"),
    _momentum_line(seen, recipe, rates),
    *_shuffling_lines(seen.ids, recipe),
  ]


def _momentum_line(seen: Observation, recipe: Recipe, rates) -> Line:
  """Eq. 9 with the rates that were used, up to one factor for all steps.

  A wrong factor is the aggregation's fault.
  """
  factor, deviations = None, []
  for step, (before, _, after) in enumerate(reference_steps(seen, recipe, "plain", rates)):
    if rates[step] == 0:
      continue
    expected = _expected_update(before, after)
    measured = {name: seen.update(step, name) for name in expected}
    if factor is None:
      factor = sum(np.sum(measured[name] * value) for name, value in expected.items())
      factor /= _norm(expected) ** 2
    deviations.append(_distance(measured, _scaled(expected, factor)))
  meaning = "update of each step against eq. 9, across warmup and decay; relative"
  return Line("momentum correction", float(np.max(deviations)), 1e-4, meaning)


def _shuffling_lines(ids: np.ndarray, recipe: Recipe) -> list[Line]:
  """Remark 4: one random shuffle an epoch, divided among the workers (ids `[steps, k, n]`)."""
  from tf_largebatch.data import input_pipeline

  total = len(make_examples(recipe)[0])
  epochs = ids.reshape(3, STEPS_PER_EPOCH, *ids.shape[1:])
  faults = 0
  for epoch in epochs:
    inside = set(epoch.ravel()) & set(range(total))
    faults += epoch.size - len(inside)
  # The tail below kn is left out, of each epoch another.
  left_out = [frozenset(range(total)) - frozenset(epoch.ravel().tolist()) for epoch in epochs]
  if len(set(left_out)) == 1:
    faults += len(left_out[0])
  orders = [np.arange(epochs[0].size), *(epoch.ravel() for epoch in epochs)]
  correlations = [abs(np.corrcoef(orders[a], orders[b])[0, 1]) for b in range(4) for a in range(b)]
  # A worker's share of one epoch meets its share of the next by chance alone: hypergeometric, one
  # draw a worker (the draws of the workers of an epoch are independent but for a term of 1/k).
  share = STEPS_PER_EPOCH * recipe.per_worker_batch_size
  expected = share**2 / total
  variance = expected * (1 - share / total) * (total - share) / (total - 1)
  overlaps = []
  for a, b in ((0, 1), (1, 2), (0, 2)):
    shared = [
      len(np.intersect1d(epochs[a][:, worker], epochs[b][:, worker]))
      for worker in range(recipe.workers)
    ]
    overlaps.append(abs(sum(shared) - recipe.workers * expected))

  def alone(seed: int):
    seeded = dataclasses.replace(recipe, seed=seed)
    return np.array(
      [
        [input_pipeline.example_ids(seeded, total, step, j) for j in range(recipe.workers)]
        for step in (0, len(ids) - 1)
      ]
    )

  expected_ids = alone(recipe.seed)
  strays = int(np.sum(expected_ids != ids[[0, -1]]))
  if np.array_equal(expected_ids, alone(recipe.seed + 1)):
    strays += expected_ids.size
  return [
    Line("every image once", faults, 0, "images repeated in an epoch, or that no epoch has"),
    Line(
      "shuffled anew",
      float(np.max(correlations) * np.sqrt(epochs[0].size)),
      6,
      "correlation of an epoch's order with another's or the data set's; standard errors",
    ),
    Line(
      "one shuffle for all",
      float(np.max(overlaps) / np.sqrt(recipe.workers * variance)),
      5,
      "images that stay with their worker from epoch to epoch, against chance; standard errors",
    ),
    Line(
      "samples of the recipe",
      strays,
      0,
      "examples of the first and last step that one device, or another seed, would not have",
    ),
  ]


def check_step(strategy) -> list[Line]:
  """All parts of the recipe at once, on a residual network: each step from where the last ended."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, weight_decay=1e-2, label_smoothing=0.1)
  steps = 3 * STEPS_PER_EPOCH
  seen = observe(strategy, recipe, "small_residual", steps)
  rates, deviations = reference_rates(recipe, steps), []
  compared = reference_steps(seen, recipe, "small_residual", rates)
  for step, (before, batch, after) in enumerate(compared):
    expected = _expected_update(before, after)
    deviations.append(_distance({name: seen.update(step, name) for name in expected}, expected))
    deviations.append(abs(seen.scalars["loss"][step] / batch.loss - 1))
    deviations.append(abs(seen.scalars["error"][step] - batch.error))
  compares = f"on {replicas} replicas" if replicas > 1 else "(one replica: nothing to compare)"
  meaning = f"update, loss, error of each of {steps} steps with all parts at once; relative"
  return [
    Line("whole step", float(np.max(deviations)), 1e-4, meaning),
    Line(
      "replicas identical",
      seen.spread,
      0,
      f"weights, statistics and momentum {compares}; largest difference",
    ),
  ]


def check_network(strategy) -> list[Line]:
  """§5.1: ResNet-50 as `networks.build_model` makes it, on this task's first device."""
  import keras

  from tf_largebatch.models.networks import build_model

  recipe = make_recipe(1, network="resnet50", image_size=64, per_worker_batch_size=4)
  with strategy.scope():
    model = build_model(recipe, CLASSES)
  start = {variable.path: variable.numpy().astype(np.float64) for variable in model.weights}
  last = set(reference.last_batch_norms("resnet50"))
  constants = {"gamma": 1.0, "beta": 0.0, "bias": 0.0}
  offsets, kernels = [], {}
  for name, value in start.items():
    layer, _, kind = name.rpartition("/")
    if kind in constants:
      offsets.append(abs(value - (0.0 if layer in last and kind == "gamma" else constants[kind])))
    elif kind == "kernel":
      # He et al. 2015: variance 2 / fan-out; the last layer's deviation is 0.01.
      fan_out = np.prod(value.shape[:2]) * value.shape[-1]
      kernels[name] = value / (np.sqrt(2 / fan_out) if layer != "logits" else 0.01)
  # Weights at which no block is idle and rounding errors grow little from block to block.
  rng = np.random.default_rng(3)
  moved = start | {
    f"{name}/gamma": rng.uniform(0.2, 0.6, start[f"{name}/gamma"].shape) for name in last
  }
  for variable in model.weights:
    variable.assign(moved[variable.path])
    moved[variable.path] = variable.numpy()
  images = rng.integers(0, 256, (recipe.per_worker_batch_size, 64, 64, 3))
  logits = keras.ops.convert_to_numpy(model(images.astype(np.float32), training=True))
  expected = reference.forward("resnet50", moved, images, mean=MEAN, std=STD)
  worker = reference.worker_pass(
    "resnet50", moved, images, np.zeros(len(images), int), mean=MEAN, std=STD
  )
  m, averages = recipe.batch_norm_momentum, {}
  for kind, values in (("mean", worker.means), ("variance", worker.variances)):
    for layer, value in values.items():
      name = f"{layer}/moving_{kind}"
      averages[name] = m * start[name] + (1 - m) * value
  after = {variable.path: variable.numpy() for variable in model.weights}
  trainable = {variable.path for variable in model.trainable_variables}
  return [
    Line(
      "network",
      float(np.max([_distance({"": logits}, {"": expected}), _distance(after, averages)])),
      1e-4,
      "logits and running averages of ResNet-50 for one worker, at random γ; relative",
    ),
    Line(
      "variables",
      len(trainable ^ set(worker.gradients)),
      0,
      "of ResNet-50 that the paper's has not, or that are missing",
    ),
    Line(
      "initial γ", float(max(np.max(x) for x in offsets)), 0, "γ, β, biases; largest difference"
    ),
    Line(
      "initial kernels",
      _abnormality(kernels.values()),
      6,
      "from normal, of He's variance, each its own; standard errors",
    ),
  ]


def _abnormality(samples) -> float:
  """How far samples are from independent N(0, 1), in standard errors of the worst figure."""
  figures, of_shape = [], {}
  for sample in samples:
    variance = np.mean(sample**2)
    figures.append((variance - 1) * np.sqrt(sample.size / 2))
    figures.append((np.mean(sample**4) / variance**2 - 3) * np.sqrt(sample.size / 24))
    of_shape.setdefault(sample.shape, []).append(sample.ravel())
  for alike in of_shape.values():
    for one, other in itertools.pairwise(alike):
      figures.append(np.corrcoef(one, other)[0, 1] * np.sqrt(one.size))
  return float(np.max(np.abs(figures)))


def check_resnet50(strategy) -> list[Line]:
  """One step of ResNet-50 at 64×64, n = 8: the update of every variable.

  η is so large that the update outweighs the rounding of the weights that it is read from. In
  float64 the last γ is 1, so that every variable has a gradient. In float32 it is the paper's 0 and
  a batch is passed over, up to six, if it fails: among its millions of ReLU inputs one may lie
  within rounding of 0, where there is no derivative, and then moves the gradients by up to 1 %. A
  wrong formula is wrong on all batches.
  """
  lines = []
  for dtype, last_gamma, limit, batches in (("float64", 1.0, 1e-11, 1), ("float32", 0.0, 1e-4, 6)):
    recipe = make_recipe(
      strategy.num_replicas_in_sync,
      network="resnet50",
      image_size=64,
      dtype=dtype,
      per_worker_batch_size=8,
      last_gamma=last_gamma,
      weight_decay=1e-4,
      reference_learning_rate=1000.0,
      warmup="none",
    )
    best = (math.inf, "none")
    for first_step in range(batches):
      seen = observe(strategy, recipe, "resnet50", 1, first_step=first_step)
      rates = reference_rates(recipe, 1)
      ((before, _, after),) = reference_steps(seen, recipe, "resnet50", rates)
      expected = _expected_update(before, after)
      # NaN before all others, so that it is not lost.
      worst = max(
        (
          (_distance({name: seen.update(0, name)}, {name: expected[name]}), name)
          for name in expected
        ),
        key=lambda item: (math.isnan(item[0]), item[0]),
      )
      best = min(best, worst)
      # All tasks must come to the same end, or they would wait for each other.
      if make_gather(strategy, lambda value=best[0]: np.float64(value))(()).max() <= limit:
        break
    meaning = f"update of {len(expected)} variables, last γ {last_gamma:g}; largest: {best[1]}"
    lines.append(Line(f"ResNet-50 {dtype}", best[0], limit, meaning))
  return lines


# Only where it is asked for.
_LONG = ("ResNet-50 float64", "ResNet-50 float32")
# Each check, with the names of its lines.
CHECKS = {
  check_schedule: (
    "the paper's values",
    "scaling rule",
    "warmup",
    "step decay",
    "momentum correction",
    "every image once",
    "shuffled anew",
    "one shuffle for all",
    "samples of the recipe",
  ),
  check_weight_decay: ("weight decay",),
  check_aggregation: ("aggregation",),
  check_normalization: ("BN groups", "moving statistics"),
  check_step: ("whole step", "replicas identical"),
  check_network: ("network", "variables", "initial γ", "initial kernels"),
  check_resnet50: _LONG,
}


def verify(strategy, only=()) -> list[Line]:
  """Runs the checks on the strategy; each deviation is the worst that a task found.

  Args:
    strategy: made by `make_strategy`.
    only: names of the properties to check; empty: all but those of `check_resnet50`.
  """
  only = set(only) or {name for names in CHECKS.values() for name in names} - set(_LONG)
  lines = []
  for check, names in CHECKS.items():
    if only & set(names):
      lines += [line for line in check(strategy) if line.name in only]
  deviations = make_gather(strategy, lambda: np.array([line.deviation for line in lines]))(())
  worst = deviations.max(axis=0)  # NaN where one is.
  return [
    dataclasses.replace(line, deviation=float(value))
    for line, value in zip(lines, worst, strict=True)
  ]


def _as_json(line: Line) -> dict:
  deviation = line.deviation if math.isfinite(line.deviation) else None  # JSON knows no NaN.
  return dataclasses.asdict(line) | {"deviation": deviation, "holds": line.holds}


def _checked_output(path: str) -> pathlib.Path:
  output = pathlib.Path(path).expanduser()
  if output.is_dir() or not os.access(output.parent, os.W_OK):
    raise UserError(f"--output={path} cannot be written; name a file in a directory that can.")
  return output


def _run() -> int:
  names = [name for group in CHECKS.values() for name in group]
  unknown = sorted(set(flags.FLAGS.only) - set(names))
  if unknown:
    raise UserError(f"--only={','.join(unknown)}: no such property; there are {', '.join(names)}.")
  cluster = read_cluster()
  # The chief's alone: a task that ended here would leave the others waiting.
  output = _checked_output(flags.FLAGS.output) if cluster.is_chief else None
  if flags.FLAGS.logical_cpus > 1 and cluster.num_tasks > 1:
    raise UserError(
      "--logical_cpus is for one task; leave it out under TF_CONFIG, where TensorFlow uses one CPU "
      "a task."
    )
  import tensorflow as tf

  if flags.FLAGS.logical_cpus > 1:
    if tf.config.list_physical_devices("GPU"):
      raise UserError("--logical_cpus is for machines without a GPU; leave it out here.")
    (cpu,) = tf.config.list_physical_devices("CPU")
    parts = [tf.config.LogicalDeviceConfiguration()] * flags.FLAGS.logical_cpus
    tf.config.set_logical_device_configuration(cpu, parts)
  from tf_largebatch.distributed.strategy import describe, make_strategy
  from tf_largebatch.training.environment import versions

  strategy = make_strategy(cluster, flags.FLAGS.communication)

  tf.get_logger().setLevel("ERROR")  # It takes each new run's gather for a retracing.
  began = time.monotonic()
  lines = verify(strategy, flags.FLAGS.only)
  seconds = time.monotonic() - began
  failed = [line.name for line in lines if not line.holds]
  if not cluster.is_chief:
    return bool(failed)
  where = describe(strategy, cluster, flags.FLAGS.communication)
  report = {
    "status": "failed" if failed else "verified",
    "properties": [_as_json(line) for line in lines],
    "seconds": seconds,
    "cluster": where,
    "versions": versions(),
  }
  print(", ".join(f"{name} {value}" for name, value in where.items()))
  print(f"{'property':<22}{'deviation':>10}{'limit':>10}")
  for line in lines:
    verdict = "holds" if line.holds else "FAILS"
    print(f"{line.name:<22}{line.deviation:>10.1e}{line.limit:>10.1e}  {verdict}  {line.meaning}")
  if failed:
    print(f"{len(failed)} of {len(lines)} properties fail: {', '.join(failed)}.")
  else:
    print(f"All {len(lines)} properties hold, in {seconds:.0f} s.")
  try:
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(output)
  except OSError as error:
    raise UserError(f"--output={output} cannot be written ({error.strerror}).") from error
  return bool(failed)


def main(argv: list[str]) -> int:
  try:
    if len(argv) > 1:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
    return int(_run())
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_string("output", "verify.json", "File for what was measured, as JSON.")
  flags.DEFINE_enum(
    "communication", "auto", ["auto", "nccl", "ring"], "Collectives, as in a training run."
  )
  flags.DEFINE_integer(
    "logical_cpus",
    1,
    "Replicas to make of this machine's CPU, where it has no GPU and is the only task.",
    lower_bound=1,
  )
  flags.DEFINE_list(
    "only",
    [],
    f"Properties to check, by name; left out: all but {', '.join(_LONG)}, which take minutes.",
  )


if __name__ == "__main__":
  define_flags()
  app.run(main)
