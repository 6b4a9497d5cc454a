"""What `fit` and `evaluate` refuse, because it could not be the same on every cluster."""

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.distributed.collectives import require_agreement
from tf_largebatch.distributed.place import Place
from tf_largebatch.errors import UserError
from tf_largebatch.training.fit_data import Workers
from tf_largebatch.training.keras_pass import KerasPass

_HALF = ("float16", "bfloat16")


def require_supported(model: keras.Model, functions: tuple[str, str]) -> None:
  """Checks the model and where it is called from.

  Args:
    functions: names of Keras' step and of the function that makes it, which must be Keras' own.

  Raises:
    UserError: the model is not compiled, or sets what these functions do not follow.
  """
  if not model.compiled or model.optimizer is None:
    raise UserError("The model is not compiled; call model.compile(optimizer, loss, …) first.")
  if tf.distribute.has_strategy():
    raise UserError("Call fit and evaluate outside of strategy.scope(); the model knows its own.")
  step, make = functions[0], f"make_{functions[1]}"
  for name in (step, make):
    if getattr(type(model), name) is not getattr(keras.Model, name):
      raise UserError(
        f"{type(model).__name__} overrides {name}, which cannot be taken apart into workers; "
        "override compute_loss or compute_metrics, or use add_loss."
      )
  if model.run_eagerly:
    raise UserError("run_eagerly=True is not supported: a step is always compiled.")
  if model.steps_per_execution != 1:
    raise UserError(f"steps_per_execution={model.steps_per_execution} is not supported; use 1.")
  if getattr(model.optimizer, "gradient_accumulation_steps", None):
    raise UserError(
      "gradient_accumulation_steps is not needed: any number of workers fits on a device; give "
      "more workers."
    )


def require_shares(place: Place, workers: Workers, facts: tuple) -> None:
  """Checks that the replicas can share the workers equally, and that the tasks agree.

  Args:
    place: of this task.
    workers: of a step.
    facts: arguments of `fit` that must be equal on all tasks.

  Raises:
    UserError: they cannot, or do not.
  """
  sizes = {"workers": workers.count, "per_worker_batch_size": workers.batch_size}
  for name, value in (sizes | {"workers_per_pass": workers.per_pass}).items():
    if not isinstance(value, int | np.integer) or value < 1:
      raise UserError(f"{name}={value!r} is not a positive whole number.")
  if workers.count % place.replicas:
    raise UserError(
      f"workers={workers.count} cannot be shared equally by {place.replicas} replicas; use a "
      "multiple."
    )
  on_replica = workers.count // place.replicas
  if on_replica % workers.per_pass:
    raise UserError(
      f"workers_per_pass={workers.per_pass} does not divide the {on_replica} workers of a replica."
    )
  if not place.alone:
    require_agreement(place.strategy, facts, "their calls of fit have other arguments")


