"""The compiled steps of `fit` and `evaluate`, for any Keras model and optimizer."""

import contextlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.distributed.place import Place
from tf_largebatch.errors import UserError
from tf_largebatch.training import passes
from tf_largebatch.training.fit_data import Workers
from tf_largebatch.training.keras_pass import KerasPass

# The first of what the tasks send each other with a step: whether a task was asked to stop.
STOP = 0


def make_fit_step(
  keras_pass: KerasPass,
  place: Place,
  batch,
  workers: Workers,
  stops: bool,
) -> Callable:
  """Builds a step of training.

  Args:
    keras_pass: of the model; its optimizer is built.
    place: of this task.
    batch: of a replica (`[workers on the replica, n, …]`, nested), used for its shapes and dtypes.
    workers: of a step.
    stops: whether a step changes nothing once a task was asked to stop before it.

  Returns:
    A function of a distributed batch, the metrics' state and this task's facts (float64), whose
    first is STOP. It updates the model and returns the new state, `[2, facts]`, the sums over the
    replicas of the facts and of their squares, and the loss and the metrics by name.
  """
  variables, optimizer = keras_pass.variables, keras_pass.model.optimizer
  with_xla = bool(keras_pass.model.jit_compile)
  sums = passes.make_replica_sums(
    keras_pass.forward(workers.per_pass / workers.count),
    workers.count,
    keras_pass.addends,
    workers.per_pass,
    with_xla,
  )
  # Traced outside of the strategy, where Keras scales no loss by the number of replicas.
  scale = _loss_scale(optimizer)
  sums = tf.function(sums, autograph=False).get_concrete_function(
    variables.values(), tf.TensorSpec([], tf.int32), batch, scale
  )
  update = _make_update(keras_pass, stops)
  workers_on_replica = workers.count // place.replicas

  def replica_step(batch, totals, facts):
    replica = tf.distribute.get_replica_context()
    first = tf.convert_to_tensor(replica.replica_id_in_sync_group) * workers_on_replica
    gradients, statistics, counters, increments = sums(
      variables.values(), first, batch, _loss_scale(optimizer)
    )
    facts = tf.cast(tf.stack([facts, facts * facts]), keras_pass.dtype)
    gradients, others = passes.total(gradients, (statistics, increments, facts))
    statistics, increments, facts = others
    if stops:
      counts = tf.cast(facts[0, STOP] == 0, keras_pass.dtype)
      increments = [increment * counts for increment in increments]
    replica.merge_call(update, args=(gradients, statistics, counters, facts))
    return keras_pass.add(totals, increments), facts

  return _compiled(place, replica_step, keras_pass.results)


def make_test_step(keras_pass: KerasPass, place: Place) -> Callable:
  """Builds a step of evaluation.

  Returns:
    A function of one batch of each local replica, whether each counts (1.0 or 0.0), the metrics'
    state and this task's facts. It returns what a step of training does, and changes nothing.
  """
  variables, compiled = keras_pass.variables, {}

  def compile_for(batch) -> Callable:
    increments = tf.function(
      lambda values, batch: keras_pass.test(values, batch, keras_pass.reset),
      autograph=False,
      jit_compile=bool(keras_pass.model.jit_compile) or None,
    ).get_concrete_function(variables.values(), batch)

    def replica_step(batch, counts, totals, facts):
      facts = tf.cast(tf.stack([facts, facts * facts]), keras_pass.dtype)
      own = [i * tf.cast(counts, i.dtype) for i in increments(variables.values(), batch)]
      _, (own, facts) = passes.total([], (own, facts))
      return keras_pass.add(totals, own), facts

    return _compiled(place, replica_step, keras_pass.results)

  def step(parts, counts, totals, facts):
    shapes = tuple(tuple(x.shape) for x in tf.nest.flatten(parts[0]))
    if shapes not in compiled:
      compiled[shapes] = compile_for(parts[0])
    return compiled[shapes](place.distribute(parts), place.distribute(counts), totals, facts)

  return step


