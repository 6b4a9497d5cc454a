"""One training step of k workers on any number of replicas, and its counterpart in evaluation.

A worker's pass is a pure function of the weights and its n images. A replica loops over the
workers it carries and adds up what they return; one all-reduce adds up the
replicas; then every replica makes the same update. Where a worker runs changes nothing but the
order in which floats are summed.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from tf_largebatch.recipe import Recipe

# Passes of workers that a replica may have under way at once: two keep a CPU's cores busy where
# each op is small, and hold the activations of two.
WORKERS_AT_ONCE = 2


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


def _replica_sums(model: keras.Model, recipe: Recipe, images, labels):
  """What the workers of one replica add to the step.

  Args:
    images: uint8 `[workers on this replica, n, H, W, C]`.
    labels: int32 `[workers on this replica, n]`.

  Returns:
    (gradients, moving statistics, loss, error): the workers' sums, each already divided by the kn
    images (loss, gradients, error: remark 3) or the k workers (statistics) of the whole step, so
    that adding up the replicas completes them.
  """
  weights = _tensors(model.trainable_variables)
  statistics = _tensors(model.non_trainable_variables)
  images_in_step, workers = recipe.global_batch_size, recipe.workers

  def worker_pass(images, labels):
    with tf.GradientTape() as tape:
      tape.watch(weights)
      # Each worker starts from the same statistics; the mean of their updates is the update of
      # their mean, for the recurrence is linear.
      logits, updates = model.stateless_call(weights, statistics, images, training=True)
      loss = _loss_sum(recipe, labels, logits) / images_in_step
    gradients = tape.gradient(loss, weights)
    error = _error_count(labels, logits) / images_in_step
    return gradients, [update / workers for update in updates], loss, error

  def add_worker(index, sums):
    addends = worker_pass(images[index], labels[index])
    return index + 1, tf.nest.map_structure(tf.add, sums, addends)

  zero = tf.zeros([], weights[0].dtype)
  zeros = ([tf.zeros_like(w) for w in weights], [tf.zeros_like(s) for s in statistics], zero, zero)
  count = images.shape[0]
  _, sums = tf.while_loop(
    lambda index, _: index < count, add_worker, (0, zeros), parallel_iterations=WORKERS_AT_ONCE
  )
  return sums


def make_train_step(
  strategy: tf.distribute.Strategy, model: keras.Model, optimizer, recipe: Recipe
) -> Callable:
  """Builds the step; model and optimizer were created in `strategy.scope()`.

  Returns:
    A function of one element of a distributed `input_pipeline.train_dataset`, and of a number that
    is not 0 where this task was asked to stop. It updates the model and returns scalars by name:
    loss and error (means over the kn images), learning_rate, momentum_correction_factor, the norms
    of the step's summed gradient (without weight decay) and of the weights before the step, and
    stop, the sum of the replicas' numbers: all tasks learn in one step that one was asked.
  """

  def update(strategy, sums):
    """Runs once for all replicas, with sums that are equal on each."""
    gradients, statistics = sums
    for variable, statistic in zip(model.non_trainable_variables, statistics, strict=True):
      strategy.extended.update(variable.value, lambda v, new: v.assign(new), args=(statistic,))
    # In cross-replica context the optimizer does not reduce the gradients a second time.
    optimizer.apply(gradients, model.trainable_variables)

  def replica_step(images, labels, stop):
    replica = tf.distribute.get_replica_context()
    sums = _replica_sums(model, recipe, images, labels)
    sums = (*sums, _here(stop, sums[-1].dtype))
    # The one all-reduce of the step: gradients, statistics, loss, error and stop together.
    totals = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.nest.flatten(sums))
    gradients, statistics, loss, error, stop = tf.nest.pack_sequence_as(sums, totals)
    scalars = {
      "loss": loss,
      "error": error,
      "learning_rate": tf.cast(optimizer.learning_rate, loss.dtype),
      "momentum_correction_factor": optimizer.momentum_correction_factor(),
      "gradient_norm": tf.linalg.global_norm(gradients),
      "weight_norm": tf.linalg.global_norm(_tensors(model.trainable_variables)),
      "stop": stop,
    }
    replica.merge_call(update, args=((gradients, statistics),))
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
    parts = WORKERS_AT_ONCE if batch[0].shape[0] % WORKERS_AT_ONCE == 0 else 1
    split = zip(*(tf.split(tensor, parts) for tensor in batch), strict=True)
    totals = [tf.add_n(values) for values in zip(*(sums(*part) for part in split), strict=True)]
    totals.append(_here(stop, totals[0].dtype))
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, totals)

  @tf.function
  def evaluation_step(batch, stop=0.0):
    totals = strategy.run(replica_step, args=(stop, *batch))
    return [strategy.experimental_local_results(total)[0] for total in totals]

  return evaluation_step
