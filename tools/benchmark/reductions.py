"""All-reduces of lists of tensors: made as the step makes them, checked and timed."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable

# TensorFlow is imported where it is used, so that mistakes in flags are reported before that.
import numpy as np

from tf_largebatch.errors import UserError

WIRES = ("float32", "bfloat16")  # What gradients are sent as.
_WARM_UP = 2  # Calls after the first one, which is checked.


@functools.cache  # So that no function is traced twice.
def make_reduce(strategy, bytes_per_pack: int = 0, wire: str = "float32") -> Callable:
  """Makes a function from (gradients, others), lists of tensors, to (a number, all sums).

  The number needs all sums, so fetching it waits for them.
  """
  import tensorflow as tf

  options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=bytes_per_pack)

  def replica(gradients, others):
    # The all-reduce needs its addends on this replica's device.
    gradients, others = tf.nest.map_structure(tf.identity, (gradients, others))
    context = tf.distribute.get_replica_context()

    def total(tensors):
      return list(context.all_reduce(tf.distribute.ReduceOp.SUM, tensors, options))

    if wire == "float32":
      totals = total([*gradients, *others])
    else:
      totals = total([tf.cast(gradient, wire) for gradient in gradients])
      totals = [tf.cast(each, tf.float32) for each in totals] + total(others)
    return tf.add_n([tf.reshape(each, [-1])[0] for each in totals]), totals

  return tf.function(lambda *lists: strategy.run(replica, args=lists), autograph=False)


def prepare_reduce(
  strategy, gradients, others, bytes_per_pack: int = 0, wire: str = "float32"
) -> tuple[Callable, int]:
  """Makes an all-reduce of tensors of these shapes, and checks its first sums.

  Returns:
    A function that makes it once more and returns when it has finished, and the number of
    collectives of each replica.

  Raises:
    UserError: a sum is wrong.
  """
  local = strategy.experimental_local_results
  reduce = make_reduce(strategy, bytes_per_pack, wire)
  # Replica r contributes the pattern r + 1 times.
  inputs = _on_replicas(strategy, lambda pattern, r: pattern * (r + 1), gradients, others)
  number, sums = reduce(*inputs)
  _check(strategy, (*gradients, *others), sums, wire)

  def call():
    for copy in local(reduce(*inputs)[0]):
      float(copy)  # Waits for the device.

  operations = reduce.get_concrete_function(*inputs).graph.get_operations()
  collectives = sum(operation.type == "CollectiveReduceV2" for operation in operations)
  return call, collectives // len(local(number))


def time_reduce(
  strategy, gradients, others, repeats: int, bytes_per_pack: int = 0, wire: str = "float32"
) -> dict:
  """Checks and times an all-reduce of tensors of these shapes.

  Returns:
    {"seconds": median, "min", "max", "collectives": of each replica}.

  Raises:
    UserError: a sum is wrong.
  """
  reduce, collectives = prepare_reduce(strategy, gradients, others, bytes_per_pack, wire)
  seconds = []
  for _ in range(_WARM_UP + repeats):
    began = time.perf_counter()
    reduce()
    seconds.append(time.perf_counter() - began)
  seconds = seconds[_WARM_UP:]
  return {
    "seconds": statistics.median(seconds),
    "min": min(seconds),
    "max": max(seconds),
    "collectives": collectives,
  }


def _check(strategy, shapes, totals, wire: str):
  """Refuses wrong sums of the patterns that `time_reduce` adds up."""
  replicas = strategy.num_replicas_in_sync
  # In bfloat16 each of p roundings and additions has a relative error of up to 2^-8.
  limit = 0.0 if wire == "float32" else replicas * 2.0**-8
  for shape, total in zip(shapes, totals, strict=True):
    expected = _pattern(shape) * (replicas * (replicas + 1) / 2)
    copies = strategy.experimental_local_results(total)
    error = max(np.max(np.abs(copy.numpy() / expected - 1)) for copy in copies)
    if not error <= limit:  # Also true for NaN.
      raise UserError(
        f"The sum of a {wire} tensor of shape {shape} over {replicas} replicas is wrong: relative"
        f" error {error:.3g}, limit {limit:g}; do not train with these collectives."
      )


def bfloat16_error(strategy, gradients, others, bytes_per_pack: int) -> float:
  """‖sum sent as bfloat16 − sum sent as float32‖ / ‖sum sent as float32‖ of normal gradients."""
  import tensorflow as tf

  positions = itertools.count()  # A tensor's position is half of its seed.

  def value(pattern, rank):
    seed = tf.stack([tf.cast(rank, tf.int32), next(positions)])
    return 1e-3 * tf.random.stateless_normal(pattern.shape, seed)

  inputs, sums = _on_replicas(strategy, value, gradients, others), []
  for wire in WIRES:
    totals = make_reduce(strategy, bytes_per_pack, wire)(*inputs)[1][: len(gradients)]
    sums.append([strategy.experimental_local_results(total)[0] for total in totals])
  errors = [rounded - exact for exact, rounded in zip(*sums, strict=True)]
  return float(tf.linalg.global_norm(errors) / tf.linalg.global_norm(sums[0]))


def _on_replicas(strategy, value: Callable, gradients, others) -> tuple[list, list]:
  """Makes `value(pattern, replica)` for each shape on every replica, before anything is timed."""
  import tensorflow as tf

  @tf.function(autograph=False)
  def make(patterns):
    def replica(patterns):
      rank = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
      return [value(pattern, rank) for pattern in patterns]

    return strategy.run(replica, args=(patterns,))

  made = make([tf.constant(_pattern(shape)) for shape in (*gradients, *others)])
  return made[: len(gradients)], made[len(gradients) :]


def _pattern(shape) -> np.ndarray:
  """1, 2, … 7, 1, … in float32: sums of up to 2000 replicas are exact, a ring's chunks differ."""
  return np.resize(np.arange(1, 8, dtype=np.float32), shape)
