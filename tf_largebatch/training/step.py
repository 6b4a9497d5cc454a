"""One training step of k workers on any number of replicas, and its counterpart in evaluation.

A worker's pass is a pure function of the weights and its n images. A replica loops over the workers
it carries, one or several per pass, and adds up what they return; one all-reduce adds up the
replicas; then every replica makes the same update. Where a worker runs changes nothing but the
order in which floats are summed.
"""

import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from tf_largebatch.machine import usable_cores
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe

# Passes that a replica runs at once: two keep a CPU's cores busy where each op is small, and hold
# the activations of two. On a single core they would only compete for the caches.
PASSES_AT_ONCE = min(2, usable_cores())


def uses_xla(options: RunOptions) -> bool:
  """Whether XLA compiles the replica's passes and the update, never the all-reduce between them."""
  if options.jit_compile is None:
    # On a CPU, XLA's convolutions are slower than oneDNN's.
    return bool(tf.config.get_visible_devices("GPU"))
  return options.jit_compile


def make_replica_sums(model: keras.Model, recipe: Recipe, options: RunOptions) -> Callable:
  """Builds the pure function that computes what the workers of one replica add to the step.

  Returns:
    A function of
      weights, statistics: values of the model's trainable and other variables;
      images: uint8 `[workers on this replica, n, H, W, C]`;
      labels: int32 `[workers on this replica, n]`;
      loss_scale: multiplies the loss of a worker's mean image before backprop and divides its
        gradient afterwards; None: no scaling.
    It returns (gradients, moving statistics, loss, error): the workers' sums, each already divided
    by the kn images (loss, gradients, error: the paper's remark 3) or the k workers (statistics) of
    the whole step, so that the sum over the replicas is complete.
  """
  images_in_step, workers = recipe.global_batch_size, recipe.workers
  workers_per_pass = options.workers_per_pass or 1

  def one_pass(weights, statistics, images, labels, loss_scale):
    with tf.GradientTape() as tape:
      tape.watch(weights)
      # Each worker starts from the same statistics. The mean of their updates is the update of
      # their mean, because the recurrence is linear.
      logits, updates = model.stateless_call(weights, statistics, images, training=True)
      loss = _loss_sum(recipe, labels, logits) / images_in_step
      # A worker's share of the step's mean over kn images is 1/k, which could underflow in float16.
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

  return tf.function(replica_sums, jit_compile=True) if uses_xla(options) else replica_sums


def _loss_sum(recipe: Recipe, labels, logits):
  """Sum over the images of the cross-entropy (a scalar in the logits' dtype)."""
  classes = logits.shape[-1]
  rest = recipe.label_smoothing / classes
  targets = tf.one_hot(labels, classes, 1 - recipe.label_smoothing + rest, rest, dtype=logits.dtype)
  return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


def _error_count(labels, logits, weights=1.0):
  """Number of images whose most likely class is not their label (top-1)."""
  wrong = tf.argmax(logits, axis=-1, output_type=labels.dtype) != labels
  return tf.reduce_sum(tf.cast(wrong, logits.dtype) * tf.cast(weights, logits.dtype))


def make_train_step(
  strategy: tf.distribute.Strategy,
  model: keras.Model,
  optimizer: keras.optimizers.Optimizer,
  recipe: Recipe,
  options: RunOptions = RunOptions(workers_per_pass=1),  # noqa: B008 (it is frozen)
  loss_scale: LossScale | None = None,
) -> Callable:
  """Builds the step; model, optimizer and loss_scale were created in `strategy.scope()`.

  Args:
    strategy: whose replicas share the step.
    model, optimizer: what is trained, and what updates it.
    recipe: resolved.
    options: of these, workers_per_pass (None: 1), jit_compile and those of the all-reduce.
    loss_scale: for a float16 recipe.

  Returns:
    A function of one element of a distributed `input_pipeline.train_dataset`, and of a number that
    is not 0 if this task was asked to stop. It updates the model and returns scalars by name: loss
    and error (means over the kn images), learning_rate, momentum_correction_factor, gradient_norm
    (of the step's summed gradient, without weight decay), weight_norm (before the step), and stop,
    the sum of the replicas' numbers, from which all tasks learn in one step that one was asked;
    with a loss scale also loss_scale and skipped_steps.
  """
  replica_sums = make_replica_sums(model, recipe, options)
  update = _make_update(model, optimizer, loss_scale)

  def replica_step(images, labels, stop):
    replica = tf.distribute.get_replica_context()
    weights = tensors(model.trainable_variables)
    statistics = tensors(model.non_trainable_variables)
    scale = None if loss_scale is None else tf.convert_to_tensor(loss_scale.scale.value)
    gradients, *rest = replica_sums(weights, statistics, images, labels, scale)
    rest.append(_on_this_device(stop, rest[-1].dtype))
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
    scalars = strategy.run(replica_step, args=(*batch, stop))  # The same on every replica.
    return {name: strategy.experimental_local_results(v)[0] for name, v in scalars.items()}

  return train_step