def _compiled(place: Place, replica_step: Callable, results: Callable) -> Callable:
  strategy = place.strategy

  @tf.function(autograph=False)
  def step(*arguments):
    returned = strategy.run(replica_step, args=arguments)  # The same on every replica.
    totals, facts = tf.nest.map_structure(
      lambda r: strategy.experimental_local_results(r)[0], returned
    )
    return totals, facts, results(totals)

  return step


def require_equal_facts(sums: np.ndarray, replicas: int) -> None:
  """Checks that all tasks sent the same facts.

  Args:
    sums: `[2, facts]`, see `make_fit_step`.
    replicas: how many sent them.

  Raises:
    UserError: they differ.
  """
  facts = np.asarray(sums, np.float64)[:, STOP + 1 :]
  if np.any(replicas * facts[1] != facts[0] ** 2):
    raise UserError(
      "The tasks do not read the same examples: their data end at different steps, or differ in "
      "order or augmentation. Make every task's data set the same: seed each shuffle and each "
      "random operation, and shard nothing."
    )


def _loss_scale(optimizer: keras.optimizers.Optimizer):
  """What the optimizer multiplies the loss by; None: nothing."""
  scale = optimizer.scale_loss(1.0)
  return None if isinstance(scale, float) and scale == 1.0 else tf.convert_to_tensor(scale)


def _make_update(keras_pass: KerasPass, stops: bool) -> Callable:
  """Builds the update of the model from sums that are equal on every replica."""
  variables, optimizer = keras_pass.variables, keras_pass.model.optimizer
  inner = getattr(optimizer, "inner_optimizer", optimizer)

  def apply(gradients):
    scale = _loss_scale(optimizer)
    if scale is not None:  # The optimizer divides by it.
      gradients = [gradient * tf.cast(scale, gradient.dtype) for gradient in gradients]
    optimizer.apply(gradients, variables.weights)

  def update(strategy, gradients, statistics, counters, facts):
    def make():
      variables.assign(strategy, statistics, counters)
      before = tf.convert_to_tensor(optimizer.iterations)
      with _takes_sums(optimizer, inner), _without_overwriting(inner) as frequency:
        strategy.extended.call_for_each_replica(apply, args=(gradients,))
      if frequency:
        after = tf.convert_to_tensor(optimizer.iterations)
        tf.cond(
          (after != before) & (after % frequency == 0),
          lambda: inner._overwrite_model_variables_with_average_value(inner._trainable_variables),
          lambda: None,
        )

    if not stops:
      make()
      return
    asked = strategy.experimental_local_results(facts)[0][0, STOP]
    tf.cond(asked == 0, make, lambda: None)

  return update


@contextlib.contextmanager
def _takes_sums(*optimizers: keras.optimizers.Optimizer) -> Iterator[None]:
  """Inside, optimizers take gradients as sums over the replicas, so that they clip the sum.

  Keras' would add them up once more, after clipping each replica's.
  """
  name = "_all_reduce_sum_gradients"
  for optimizer in optimizers:
    if not hasattr(optimizer, name):
      raise RuntimeError(f"This version of Keras has no {name}; use the one of requirements.txt.")
    object.__setattr__(optimizer, name, lambda gradients_and_variables: gradients_and_variables)
  try:
    yield
  finally:
    for optimizer in optimizers:
      optimizer.__dict__.pop(name, None)


@contextlib.contextmanager
def _without_overwriting(optimizer: keras.optimizers.Optimizer) -> Iterator[int | None]:
  """Inside, the optimizer does not overwrite weights by their averages; yields how often it would.

  It would call `extended.update` in a replica, where that is not possible.
  """
  frequency = optimizer.ema_overwrite_frequency if optimizer.use_ema else None
  before, optimizer.ema_overwrite_frequency = optimizer.ema_overwrite_frequency, None
  try:
    yield frequency
  finally:
    optimizer.ema_overwrite_frequency = before