def require_sums(keras_pass: KerasPass, batch, workers_per_pass: int = 1) -> None:
  """Checks on a batch that the state of metrics adds up, and that losses are means.

  A metric may depend on how examples are grouped into batches, because a worker's batch is the same
  on every cluster; but not if several workers share a pass.

  Raises:
    UserError: a loss is not a mean over the examples, or the state of a metric does not add up.
  """
  model, values = keras_pass.model, keras_pass.variables.values()
  twice = tf.nest.map_structure(lambda x: tf.concat([x, x], 0), batch)

  @tf.function(autograph=False)
  def increments(values, batch, twice):
    once = keras_pass.test(values, batch, keras_pass.reset)
    again = keras_pass.test(values, batch, keras_pass.add(keras_pass.reset, once))
    return once, again, keras_pass.test(values, twice, keras_pass.reset)

  once, again, doubled = tf.nest.map_structure(np.asarray, increments(values, batch, twice))
  half = any(layer.compute_dtype in _HALF for layer in model._flatten_layers())
  losses = {
    id(variable)
    for metric in model.metrics
    if metric.name.split("_")[-1] == "loss"
    for variable in metric.variables
  }
  tolerance = 2e-2 if half else 1e-3
  found = zip(keras_pass.metrics, keras_pass.reset, once, again, doubled, strict=True)
  for variable, reset, a, b, c in found:
    if np.all(np.isfinite(reset)) and not np.all(np.isfinite(a)):
      continue  # The model diverges, so there is nothing to compare.
    # Twice the same examples: a mean stays, and the sums that it is made of double.
    is_mean = np.allclose(c, 2 * a, tolerance, 1e-6)
    if id(variable) in losses:
      if not is_mean:
        raise UserError(
          "The loss is not a mean over the examples: it changes when the batch is repeated, so it "
          "would depend on how examples are grouped. Use reduction='sum_over_batch_size'."
        )
      continue
    if not np.allclose(b, a, tolerance, 1e-6):
      raise UserError(
        f"The metric state {variable.path!r} does not add up over batches: it grows by {a} for a "
        f"batch and by {b} for the same batch again. Use a metric whose state is made of sums."
      )
    if workers_per_pass > 1 and not is_mean:
      raise UserError(
        f"workers_per_pass={workers_per_pass} does not work with {variable.path!r}: the metric "
        "depends on how examples are grouped into batches; use 1."
      )


def require_equal_workers(keras_pass: KerasPass, batch, workers_per_pass: int) -> list[np.ndarray]:
  """Checks that all workers change integers alike, and that several can share a pass.

  Returns:
    By how much a step changes each counter.

  Raises:
    UserError: they do not, or cannot.
  """
  variables, values = keras_pass.variables, keras_pass.variables.values()
  run = tf.function(keras_pass.forward(1.0), autograph=False)
  _, first, counters, _ = run(values, tf.constant(0), batch)
  _, _, other, _ = run(values, tf.constant(1), tf.nest.map_structure(tf.zeros_like, batch))
  for variable, a, b in zip(variables.counters, counters, other, strict=True):
    if not np.array_equal(a, b):
      raise UserError(
        f"The integer variable {variable.path!r} changes by another amount for each worker, so it "
        "has no value that all share; keep it out of the model, or make it a float."
      )
  if workers_per_pass > 1:
    _require_groups(keras_pass, batch, workers_per_pass, first)
  return [new.numpy() - old.numpy() for new, old in zip(counters, values.counters, strict=True)]


def _require_groups(keras_pass: KerasPass, batch, workers_per_pass: int, first: list) -> None:
  """Checks that workers that share a pass have no random numbers, and statistics of their own."""
  variables, values = keras_pass.variables, keras_pass.variables.values()
  run = tf.function(keras_pass.forward(1.0), autograph=False)
  if variables.counters:
    raise UserError(
      f"workers_per_pass={workers_per_pass} does not work with "
      f"{variables.counters[0].path!r}: workers that share a pass would share its random "
      "numbers; use 1."
    )
  # Half a batch beside a shifted copy: over groups of their own, the statistics are those of each.
  shifted = tf.nest.map_structure(lambda x: x + tf.cast(1, x.dtype), batch[0])
  both = tf.nest.map_structure(lambda a, b: tf.concat([a, b], 0), batch[0], shifted)
  rest = tuple(tf.nest.map_structure(lambda x: tf.concat([x, x], 0), part) for part in batch[1:])
  _, second, *_ = run(values, tf.constant(0), (shifted, *batch[1:]))
  _, joint, *_ = run(values, tf.constant(0), (both, *rest))
  for variable, a, b, c in zip(variables.statistics, first, second, joint, strict=True):
    if not np.allclose((a + b) / 2, c, 1e-3, 1e-6):
      raise UserError(
        f"workers_per_pass={workers_per_pass} does not work with {variable.path!r}: a layer takes "
        "the examples of all workers in a pass together; use 1, or convert the model with "
        "per_worker_batch_normalization."
      )
