"""One training step of k workers on any number of replicas, and its counterpart in evaluation.

A worker's pass is a pure function of the weights and its n images. A replica loops over the
workers it carries, one or several in a pass, and adds up what they return; one all-reduce adds up
the replicas; then every replica makes the same update. Where a worker runs changes nothing but the
order in which floats are summed.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.errors import UserError
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.recipe import Recipe

# Passes that a replica may have under way at once: two keep a CPU's cores busy where each op is
# small, and hold the activations of two. Of a single core they would only share the caches.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PASSES_AT_ONCE = min(2, _CORES)


def _loss_sum(recipe: Recipe, labels, logits):
  """Σ over the images of the cross-entropy (a scalar in the logits' dtype)."""
  classes = logits.shape[-1]
  rest = recipe.label_smoothing / classes
  targets = tf.one_hot(labels, classes, 1 - recipe.label_smoothing + rest, rest, dtype=logits.dtype)
  return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


def _error_count(labels, logits, weights=1.0):
  """How many images' most likely class is not their label (top-1)."""
  wrong = tf.argmax(logits, axis=-1, output_type=labels.dtype) != labels
  return tf.reduce_sum(tf.cast(wrong, logits.dtype) * tf.cast(weights, logits.dtype))


def _here(value, dtype):
  """A copy on this replica's device, where the all-reduce looks for what it adds up."""
  return tf.identity(tf.cast(value, dtype))


def _tensors(variables):
  return [tf.convert_to_tensor(variable.value) for variable in variables]


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How a step is computed: what it computes changes by rounding alone.

  Attributes:
    workers_per_pass: g, the workers that a replica takes through the network at once, each
      normalised over its own n images; None: `choose_workers_per_pass`. It must divide the
      replica's workers. In float16 sums over more images overflow sooner: the loss scale, and which
      steps are skipped, depend on it.
    jit_compile: whether XLA compiles the replica's passes and the update, never the all-reduce
      between them; None: on GPUs.
    allreduce_dtype: "float32" sends the gradients as they are; "bfloat16" sends their first 8 bits
      of precision, half the bytes: the one option by which a run depends on its cluster, for one
      replica alone sends nothing.
    bytes_per_pack: of the gradients that travel together (at least, save the last); 0: all in one.
      A pack leaves as soon as the last pass' backprop has completed it, unless XLA compiles the
      passes, whose results come all at once.
  """

  workers_per_pass: int | None = None
  jit_compile: bool | None = None
  allreduce_dtype: str = "float32"
  bytes_per_pack: int = 2**24

  @property
  def jit(self) -> bool:
    if self.jit_compile is None:
      # On a CPU XLA's convolutions are slower than oneDNN's.
      return bool(tf.config.get_visible_devices("GPU"))
    return self.jit_compile


def make_replica_sums(model: keras.Model, recipe: Recipe, options: StepOptions) -> Callable:
  """Builds what the workers of one replica add to the step, a pure function.

  Returns:
    A function of
      weights, statistics: the model's trainable and other variables' values;
      images: uint8 `[workers on this replica, n, H, W, C]`;
      labels: int32 `[workers on this replica, n]`;
      loss_scale: by which the loss of a worker's mean image is multiplied before backprop, and its
        gradient divided after it; None: by nothing.
    It returns (gradients, moving statistics, loss, error): the workers' sums, each already divided
    by the kn images (loss, gradients, error: remark 3) or the k workers (statistics) of the whole
    step, so that adding up the replicas completes them.
  """
  images_in_step, workers = recipe.global_batch_size, recipe.workers
  workers_per_pass = options.workers_per_pass or 1

  def one_pass(weights, statistics, images, labels, loss_scale):
    with tf.GradientTape() as tape:
      tape.watch(weights)
      # Each worker starts from the same statistics; the mean of their updates is the update of
      # their mean, for the recurrence is linear.
      logits, updates = model.stateless_call(weights, statistics, images, training=True)
      loss = _loss_sum(recipe, labels, logits) / images_in_step
      # Of the step's mean over kn images a worker's share is 1/k: float16 would lose it.
      target = loss if loss_scale is None else loss * (loss_scale * workers)
    gradients = tape.gradient(target, weights)
    if loss_scale is not None:
      gradients = [gradient / (loss_scale * workers) for gradient in gradients]
    error = _error_count(labels, logits) / images_in_step
    share = workers_per_pass / workers
    return gradients, [update * share for update in updates], loss, error

  def replica_sums(weights, statistics, images, labels, loss_scale=None):
    # [workers, n, …] → [passes, g·n, …]; within a pass, batch normalisation keeps the n apart.
    images, labels = (
      tf.reshape(x, [-1, workers_per_pass * x.shape[1], *x.shape[2:]]) for x in (images, labels)
    )
    run = functools.partial(one_pass, weights, statistics)
    if images.shape[0] == 1:  # No loop between backprop and the all-reduce.
      return run(images[0], labels[0], loss_scale)

    def add_pass(index, sums):
      addends = run(images[index], labels[index], loss_scale)
      return index + 1, tf.nest.map_structure(tf.add, sums, addends)

    zero = tf.zeros([], weights[0].dtype)
    zeros = ([tf.zeros_like(w) for w in weights], [tf.zeros_like(s) for s in statistics])
    count = images.shape[0]
    _, sums = tf.while_loop(
      lambda index, _: index < count,
      add_pass,
      (0, (*zeros, zero, zero)),
      parallel_iterations=PASSES_AT_ONCE,
    )
    return sums

  return tf.function(replica_sums, jit_compile=True) if options.jit else replica_sums


def check_workers_per_pass(workers_per_pass: int, workers_on_replica: int):
  """Raises UserError where a replica's workers are no whole number of passes."""
  if workers_on_replica % workers_per_pass:
    values = [g for g in range(1, workers_on_replica + 1) if workers_on_replica % g == 0]
    raise UserError(
      f"workers_per_pass={workers_per_pass} does not divide the number of workers of a replica, "
      f"{workers_on_replica}; {', '.join(map(str, values))} or auto would do."
    )


def choose_workers_per_pass(
  model: keras.Model, recipe: Recipe, options: StepOptions, workers_on_replica: int
) -> int:
  """The g that takes a replica's workers through the network fastest, measured on this device.

  On a GPU ever more workers (powers of two that divide the replica's) go through at once, on images
  of zeros, until that is no faster or the memory is full. On a CPU g = 1: its cores are busy with
  one worker, whose activations are the more likely to fit its caches (docs/speed.md). In float16 g
  = 1 too: sums over more images overflow sooner, and which steps are skipped for it must not depend
  on a device.
  """
  if recipe.dtype == "float16" or not tf.config.get_visible_devices("GPU"):
    return 1
  shape = (recipe.per_worker_batch_size, *model.input_shape[1:])
  weights, statistics = _tensors(model.trainable_variables), _tensors(model.non_trainable_variables)
  best, best_seconds, workers_per_pass = 1, float("inf"), 1
  while workers_on_replica % workers_per_pass == 0:
    images = tf.zeros([workers_per_pass, *shape], tf.uint8)
    labels = tf.zeros([workers_per_pass, shape[0]], tf.int32)
    candidate = dataclasses.replace(options, workers_per_pass=workers_per_pass)
    sums = tf.function(make_replica_sums(model, recipe, candidate))
    try:
      seconds = [
        _seconds(lambda: float(sums(weights, statistics, images, labels)[2]))  # noqa: B023
        for _ in range(4)
      ]
    except tf.errors.ResourceExhaustedError:
      break
    seconds = float(np.median(seconds[1:])) / workers_per_pass
    if seconds > 0.98 * best_seconds:
      break
    best, best_seconds = workers_per_pass, seconds
    workers_per_pass *= 2
  return best


def _seconds(function: Callable) -> float:
  began = time.perf_counter()
  function()
  return time.perf_counter() - began


def _all_reduce(replica, gradients, rest: list, options: StepOptions):
  """The sums over the replicas, of everything in one reduction (two where the dtypes differ)."""
  communication = tf.distribute.experimental.CommunicationOptions(
    bytes_per_pack=options.bytes_per_pack
  )

  def total(tensors):
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensors, communication)

  if options.allreduce_dtype == "bfloat16":
    totals = total([tf.cast(gradient, tf.bfloat16) for gradient in gradients])
    return [tf.cast(t, g.dtype) for t, g in zip(totals, gradients, strict=True)], total(rest)
  # The gradients stand last, and in the order of the layers, for they travel from the end.
  totals = total([*rest, *gradients])
  return totals[len(rest) :], totals[: len(rest)]