def tensors(variables: list[keras.Variable]) -> list[tf.Tensor]:
  """The variables' values."""
  return [tf.convert_to_tensor(variable.value) for variable in variables]


def _on_this_device(value, dtype):
  """A copy on this replica's device, where the all-reduce expects its addends."""
  return tf.identity(tf.cast(value, dtype))


def _all_reduce(replica, gradients, rest: list, options: RunOptions):
  """Sums everything over the replicas in one reduction (two if the dtypes differ).

  A pack of gradients is sent as soon as the last pass' backprop has completed it. If XLA compiles
  the passes, all results come at once.
  """
  communication = tf.distribute.experimental.CommunicationOptions(
    bytes_per_pack=options.bytes_per_pack
  )

  def total(addends):
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, addends, communication)

  if options.allreduce_dtype == "bfloat16":
    totals = total([tf.cast(gradient, tf.bfloat16) for gradient in gradients])
    return [tf.cast(t, g.dtype) for t, g in zip(totals, gradients, strict=True)], total(rest)
  # The gradients stand last, in the order of the layers, because packs are sent from the end.
  totals = total([*rest, *gradients])
  return totals[len(rest) :], totals[: len(rest)]


def _make_update(model: keras.Model, optimizer, loss_scale: LossScale | None) -> Callable:
  """Builds the update of all variables from sums that are equal on every replica."""

  def update(strategy, gradients, statistics, gradient_norm):
    for variable, statistic in zip(model.non_trainable_variables, statistics, strict=True):
      strategy.extended.update(variable.value, lambda v, new: v.assign(new), args=(statistic,))

    def apply():
      # In cross-replica context the optimizer does not reduce the gradients a second time.
      optimizer.apply(gradients, model.trainable_variables)

    def skip():
      optimizer.iterations.assign_add(1)  # The schedule counts the examples that were seen.

    if loss_scale is None:
      apply()
      return
    finite = tf.math.is_finite(strategy.experimental_local_results(gradient_norm)[0])
    tf.cond(finite, apply, skip)
    loss_scale.update(finite)

  return update


def make_evaluation_step(strategy: tf.distribute.Strategy, model: keras.Model) -> Callable:
  """Builds the evaluation of one element of a distributed `input_pipeline.evaluation_dataset`.

  Returns:
    A function that returns the sums over all replicas of: the loss and the errors of the images
    that count (weight 1), the number of these, the number of unreadable ones (weight -1), and stop
    (see `make_train_step`).
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
    # Independent parts run at once, as the passes in training do.
    parts = PASSES_AT_ONCE if batch[0].shape[0] % PASSES_AT_ONCE == 0 else 1
    split = zip(*(tf.split(tensor, parts) for tensor in batch), strict=True)
    totals = [tf.add_n(values) for values in zip(*(sums(*part) for part in split), strict=True)]
    totals.append(_on_this_device(stop, totals[0].dtype))
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, totals)

  @tf.function
  def evaluation_step(batch, stop=0.0):
    totals = strategy.run(replica_step, args=(stop, *batch))
    return [strategy.experimental_local_results(total)[0] for total in totals]

  return evaluation_step
