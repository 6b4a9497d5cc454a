"""The paper's training step, a case of `passes`, and its counterpart in evaluation."""

from collections.abc import Callable

import keras
import tensorflow as tf

from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import noise_scale, passes
from tf_largebatch.training.passes import PASSES_AT_ONCE, Variables


def uses_xla(options: RunOptions) -> bool:
  """Whether XLA compiles the replica's passes and the update, never the all-reduce between them."""
  if options.jit_compile is None:
    # On a CPU, XLA's convolutions are slower than oneDNN's.
    return bool(tf.config.get_visible_devices("GPU"))
  return options.jit_compile


def make_paper_sums(model: keras.Model, recipe: Recipe, options: RunOptions) -> Callable:
  """Builds `passes.make_replica_sums` of the recipe's loss.

  Returns:
    A function of
      values: of `Variables.of(model)`;
      first_worker: index of the replica's first worker;
      batch: uint8 images `[workers on this replica, n, H, W, C]`, and int32 labels `[workers on
        this replica, n]`;
      loss_scale: multiplies the loss before backprop; None: no scaling.
    It returns (gradients, moving statistics, counters, [loss, error]): the workers' sums, each
    already divided by the kn images (loss, gradients, error: the paper's remark 3) or the k workers
    (statistics) of the whole step, so that the sum over the replicas is complete. If a step has
    several passes, the sum of their gradients' squared norms follows the error.
  """
  scalar = tf.TensorSpec([], model.trainable_variables[0].dtype)
  return passes.make_replica_sums(
    make_forward(model, recipe),
    recipe.workers,
    [scalar, scalar],
    options.workers_per_pass or 1,
    uses_xla(options),
    with_norms=_count_passes(recipe, options) > 1,
  )


def make_forward(model: keras.Model, recipe: Recipe) -> Callable:
  """Builds the `forward` of `passes.make_replica_sums`: the recipe's loss, and the error."""
  images_in_step = recipe.global_batch_size
  variables = Variables.of(model)

  def forward(values, worker, batch):
    images, labels = batch
    logits, statistics, counters, _ = passes.call(
      variables, values, worker, lambda: model(images, training=True)
    )
    loss = _loss_sum(recipe, labels, logits) / images_in_step
    error = error_count(labels, logits) / images_in_step
    return loss, statistics, counters, [loss, error]

  return forward


def _count_passes(recipe: Recipe, options: RunOptions) -> int:
  """The passes of all replicas in a step."""
  return recipe.workers // (options.workers_per_pass or 1)


def _loss_sum(recipe: Recipe, labels, logits):
  """Sum over the images of the cross-entropy (a scalar in the logits' dtype)."""
  classes = logits.shape[-1]
  rest = recipe.label_smoothing / classes
  targets = tf.one_hot(labels, classes, 1 - recipe.label_smoothing + rest, rest, dtype=logits.dtype)
  return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(targets, logits))


def error_count(labels, logits, weights=1.0):
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
  train_examples: int | None = None,
) -> Callable:
  """Builds the step; model, optimizer and loss_scale were created in `strategy.scope()`.

  Args:
    strategy: whose replicas share the step.
    model, optimizer: what is trained, and what updates it.
    recipe: resolved.
    options: of these, workers_per_pass (None: 1), jit_compile and those of the all-reduce.
    loss_scale: for a float16 recipe.
    train_examples: size of the training split, which the noise scale takes into account; None:
      without end.

  Returns:
    A function of one element of a distributed `input_pipeline.train_dataset`, and of a number that
    is not 0 if this task was asked to stop. It updates the model and returns scalars by name: loss
    and error (means over the kn images), learning_rate, momentum_correction_factor, gradient_norm
    (of the step's summed gradient, without weight decay), weight_norm (before the step), and stop,
    the sum of the replicas' numbers, from which all tasks learn in one step that one was asked;
    with a loss scale also loss_scale and skipped_steps; with several passes in a step also
    gradient_variance and squared_gradient (see `noise_scale`).
  """
  variables, replica_sums = Variables.of(model), make_paper_sums(model, recipe, options)
  update = _make_update(variables, optimizer, loss_scale)
  workers_on_replica = recipe.workers // strategy.num_replicas_in_sync
  noise = _make_noise(recipe, options, train_examples)

  def replica_step(images, labels, stop):
    replica = tf.distribute.get_replica_context()
    values = variables.values()
    scale = None if loss_scale is None else tf.convert_to_tensor(loss_scale.scale.value)
    first = replica.replica_id_in_sync_group * workers_on_replica
    gradients, statistics, counters, sums = replica_sums(values, first, (images, labels), scale)
    stop = _on_this_device(stop, sums[0].dtype)
    gradients, totals = passes.total(gradients, (statistics, *sums, stop), options)
    statistics, loss, error, *squared_norms, stop = totals
    gradient_norm = tf.linalg.global_norm(gradients)
    scalars = {"loss": loss, "error": error, "gradient_norm": gradient_norm, "stop": stop}
    scalars |= _before_update(optimizer, values, loss.dtype)
    if squared_norms:
      scalars |= noise(squared_norms[0], gradient_norm)
    if loss_scale is not None:
      scalars["loss_scale"] = scale
      scalars["skipped_steps"] = tf.convert_to_tensor(loss_scale.skipped_steps.value)
    replica.merge_call(update, args=(gradients, statistics, counters, gradient_norm))
    return scalars

  @tf.function(autograph=False)
  def train_step(batch, stop=0.0):
    scalars = strategy.run(replica_step, args=(*batch, stop))  # The same on every replica.
    return {name: strategy.experimental_local_results(v)[0] for name, v in scalars.items()}

  return train_step


def _before_update(optimizer, values: passes.Values, dtype) -> dict:
  """Scalars that the update changes, by name."""
  return {
    "learning_rate": tf.cast(optimizer.learning_rate, dtype),
    "momentum_correction_factor": optimizer.momentum_correction_factor(),
    "weight_norm": tf.linalg.global_norm(values.weights),
  }


def _make_noise(recipe: Recipe, options: RunOptions, train_examples: int | None) -> Callable:
  """Builds the function from a step's sums to the estimates of `noise_scale`, by name."""
  passes_in_step, images = _count_passes(recipe, options), recipe.global_batch_size

  def noise(squared_norms, gradient_norm):
    variance, squared_gradient = noise_scale.estimate(
      squared_norms, gradient_norm**2, passes_in_step, images, train_examples
    )
    return {"gradient_variance": variance, "squared_gradient": squared_gradient}

  return noise


def _on_this_device(value, dtype):
  """A copy on this replica's device, where the all-reduce expects its addends."""
  return tf.identity(tf.cast(value, dtype))


def _make_update(variables: Variables, optimizer, loss_scale: LossScale | None) -> Callable:
  """Builds the update of all variables from sums that are equal on every replica."""

  def update(strategy, gradients, statistics, counters, gradient_norm):
    variables.assign(strategy, statistics, counters)

    def apply():
      # In cross-replica context the optimizer does not reduce the gradients a second time.
      optimizer.apply(gradients, variables.weights)

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
      error_count(labels, logits, counts),
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

  @tf.function(autograph=False)
  def evaluation_step(batch, stop=0.0):
    totals = strategy.run(replica_step, args=(stop, *batch))
    return [strategy.experimental_local_results(total)[0] for total in totals]

  return evaluation_step