def make_train_step(
  strategy: tf.distribute.Strategy,
  model: keras.Model,
  optimizer,
  recipe: Recipe,
  options: StepOptions = StepOptions(workers_per_pass=1),
  loss_scale: LossScale | None = None,
) -> Callable:
  """Builds the step; model, optimizer and loss_scale were created in `strategy.scope()`.

  Args:
    loss_scale: for a float16 recipe.

  Returns:
    A function of one element of a distributed `input_pipeline.train_dataset`, and of a number that
    is not 0 where this task was asked to stop. It updates the model and returns scalars by name:
    loss and error (means over the kn images), learning_rate, momentum_correction_factor, the norms
    of the step's summed gradient (without weight decay) and of the weights before the step, stop,
    the sum of the replicas' numbers: all tasks learn in one step that one was asked; and with a
    loss scale, that and the number of skipped steps.
  """
  replica_sums = make_replica_sums(model, recipe, options)

  def update(strategy, gradients, statistics, gradient_norm):
    """Runs once for all replicas, with sums that are equal on each."""
    for variable, statistic in zip(model.non_trainable_variables, statistics, strict=True):
      strategy.extended.update(variable.value, lambda v, new: v.assign(new), args=(statistic,))

    def apply():
      # In cross-replica context the optimizer does not reduce the gradients a second time.
      optimizer.apply(gradients, model.trainable_variables)

    def skip():
      optimizer.iterations.assign_add(1)  # The schedule goes by the examples that were seen.

    if loss_scale is None:
      apply()
      return
    finite = tf.math.is_finite(strategy.experimental_local_results(gradient_norm)[0])
    tf.cond(finite, apply, skip)
    loss_scale.update(finite)

  def replica_step(images, labels, stop):
    replica = tf.distribute.get_replica_context()
    weights = _tensors(model.trainable_variables)
    statistics = _tensors(model.non_trainable_variables)
    scale = None if loss_scale is None else tf.convert_to_tensor(loss_scale.scale.value)
    gradients, *rest = replica_sums(weights, statistics, images, labels, scale)
    rest.append(_here(stop, rest[-1].dtype))
    gradients, totals = _all_reduce(replica, gradients, tf.nest.flatten(rest), options)
    statistics, loss, error, stop = tf.nest.pack_sequence_as(rest, totals)
    gradient_norm = tf.linalg.global_norm(gradients)
    scalars = {
      "loss": loss,
      "error": error,
      "learning_rate": tf.cast(optimizer.learning_rate, loss.dtype),
      "momentum_correction_factor": optimizer.momentum_correction_factor(),
      "gradient_norm": gradient_norm,
      "weight_norm": tf.linalg.global_norm(weights),
      "stop": stop,
    }
    if loss_scale is not None:
      scalars["loss_scale"] = scale
      scalars["skipped_steps"] = tf.convert_to_tensor(loss_scale.skipped_steps.value)
    replica.merge_call(update, args=(gradients, statistics, gradient_norm))
    return scalars

  @tf.function
  def train_step(batch, stop=0.0):
    # Every replica returns the same totals: any copy will do.
    scalars = strategy.run(replica_step, args=(*batch, stop))
    return {name: strategy.experimental_local_results(v)[0] for name, v in scalars.items()}

  return train_step


