"""Takes steps of the package and records what they did, as seen from outside."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from tf_largebatch.recipe import Recipe
from tools.conformance.problem import CLASSES, ID_BYTES, make_examples, make_parameters


@dataclasses.dataclass(frozen=True)
class Observation:
  """What the steps did.

  Attributes:
    ids: the examples of each step, int `[steps, k, n]`.
    scalars: what the step reported, float `[steps]` by name.
    variables: weights and moving statistics by name, before each step and after the last.
    spread: at the end, the largest difference between the first replica and any other in weights,
      moving statistics or optimizer state.
  """

  ids: np.ndarray
  scalars: dict[str, np.ndarray]
  variables: list[dict[str, np.ndarray]]
  spread: float

  def updates(self, step: int, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns what the step subtracted from each of the variables, float64."""
    before, after = self.variables[step], self.variables[step + 1]
    return {name: before[name].astype(np.float64) - after[name] for name in names}

  def parameters(self, step: int) -> dict[str, np.ndarray]:
    """Returns the weights before a step."""
    return {name: value for name, value in self.variables[step].items() if "moving_" not in name}

  def statistics(self, step: int) -> dict[str, np.ndarray]:
    """Returns the moving statistics before a step."""
    return {name: value for name, value in self.variables[step].items() if "moving_" in name}


def observe(
  strategy,
  recipe: Recipe,
  network: str,
  steps: int,
  logit_scale: float = 1.0,
  first_step: int = 0,
) -> Observation:
  """Takes steps of a run on all replicas, starting from `make_parameters`.

  Args:
    strategy: made by `make_strategy`.
    recipe, network, logit_scale: see `build_network`.
    steps: how many steps to take.
    first_step: the step of the run whose examples the first step takes.
  """
  from tf_largebatch.data import sources
  from tf_largebatch.distributed.collectives import make_gather
  from tf_largebatch.optim.optimizers import build_optimizer
  from tf_largebatch.training.batches import distribute_train_dataset
  from tf_largebatch.training.step import make_train_step
  from tools.conformance.networks import build_network

  source = sources.ArraySource(*make_examples(recipe), CLASSES)
  with strategy.scope():
    model = build_network(network, recipe, logit_scale)
    optimizer = build_optimizer(recipe, source.num_examples)
    optimizer.build(model.trainable_variables)
  set_parameters(model, network)

  def variables():
    return {variable.path: variable.numpy() for variable in model.weights}

  batches = iter(distribute_train_dataset(strategy, recipe, source, first_step))
  train_step = make_train_step(strategy, model, optimizer, recipe)
  gather_ids = make_gather(strategy, _ids)
  ids, scalars, history = [], [], [variables()]
  for _ in range(steps):
    batch = next(batches)
    ids.append(gather_ids(*batch).reshape(recipe.workers, -1).astype(np.int64))
    scalars.append({name: float(value) for name, value in train_step(batch).items()})
    history.append(variables())
  spread = make_gather(strategy, lambda: _spread(model.weights + optimizer.variables))()
  return Observation(
    np.array(ids),
    {name: np.array([values[name] for values in scalars]) for name in scalars[0]},
    history,
    float(np.max(spread)),
  )


def set_parameters(model, network: str):
  """Gives a model that `build_network` built the values of `make_parameters`."""
  weights, statistics = make_parameters(network)
  for variable in model.weights:
    variable.assign((weights | statistics).get(variable.path, variable))


def _ids(images, labels):
  """Returns the numbers that `make_examples` hid in the images, float64 `[workers, n]`."""
  import tensorflow as tf

  del labels
  return tf.tensordot(tf.cast(images[:, :, 0, 0], tf.float64), ID_BYTES.astype(float), 1)


def _spread(variables):
  """Returns the largest difference of this replica's variables from the first replica's."""
  import tensorflow as tf

  context, largest = tf.distribute.get_replica_context(), []
  for variable in variables:
    mine = tf.cast(variable.value, tf.float64)
    first = tf.where(context.replica_id_in_sync_group == 0, mine, tf.zeros_like(mine))
    first = context.all_reduce(tf.distribute.ReduceOp.SUM, first)
    largest.append(tf.reduce_max(tf.abs(mine - first)))
  return tf.reduce_max(tf.stack(largest))
