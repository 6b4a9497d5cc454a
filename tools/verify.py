r"""Checks on your own machines, devices and collectives that the recipe is computed right.

  python -m tools.verify
  python -m tools.launch_local --tasks=2 --module=tools.verify

Runs under the same launch as a training run: alone, or on each machine with its `TF_CONFIG`. A
small problem in float32 goes through the package's own input pipeline, step, optimizer and
collectives, on all devices; each property of the paper's recipe is compared with `tools.reference`,
the equations in NumPy float64, and gets one line with the measured deviation and its limit. The
exit status is 1 if one fails, and what was measured is left in `--output` as JSON.

Each property is measured where the others cannot blur it: the aggregation of gradients on a network
without BN, weight decay where the loss has no gradient, the momentum with the rates that were
really used. So the line that fails names the fault.
"""

import dataclasses
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

from tf_largebatch.cluster import describe, make_strategy, read_cluster
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import reference

CLASSES = 10
SIDE = 8
PER_WORKER_BATCH_SIZE = 4
STEPS_PER_EPOCH = 12
MEAN, STD = (120.0, 125.0, 130.0), (60.0, 65.0, 70.0)
# The first image of a step holds its example's number in its first pixel, three bytes.
_ID_BYTES = np.array([1, 256, 65536])


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
  copies: each replica's weights, statistics and optimizer state at the end, `[replicas, values]`.
  """

  ids: np.ndarray
  scalars: dict[str, np.ndarray]
  variables: list[dict[str, np.ndarray]]
  copies: np.ndarray

  def update(self, step: int, name: str) -> np.ndarray:
    """What the step took off a variable, float64."""
    before, after = self.variables[step][name], self.variables[step + 1][name]
    return before.astype(np.float64) - after

  def parameters(self, step: int) -> dict[str, np.ndarray]:
    """The weights before a step."""
    return {name: value for name, value in self.variables[step].items() if "moving_" not in name}


def make_recipe(replicas: int, **changes) -> Recipe:
  """k = 4 workers, or two a replica, of 4 images; 3 epochs of 12 steps.

  The peak rate is 4 η; the warmup ends within an epoch, at step 15, and the rate decays at 30.
  """
  workers = replicas * max(2, math.ceil(4 / replicas))
  values = {
    "dataset": "verify",
    "validation_split": "none",
    "image_size": SIDE,
    "augmentation": "none",
    "channel_mean": MEAN,
    "channel_std": STD,
    "workers": workers,
    "per_worker_batch_size": PER_WORKER_BATCH_SIZE,
    "reference_batch_size": workers * PER_WORKER_BATCH_SIZE // 4,
    "reference_learning_rate": 0.05,
    "epochs": 3,
    "warmup_epochs": 1.25,
    "decay_epochs": (2.5,),
    "weight_decay": 0.0,
  }
  return Recipe(**values | changes)


def make_examples(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 `[N, H, W, 3]` that tell their number, and labels; N is no multiple of kn."""
  count = recipe.global_batch_size * STEPS_PER_EPOCH + 3
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (count, recipe.image_size, recipe.image_size, 3)).astype(np.uint8)
  images[:, 0, 0] = np.arange(count)[:, None] // _ID_BYTES % 256
  return images, rng.integers(0, CLASSES, count).astype(np.int32)


