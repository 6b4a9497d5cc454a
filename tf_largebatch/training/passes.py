"""A step of k workers on any number of replicas, for any Keras model.

A worker's pass is a pure function of the model's variables and the worker's n examples. A replica
loops over the workers it carries, one or several per pass, and adds up what they return; one
all-reduce adds up the replicas; then every replica makes the same update. Where a worker runs
changes nothing but the order in which floats are summed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_largebatch.machine import usable_cores
from tf_largebatch.options import RunOptions

# Passes that a replica runs at once: two keep a CPU's cores busy where each op is small, and hold
# the activations of two. On a single core they would only compete for the caches.
PASSES_AT_ONCE = min(2, usable_cores())
# Odd, so the seeds of 2^32 workers differ; its multiples are spread over the 32 bits (2^32 / φ).
_SEED_STRIDE = 2654435769
# Elements of a gradient below which starting an operation costs more than copying it.
_SMALL = 2**16


class Values(NamedTuple):
  """Values of a model's variables, in the order of `Variables`."""

  weights: list
  statistics: list
  counters: list
  constants: list


@dataclasses.dataclass(frozen=True)
class Variables:
  """A model's variables by what a step does with them.

  Attributes:
    weights: trainable; updated by the optimizer.
    statistics: floats that a pass changes (moving averages). Each worker starts from the same
      values, and the step takes the mean of the k results. That is the update of their mean where
      the recurrence is linear.
    counters: integers that a pass changes, such as states of seed generators. Each pass must change
      them by the same amount; they change by it once a step.
    constants: what a pass only reads.
  """

  weights: list[keras.Variable]
  statistics: list[keras.Variable]
  counters: list[keras.Variable]
  constants: list[keras.Variable] = dataclasses.field(default_factory=list)

  @classmethod
  def of(cls, model: keras.Model) -> "Variables":
    """All variables of a model that are not trainable count as changed by a pass."""
    others = model.non_trainable_variables
    return cls(
      model.trainable_variables,
      [v for v in others if _is_float(v)],
      [v for v in others if not _is_float(v)],
    )

  def values(self) -> Values:
    """Their values now, on this replica."""
    groups = (self.weights, self.statistics, self.counters, self.constants)
    return Values(*([tf.convert_to_tensor(v.value) for v in group] for group in groups))

  def assign(self, strategy, statistics: list, counters: list) -> None:
    """Assigns new values; call it in cross-replica context."""
    for variables, values in ((self.statistics, statistics), (self.counters, counters)):
      for variable, value in zip(variables, values, strict=True):
        strategy.extended.update(variable.value, lambda v, new: v.assign(new), args=(value,))


def _is_float(variable: keras.Variable) -> bool:
  return tf.as_dtype(variable.dtype).is_floating


def call(variables: Variables, values: Values, worker, body: Callable[[], Any], more=()):
  """Calls `body`, which uses the model, with values in place of the model's variables.

  Args:
    variables, values: of the model.
    worker: index of the worker among the k (integer scalar), or of the first in the pass. Each has
      random numbers of its own; those of worker 0 are the ones that Keras draws.
    body: the computation.
    more: pairs of another variable and its value.

  Returns:
    (what `body` returns, new statistics, new counters, the scope with what was assigned)
  """
  shifts = [_seed_shift(variable, worker) for variable in variables.counters]
  shifted = [c if s is None else c + s for c, s in zip(values.counters, shifts, strict=True)]
  mapping = [
    *zip(variables.weights, values.weights, strict=True),
    *zip(variables.statistics, values.statistics, strict=True),
    *zip(variables.counters, shifted, strict=True),
    *zip(variables.constants, values.constants, strict=True),
    *more,
  ]
  with keras.StatelessScope(mapping, collect_losses=True) as scope:
    result = body()
  statistics = [scope.get_current_value(v) for v in variables.statistics]
  counters = [scope.get_current_value(v) for v in variables.counters]
  counters = [c if s is None else c - s for c, s in zip(counters, shifts, strict=True)]
  return result, statistics, counters, scope


def is_seed(variable: keras.Variable) -> bool:
  """Whether a variable is the state of a `keras.random.SeedGenerator`: (seed, count of draws)."""
  return variable.name == "seed_generator_state"


def _seed_shift(variable: keras.Variable, worker):
  """What separates a worker's seed from worker 0's; None for other integers."""
  if not is_seed(variable):
    return None
  shift = tf.cast(worker, variable.dtype) * tf.constant(_SEED_STRIDE, variable.dtype)
  return tf.stack([shift, tf.zeros_like(shift)])


