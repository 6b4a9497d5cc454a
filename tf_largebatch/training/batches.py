"""The batches that reach the replicas, and the error that names a bad example."""

import functools
import itertools
from collections.abc import Iterator

import tensorflow as tf

from tf_largebatch.data import image_loading, input_pipeline, sources
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tf_largebatch.training.bad_examples import BadExamples


def distribute_train_dataset(
  strategy: tf.distribute.Strategy, recipe: Recipe, source, first_step: int, on_bad_example=None
):
  """Distributes the workers' batches from a step on: to each replica those of its own workers.

  The arguments are those of `input_pipeline.train_dataset`.
  """

  def dataset(context):
    workers_per_task = recipe.workers // context.num_input_pipelines
    return input_pipeline.train_dataset(
      recipe,
      source,
      first_worker=context.input_pipeline_id * workers_per_task,
      num_workers=workers_per_task,
      workers_per_replica=recipe.workers // context.num_replicas_in_sync,
      first_step=first_step,
      on_bad_example=on_bad_example,
    )

  return distribute(strategy, dataset)


def distribute(strategy: tf.distribute.Strategy, dataset):
  """Distributes `dataset(context)`; each batch is sent to its device ahead of its use."""
  distributed = strategy.distribute_datasets_from_function(dataset)
  if strategy.num_replicas_in_sync == 1 and tf.config.get_visible_devices("GPU"):
    # Strategies of several replicas do this by themselves.
    distributed = distributed.apply(tf.data.experimental.prefetch_to_device("/gpu:0"))
  return distributed


def train_batches(
  strategy: tf.distribute.Strategy,
  cluster: Cluster,
  recipe: Recipe,
  source,
  first_step: int,
  bad: BadExamples | None,
) -> Iterator:
  """Iterates over the steps' batches from a step on.

  Args:
    strategy, cluster: which replicas and tasks there are, and which task this is.
    recipe: resolved.
    source: of the training examples.
    first_step: of the run.
    bad: records the examples that others replace; None: a bad example raises an error.

  Raises:
    UserError, InterruptedRunError: see `next_batch`.
  """
  workers = recipe.workers // cluster.num_tasks

  def ids(number):
    own = range(cluster.task_index * workers, (cluster.task_index + 1) * workers)
    return (
      index
      for worker in own
      for index in input_pipeline.example_ids(recipe, source.num_examples, number, worker)
    )

  on_bad = None if bad is None else functools.partial(bad.record, recipe.train_split, source)
  batches = iter(distribute_train_dataset(strategy, recipe, source, first_step, on_bad))
  for number in itertools.count(first_step):
    yield next_batch(batches, recipe, recipe.train_split, source, ids(number), bad is not None)


def next_batch(batches: Iterator, recipe: Recipe, split: str, source, ids, skips: bool):
  """Returns the next batch; if that fails, raises an error that names the first bad example.

  Args:
    batches: of the split.
    recipe: resolved.
    split: its name.
    source: of the split's examples.
    ids: of the examples in the batch.
    skips: whether bad examples are replaced.

  Raises:
    UserError: an example is bad.
    InterruptedRunError: the data cannot be reached, or could not be for a moment.
  """
  try:
    return next(batches)
  except sources.FAULTS as error:
    found = _first_fault(source, ids, recipe, image_loading.REPLACEMENTS if skips else 1)
    if found is None:
      raise sources.read_error(source, split, error) from error
    rest = ", or skip such examples with --bad_examples=skip"
    if skips:
      rest = ": too many successive examples are bad to replace it"
    raise UserError(f"{split} cannot be read: {found}. Prepare the data again{rest}.") from error


def _first_fault(source, ids, recipe: Recipe, tries: int) -> str | None:
  """Returns the fault of the first example that is bad along with those that could replace it."""
  for index in ids:
    faults = []
    for other in range(int(index), int(index) + tries):
      found = sources.fault(source, other % source.num_examples, len(recipe.channel_mean))
      if found is None:
        break
      faults.append(found)
    else:
      return faults[0]
  return None
