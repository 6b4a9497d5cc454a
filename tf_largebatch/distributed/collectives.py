"""What the tasks of a run agree on, and where they wait for each other."""

import contextlib
import zlib

import numpy as np
import tensorflow as tf

from tf_largebatch.errors import UserError


def gather(strategy: tf.distribute.Strategy, value: float) -> np.ndarray:
  """Returns every replica's value in order, float64 `[replicas]`; waits for all replicas."""

  @tf.function
  def gather_values():
    def replica():
      context = tf.distribute.get_replica_context()
      index, count = context.replica_id_in_sync_group, strategy.num_replicas_in_sync
      # Exact: each element of the sum is one value plus zeros.
      mine = tf.one_hot(index, count, tf.constant(value, tf.float64), dtype=tf.float64)
      return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

    return strategy.run(replica)

  return strategy.experimental_local_results(gather_values())[0].numpy()


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