def make_replica_sums(
  forward: Callable,
  workers: int,
  addends: Sequence[tf.TensorSpec],
  workers_per_pass: int = 1,
  jit_compile: bool = False,
  with_norms: bool = False,
) -> Callable:
  """Builds the pure function that computes what the workers of one replica add to the step.

  Args:
    forward: a function of `Values`, the index of a worker and a batch `[g·n, …]` (nested) that
      returns (the pass' addend of the step's loss, new statistics, new counters, further addends).
    workers: k.
    addends: shapes and dtypes of the further addends.
    workers_per_pass: g.
    jit_compile: whether XLA compiles the function.
    with_norms: whether each pass adds, as the last of the further addends, the square of the L2
      norm of what it adds to the gradients.

  Returns:
    A function of `Values`, the index of the replica's first worker, a batch `[workers on this
    replica, n, …]` (nested), and a factor that multiplies the loss before backprop and divides the
    gradients afterwards (None: no scaling). It returns (gradients, statistics, counters, further
    addends); all but the counters are sums over the workers.
  """

  one_pass = _make_pass(forward, workers, workers_per_pass, with_norms)
  if with_norms:
    addends = [*addends, tf.TensorSpec([], addends[0].dtype)]

  def replica_sums(values, first_worker, batch, loss_scale=None):
    # [workers, n, …] → [passes, g·n, …]; within a pass, batch normalisation keeps the n apart.
    batch = tf.nest.map_structure(
      lambda x: tf.reshape(x, [-1, workers_per_pass * x.shape[1], *x.shape[2:]]), batch
    )
    count = tf.nest.flatten(batch)[0].shape[0]

    def run(index):
      part = tf.nest.map_structure(lambda x: x[index], batch)
      return one_pass(values, first_worker + index * workers_per_pass, part, loss_scale)

    if count == 1:  # No loop between backprop and the all-reduce.
      return run(0)

    def add_pass(index, old):
      gradients, statistics, counters, more = run(index)
      new = tf.nest.map_structure(tf.add, (old[0], old[1], old[3]), (gradients, statistics, more))
      return index + 1, (new[0], new[1], counters, new[2])

    start = (0, _zeros(values, addends))
    _, sums = tf.while_loop(
      lambda index, _: index < count, add_pass, start, parallel_iterations=PASSES_AT_ONCE
    )
    return sums

  if not jit_compile:
    return replica_sums
  return tf.function(replica_sums, jit_compile=True, autograph=False)


def _squared_norm(gradients: list):
  """The square of the L2 norm, with few operations: one by one, small tensors cost their start."""
  small = [tf.reshape(g, [-1]) for g in gradients if g.shape.num_elements() < _SMALL]
  large = [g for g in gradients if g.shape.num_elements() >= _SMALL]
  parts = [tf.concat(small, 0), *large] if small else large
  return 2 * tf.add_n([tf.nn.l2_loss(part) for part in parts])


def _zeros(values: Values, addends: Sequence[tf.TensorSpec]) -> tuple:
  """The sums before the first pass."""
  return (
    [tf.zeros_like(weight) for weight in values.weights],
    [tf.zeros_like(statistic) for statistic in values.statistics],
    list(values.counters),
    [tf.zeros(addend.shape, addend.dtype) for addend in addends],
  )


def _make_pass(
  forward: Callable, workers: int, workers_per_pass: int, with_norms: bool
) -> Callable:
  """Builds the function that adds gradients to what `forward` returns."""

  def one_pass(values, worker, batch, loss_scale):
    with tf.GradientTape() as tape:
      tape.watch(values.weights)
      loss, statistics, counters, more = forward(values, worker, batch)
      # A worker's share of the step's mean over kn images is 1/k, which could underflow in float16.
      target = loss if loss_scale is None else loss * (loss_scale * workers)
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(target, values.weights)]
    if loss_scale is not None:
      gradients = [gradient / (loss_scale * workers) for gradient in gradients]
    if with_norms:
      more = [*more, tf.cast(_squared_norm(gradients), more[0].dtype)]
    share = workers_per_pass / workers
    return gradients, [statistic * share for statistic in statistics], counters, more

  return one_pass


def total(gradients: list, others: Any, options: RunOptions = RunOptions()):  # noqa: B008 (frozen)
  """Sums gradients and others (nested) over the replicas, in replica context.

  All of them in one reduction, or in one for each dtype. A pack of gradients is sent as soon as
  the last pass' backprop has completed it. If XLA compiles the passes, all results come at once.
  """
  communication = tf.distribute.experimental.CommunicationOptions(
    bytes_per_pack=options.bytes_per_pack
  )

  def reduce(addends):
    totals = list(addends)
    if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
      return totals  # A reduction would make the update wait for the whole of backprop.
    for dtype in dict.fromkeys(addend.dtype for addend in addends):
      places = [index for index, addend in enumerate(addends) if addend.dtype == dtype]
      reduced = tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM, [addends[index] for index in places], communication
      )
      for index, value in zip(places, reduced, strict=True):
        totals[index] = value
    return totals

  rest = tf.nest.flatten(others)
  if options.allreduce_dtype == "bfloat16":
    totals = reduce([tf.cast(gradient, tf.bfloat16) for gradient in gradients])
    totals = [tf.cast(t, g.dtype) for t, g in zip(totals, gradients, strict=True)]
    rest = reduce(rest)
  else:
    # The gradients stand last, in the order of the layers, because packs are sent from the end.
    totals = reduce([*rest, *gradients])
    rest, totals = totals[: len(rest)], totals[len(rest) :]
  return totals, tf.nest.pack_sequence_as(others, rest)