def make_evaluation_step(strategy: tf.distribute.Strategy, model: keras.Model) -> Callable:
  """Builds the evaluation of one element of a distributed `input_pipeline.evaluation_dataset`.

  Returns:
    A function that returns the sums over all replicas of the loss and of the errors of the images
    that count (weight 1), the numbers of those and of the unreadable ones (weight -1), and the sum
    of stop (see `make_train_step`).
  """

  def sums(images, labels, weights):
    logits = model(images, training=False)
    counts = tf.cast(weights > 0, logits.dtype)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return [
      tf.reduce_sum(losses * counts),
      _error_count(labels, logits, counts),
      tf.reduce_sum(counts),
      tf.reduce_sum(tf.cast(weights < 0, logits.dtype)),
    ]

  def replica_step(stop, *batch):
    # Parts that depend on nothing of each other run at once, as the workers in training do.
    parts = PASSES_AT_ONCE if batch[0].shape[0] % PASSES_AT_ONCE == 0 else 1
    split = zip(*(tf.split(tensor, parts) for tensor in batch), strict=True)
    totals = [tf.add_n(values) for values in zip(*(sums(*part) for part in split), strict=True)]
    totals.append(_here(stop, totals[0].dtype))
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, totals)

  @tf.function
  def evaluation_step(batch, stop=0.0):
    totals = strategy.run(replica_step, args=(stop, *batch))
    return [strategy.experimental_local_results(total)[0] for total in totals]

  return evaluation_step
