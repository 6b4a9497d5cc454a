"""What the tasks of a run agree on, and where they wait for each other."""

import contextlib
import zlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_largebatch.errors import UserError


def make_gather(strategy: tf.distribute.Strategy, function: Callable) -> Callable[..., np.ndarray]:
  """Compiles a function that calls `function` on every replica and gathers the results.

  Args:
    strategy: made by `make_strategy`.
    function: called on each replica, with that replica's part of each argument.

  Returns:
    A function of the elements of a distributed batch. On every task it returns the results of all
    replicas in order, float64 `[replicas, …]`, and so waits for all replicas.
  """
  count = strategy.num_replicas_in_sync

  def replica(*arguments):
    context = tf.distribute.get_replica_context()
    value = tf.cast(function(*arguments), tf.float64)
    places = tf.reshape(tf.range(count), [count] + [1] * len(value.shape))
    # Exact: each element of the sum is one value plus zeros.
    mine = tf.where(places == context.replica_id_in_sync_group, value[None], 0.0)
    return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

  @tf.function
  def gather_values(*arguments):
    return strategy.run(replica, args=arguments)

  def gather_results(*arguments) -> np.ndarray:
    return strategy.experimental_local_results(gather_values(*arguments))[0].numpy()

  return gather_results


def gather(strategy: tf.distribute.Strategy, value: float) -> np.ndarray:
  """Returns every replica's value in order, float64 `[replicas]`; waits for all replicas."""
  return make_gather(strategy, lambda: np.float64(value))()


def require_agreement(strategy: tf.distribute.Strategy, facts: tuple, otherwise: str) -> None:
  """Checks that all tasks hold the same facts; otherwise they could wait for each other forever.

  Raises:
    UserError: they do not; `otherwise` explains why.
  """
  if len(set(gather(strategy, zlib.crc32(repr(facts).encode())))) > 1:
    raise UserError(f"The tasks do not agree: {otherwise}.")


def meet(strategy: tf.distribute.Strategy) -> None:
  """Waits for all tasks: a task that ends early breaks what the others still fetch from it."""
  with contextlib.suppress(tf.errors.OpError):  # A task that has ended already is not missed.
    gather(strategy, 0.0)