def make_parameters(network: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Weights and moving statistics by name to start from, float32 values, none of them at rest.

  Empty for the package's networks, which start from what `training.build_model` gave them.
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

  from tf_largebatch import training
  from tf_largebatch.normalization import PerWorkerBatchNormalization

  if network == recipe.network:
    return training.build_model(recipe, CLASSES)
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

  from tf_largebatch import sources, step, training

  source = sources.ArraySource(*make_examples(recipe), CLASSES)
  with strategy.scope():
    model = build_network(network, recipe, loss_scale)
    optimizer = training.build_optimizer(recipe, source.num_examples)
    optimizer.build(model.trainable_variables)
  weights, statistics = make_parameters(network)
  for variable in model.weights:
    variable.assign((weights | statistics).get(variable.path, variable))

  def variables():
    return {variable.path: variable.numpy() for variable in model.weights}

  def numbers(images, labels):
    return tf.tensordot(tf.cast(images[:, :, 0, 0], tf.float64), _ID_BYTES.astype(float), 1)

  def state(images, labels):
    values = [variable.value for variable in model.weights + optimizer.variables]
    return tf.concat([tf.cast(tf.reshape(value, [-1]), tf.float64) for value in values], 0)

  batches = iter(training.distribute_train_dataset(strategy, recipe, source, first_step))
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
    make_gather(strategy, state)(batch),
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
    place = tf.one_hot(context.replica_id_in_sync_group, count, dtype=tf.float64)
    place = tf.reshape(place, [count] + [1] * len(value.shape))
    return context.all_reduce(tf.distribute.ReduceOp.SUM, place * value[None])

  @tf.function
  def gather(batch):
    return strategy.run(replica, args=batch)

  return lambda batch: strategy.experimental_local_results(gather(batch))[0].numpy()


def reference_minibatch(observation, recipe: Recipe, network: str, step: int):
  """The reference's sums for the examples and the weights of an observed step."""
  images, labels = make_examples(recipe)
  ids = observation.ids[step]
  return reference.minibatch(
    network,
    observation.parameters(step),
    images[ids],
    labels[ids],
    mean=MEAN,
    std=STD,
    epsilon=recipe.batch_norm_epsilon,
    label_smoothing=recipe.label_smoothing,
  )


def reference_steps(
  seen: Observation, recipe: Recipe, network: str
) -> Iterator[tuple[reference.State, reference.Minibatch, reference.State]]:
  """For each observed step what the reference makes of it: (before, sums of the step, after).

  Each step starts from the weights and statistics that were observed before it, so that errors do
  not grow from step to step; the momentum is the reference's own all along.
  """
  rates = reference_rates(recipe, len(seen.ids))
  state = reference.initial_state(seen.parameters(0), {})
  for step, rate in enumerate(rates):
    parameters = seen.parameters(step)
    statistics = {
      name: value for name, value in seen.variables[step].items() if name not in parameters
    }
    state = dataclasses.replace(state, parameters=parameters, statistics=statistics)
    batch = reference_minibatch(seen, recipe, network, step)
    after = reference.sgd_step(
      state,
      batch,
      rate,
      momentum=recipe.momentum,
      nesterov=recipe.nesterov,
      momentum_correction=recipe.momentum_correction,
      weight_decay=recipe.weight_decay,
      batch_norm_momentum=recipe.batch_norm_momentum,
    )
    yield state, batch, after
    state = after


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


def check_aggregation(strategy) -> list[Line]:
  """Remark 3, on a network without BN: plain SGD's step is η times the mean over kn images."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, momentum=0.0, nesterov=False, warmup="none")
  seen = observe(strategy, recipe, "plain", 3)
  deviations = []
  for step, rate in enumerate(seen.scalars["learning_rate"]):
    expected = reference_minibatch(seen, recipe, "plain", step).gradients
    measured = {name: seen.update(step, name) / rate for name in expected}
    deviations.append(_distance(measured, expected))
  meaning = "gradient that the weights moved by, against the mean over kn images; relative"
  return [Line("aggregation", float(np.max(deviations)), 1e-5, meaning)]


def check_normalization(strategy) -> list[Line]:
  """§2.3: every worker normalises over its own n images; the running averages see all workers."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, momentum=0.0, nesterov=False, warmup="none")
  seen = observe(strategy, recipe, "small_residual", 4)
  groups, statistics = [], []
  m = recipe.batch_norm_momentum
  for step in range(4):
    expected = reference_minibatch(seen, recipe, "small_residual", step)
    # The direction alone: a wrong factor is the aggregation's fault.
    update = {name: seen.update(step, name) for name in expected.gradients}
    direction = _scaled(expected.gradients, 1 / _norm(expected.gradients))
    groups.append(_distance(_scaled(update, 1 / _norm(update)), direction))
    for kind, values in (("mean", expected.means), ("variance", expected.variances)):
      before, after = (
        {name: seen.variables[at][f"{name}/moving_{kind}"] for name in values}
        for at in (step, step + 1)
      )
      averages = {name: m * before[name] + (1 - m) * values[name] for name in values}
      statistics.append(_distance(after, averages))
  n = recipe.per_worker_batch_size
  return [
    Line(
      "BN groups", np.max(groups), 1e-4, f"direction of the gradient, BN over n = {n}; relative"
    ),
    Line(
      "moving statistics",
      np.max(statistics),
      1e-5,
      "running averages against those of the mean over the k workers; relative",
    ),
  ]


def check_weight_decay(strategy) -> list[Line]:
  """Remark 1, where the loss has no gradient: eq. 9 with g = λ·w on kernels, 0 on all else."""
  recipe = make_recipe(strategy.num_replicas_in_sync, weight_decay=0.5, warmup="none")
  seen = observe(strategy, recipe, "small_residual", 6, loss_scale=0.0)
  deviations = []
  for name, weights in seen.parameters(0).items():
    w, u = weights.astype(np.float64), 0.0
    for rate in seen.scalars["learning_rate"]:
      g = recipe.weight_decay * w if name.endswith("/kernel") else 0 * w
      u = recipe.momentum * u + g
      w = w - rate * (recipe.momentum * u + g)
    deviations.append(_distance({name: seen.variables[-1][name]}, {name: w}))
  meaning = "weights after 6 steps of decay alone, the worst variable; relative"
  return [Line("weight decay", float(np.max(deviations)), 1e-5, meaning)]


def check_schedule(strategy) -> list[Line]:
  """§2.1, §2.2, remark 2 and remark 4, on a run across a warmup, a decay and three epochs."""
  recipe = make_recipe(strategy.num_replicas_in_sync)
  steps = 3 * STEPS_PER_EPOCH
  seen = observe(strategy, recipe, "plain", steps)
  rates = seen.scalars["learning_rate"]
  expected = reference_rates(recipe, steps)
  deviations = abs(rates / expected - 1)
  warm, decayed = 15, 30
  ratio = recipe.global_batch_size / recipe.reference_batch_size
  return [
    Line(
      "scaling rule",
      float(deviations[warm:decayed].max()),
      1e-6,
      f"rate after the warmup, against {ratio:g} η; relative",
    ),
    Line("warmup", float(deviations[:warm].max()), 1e-6, "rate of each step of it; relative"),
    Line("step decay", float(deviations[decayed:].max()), 1e-6, "rate after it; relative"),
    _momentum_line(seen, recipe, rates),
    *_shuffling_lines(seen.ids, recipe),
  ]


def _momentum_line(seen: Observation, recipe: Recipe, rates) -> Line:
  """Eq. 9 with the rates that were used: w ← w − η (m·u + g), u ← m·u + g.

  Up to one factor for all steps, for a wrong one is the aggregation's fault.
  """
  factor, u, deviations = None, None, []
  for step, rate in enumerate(rates):
    g = reference_minibatch(seen, recipe, "plain", step).gradients
    u = {name: g[name] + (recipe.momentum * u[name] if u else 0) for name in g}
    expected = {name: rate * (recipe.momentum * u[name] + g[name]) for name in g}
    if rate == 0:
      continue
    measured = {name: seen.update(step, name) for name in g}
    if factor is None:
      factor = sum(np.sum(measured[name] * expected[name]) for name in g) / _norm(expected) ** 2
    deviations.append(_distance(measured, _scaled(expected, factor)))
  meaning = "update of each step against eq. 9, across warmup and decay; relative"
  return Line("momentum correction", float(np.max(deviations)), 1e-4, meaning)


def _shuffling_lines(ids: np.ndarray, recipe: Recipe) -> list[Line]:
  """Remark 4: one random shuffle an epoch, divided among the workers (ids `[steps, k, n]`)."""
  from tf_largebatch import input_pipeline

  total = recipe.global_batch_size * STEPS_PER_EPOCH + 3
  epochs = ids.reshape(3, STEPS_PER_EPOCH, *ids.shape[1:])
  faults = 0
  for epoch in epochs:
    inside = set(epoch.ravel()) & set(range(total))
    faults += epoch.size - len(inside)
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
  alone = [
    [input_pipeline.example_ids(recipe, total, step, worker) for worker in range(recipe.workers)]
    for step in (0, len(ids) - 1)
  ]
  return [
    Line("every image once", faults, 0, "images repeated in an epoch, or none of the data set's"),
    Line(
      "shuffled anew",
      float(max(correlations) * np.sqrt(epochs[0].size)),
      6,
      "correlation of an epoch's order with another's or the data set's; standard errors",
    ),
    Line(
      "one shuffle for all",
      float(max(overlaps) / np.sqrt(recipe.workers * variance)),
      6,
      "images that stay with their worker from epoch to epoch, against chance; standard errors",
    ),
    Line(
      "samples of the recipe",
      int(np.sum(np.array(alone) != ids[[0, -1]])),
      0,
      "examples of the first and last step that one device alone would not have seen",
    ),
  ]


def check_step(strategy) -> list[Line]:
  """All parts of the recipe at once, on a residual network: each step from where the last ended."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, weight_decay=1e-2, label_smoothing=0.1)
  steps = 3 * STEPS_PER_EPOCH
  seen = observe(strategy, recipe, "small_residual", steps)
  deviations = []
  for step, (before, batch, after) in enumerate(reference_steps(seen, recipe, "small_residual")):
    expected = {name: w - after.parameters[name] for name, w in before.parameters.items()}
    deviations.append(_distance({name: seen.update(step, name) for name in expected}, expected))
    deviations.append(abs(seen.scalars["loss"][step] / batch.loss - 1))
  spread = np.abs(seen.copies - seen.copies[0])
  meaning = f"update and loss of each of {steps} steps with all parts at once; relative"
  return [
    Line("whole step", float(np.max(deviations)), 1e-4, meaning),
    Line(
      "replicas identical",
      float(spread.max()),
      0,
      f"weights, statistics and momentum on {len(seen.copies)} replicas; largest difference",
    ),
  ]


def check_network(strategy) -> list[Line]:
  """§5.1: ResNet-50 as `resnet.build` makes it, on this task's first device."""
  import functools

  import keras

  from tf_largebatch import resnet
  from tf_largebatch.normalization import PerWorkerBatchNormalization

  side, images_a_worker = 64, 4
  with strategy.scope():
    model = resnet.build(
      "resnet50",
      input_shape=(side, side, 3),
      num_classes=CLASSES,
      normalization=functools.partial(PerWorkerBatchNormalization, momentum=0.9, epsilon=1e-5),
      channel_mean=MEAN,
      channel_std=STD,
    )
  start = {variable.path: variable.numpy().astype(np.float64) for variable in model.weights}
  last = set(reference.last_batch_norms("resnet50"))
  constants = {"gamma": 1.0, "beta": 0.0, "bias": 0.0}
  offsets, errors = [], []
  for name, value in start.items():
    layer, _, kind = name.rpartition("/")
    if kind in constants:
      offsets.append(abs(value - (0.0 if layer in last and kind == "gamma" else constants[kind])))
    elif kind == "kernel":
      # He et al. 2015: variance 2 / fan-out; the last layer's deviation is 0.01.
      fan_out = np.prod(value.shape[:2]) * value.shape[-1]
      deviation = np.sqrt(2 / fan_out) if layer != "logits" else 0.01
      # The standard error of a normal sample's second moment.
      errors.append(abs(np.mean(value**2) / deviation**2 - 1) * np.sqrt(value.size / 2))
  # Weights at which no block is idle and rounding errors grow little from block to block.
  rng = np.random.default_rng(3)
  moved = start | {
    f"{name}/gamma": rng.uniform(0.2, 0.6, start[f"{name}/gamma"].shape) for name in last
  }
  for variable in model.weights:
    variable.assign(moved[variable.path])
    moved[variable.path] = variable.numpy()
  images = rng.integers(0, 256, (images_a_worker, side, side, 3))
  logits = keras.ops.convert_to_numpy(model(images.astype(np.float32), training=True))
  expected = reference.forward("resnet50", moved, images, mean=MEAN, std=STD)
  return [
    Line(
      "network",
      _distance({"logits": logits}, {"logits": expected}),
      1e-4,
      "logits of ResNet-50 for one worker, at random γ; relative",
    ),
    Line(
      "initial γ",
      np.max([np.max(offset) for offset in offsets]),
      0,
      "γ, β and biases; largest difference",
    ),
    Line("initial kernels", np.max(errors), 6, "variance of a layer's; standard errors"),
  ]


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
      ((before, _, after),) = reference_steps(seen, recipe, "resnet50")
      expected = {name: w - after.parameters[name] for name, w in before.parameters.items()}
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
  check_network: ("network", "initial γ", "initial kernels"),
  check_resnet50: _LONG,
}


def verify(strategy, only=()) -> list[Line]:
  """Runs the checks on the strategy; each deviation is the worst that a task found.

  Args:
    strategy: made by `cluster.make_strategy`.
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
  output, cluster = _checked_output(flags.FLAGS.output), read_cluster()
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
  strategy = make_strategy(cluster, flags.FLAGS.communication)

  from tf_largebatch import training

  training.use_exact_float32()
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
    "versions": training.versions(),
  }
  partial = output.with_name(f"{output.name}.partial")
  partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
  partial.replace(output)
  print(", ".join(f"{name} {value}" for name, value in where.items()))
  print(f"{'property':<22}{'deviation':>10}{'limit':>10}")
  for line in lines:
    verdict = "holds" if line.holds else "FAILS"
    print(f"{line.name:<22}{line.deviation:>10.1e}{line.limit:>10.1e}  {verdict}  {line.meaning}")
  if failed:
    print(f"{len(failed)} of {len(lines)} properties fail: {', '.join(failed)}.")
  else:
    print(f"All {len(lines)} properties hold, in {seconds:.0f} s.")
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
