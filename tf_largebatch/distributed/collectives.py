"""What the tasks of a run agree on, and where they wait for each other."""

import contextlib
import time
import zlib
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch.errors import UserError

# Network file systems may show a new file to other machines only after about a minute. Seconds
# between the looks of tasks that see different files.
_PAUSES = (5, 15, 40)


class DifferentViewsError(UserError):
  """Tasks see different files where all should see the same."""


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

  @tf.function(autograph=False)
  def gather_values(*arguments):
    return strategy.run(replica, args=arguments)

  def gather_results(*arguments) -> np.ndarray:
    return strategy.experimental_local_results(gather_values(*arguments))[0].numpy()

  return gather_results


def gather(strategy: tf.distribute.Strategy, value: float) -> np.ndarray:
  """Returns every replica's value in order, float64 `[replicas]`; waits for all replicas."""
  return make_gather(strategy, lambda: np.float64(value))()


def make_task_gather(strategy: tf.distribute.Strategy, tasks: int) -> Callable[..., np.ndarray]:
  """Returns a function that gathers one array from each task.

  Args:
    strategy: made by `make_strategy`.
    tasks: number of tasks.

  Returns:
    A function of an array, whose shape must be the same on all tasks. It returns float64
    `[tasks, …]`, the same on all tasks, and so waits for all of them.
  """
  replicas_per_task = strategy.num_replicas_in_sync // tasks
  gather_from_replicas = make_gather(strategy, lambda value: value)

  def gather_from_tasks(value) -> np.ndarray:
    return gather_from_replicas(np.asarray(value, np.float64))[::replicas_per_task]

  return gather_from_tasks


def broadcast(strategy: tf.distribute.Strategy, variables: list[keras.Variable]) -> None:
  """Gives all replicas the first replica's values of variables; waits for all replicas."""

  def assign(strategy, values):
    for variable, value in zip(variables, values, strict=True):
      strategy.extended.update(
        variable.value, lambda v, new: v.assign(tf.cast(new, v.dtype)), args=(value,)
      )

  def replica():
    context = tf.distribute.get_replica_context()
    first = tf.convert_to_tensor(context.replica_id_in_sync_group) == 0
    # One dtype for all, which holds floats and integers up to 2^53 exactly.
    own = [tf.cast(variable.value, tf.float64) for variable in variables]
    own = [tf.where(first, value, tf.zeros_like(value)) for value in own]
    context.merge_call(assign, args=(context.all_reduce(tf.distribute.ReduceOp.SUM, own),))

  tf.function(lambda: strategy.run(replica), autograph=False)()


def retry_until_views_agree(attempt: Callable):
  """Calls `attempt` again for a minute while tasks see different files, and returns its result.

  Args:
    attempt: looks at the files; raises the same DifferentViewsError on all tasks, or on none.
  """
  for index, seconds in enumerate(_PAUSES):
    try:
      return attempt()
    except DifferentViewsError as error:
      if index == 0:
        logging.info(
          "%s Trying again for %d s, because network file systems may show new files late.",
          error,
          sum(_PAUSES),
        )
    time.sleep(seconds)
  return attempt()


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
