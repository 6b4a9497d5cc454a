"""Which examples each worker sees at each step, and how they become tensors.

Nothing here has state. Step s of epoch e takes the positions [s·kn, (s+1)·kn) of a permutation that
depends only on (seed, e), and worker j takes the j-th n of them: one shuffle of the training set
per epoch, divided among all workers (remark 4). The augmentation draws from (seed, e, position). So
any step can be rebuilt from its number, on any cluster.

Images are read and decoded in plans: all n of a worker, or a part of them if they are encoded. All
cores work on different plans.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_largebatch.data import augmentation, image_loading, shuffle
from tf_largebatch.machine import usable_cores
from tf_largebatch.recipe import Recipe

# Data sets convert functions with AutoGraph, which ours do not need and which takes long.
_as_written = tf.autograph.experimental.do_not_convert
# Images in a plan of encoded ones, at most: tracing takes a few milliseconds for each.
_LARGEST_PLAN = 32
# Few, because one step of a device that carries many workers takes gigabytes.
_PREFETCHED = 2


def example_ids(recipe: Recipe, train_examples: int, step: int, worker: int) -> np.ndarray:
  """Returns the ids of the training examples that a worker sees at a step, in order.

  Args:
    recipe: with `workers` chosen.
    train_examples: size of the training split.
    step: of the run, from 0.
    worker: j, from 0 to k − 1.

  Returns:
    int64 `[n]`.
  """
  epoch, step_in_epoch = _split_step(recipe, train_examples, step)
  n = recipe.per_worker_batch_size
  first = step_in_epoch * recipe.global_batch_size + worker * n
  positions = tf.range(first, first + n, dtype=tf.int64)
  return shuffle.example_id(recipe, train_examples, epoch, positions).numpy()


def train_dataset(
  recipe: Recipe,
  source,
  *,
  first_worker: int,
  num_workers: int,
  workers_per_replica: int,
  first_step: int = 0,
  on_bad_example: Callable[[int], None] | None = None,
) -> tf.data.Dataset:
  """Returns the endless batches of several successive workers, beginning with a given step.

  Args:
    recipe: resolved (no field is None).
    source: see `sources`.
    first_worker, num_workers: the workers of this task.
    workers_per_replica: how many of them each replica carries; divides num_workers.
    first_step: step of the run that the data set begins with.
    on_bad_example: if None, an example that cannot be read ends the data set with an error.
      Otherwise the next readable example of the split replaces it, and this function is called with
      the id of the bad one each time; `sources.fault` says what is wrong with it. Data that cannot
      be reached, and an example that can be read at the second attempt, end the data set anyway.

  Returns:
    Elements (images uint8 `[workers_per_replica, n, H, W, C]`, labels int32
    `[workers_per_replica, n]`): for each step, one element per replica, in order.
  """
  n = recipe.per_worker_batch_size
  transform, _ = augmentation.TRANSFORMS[recipe.augmentation]
  size = _plan_size(source, transform, n)

  def plan(count):
    """Returns the ids and the draws of a worker's images, or of the next part of them."""
    batch, start = count * size // n, count * size % n
    epoch, step_in_epoch = _split_step(recipe, source.num_examples, batch // num_workers)
    worker = first_worker + batch % num_workers
    first = step_in_epoch * recipe.global_batch_size + worker * n + start
    ids = shuffle.example_id(recipe, source.num_examples, epoch, tf.range(first, first + size))
    return ids, shuffle.draws(recipe, epoch, first, size)

  # Endless, because with a finite data set all tasks would ask each other at every step whether
  # one has reached the end.
  first_plan = first_step * num_workers * (n // size)
  plans = tf.data.Dataset.counter(first_plan).map(_as_written(plan))
  shape = (workers_per_replica, n)
  dataset = _load(recipe, source, plans, transform, size, shape, on_bad_example)
  without_ids = _as_written(lambda _, images, labels, read: (images, labels))
  return dataset.map(without_ids).prefetch(_PREFETCHED)


def evaluation_dataset(
  recipe: Recipe,
  source,
  *,
  batch_size: int,
  first_replica: int,
  num_replicas: int,
  replicas: int,
  on_bad_example: Callable[[int], None] | None = None,
) -> tf.data.Dataset:
  """Returns the endless validation batches of several replicas; every example counts once.

  Args:
    recipe, source: as in `train_dataset`.
    batch_size: images in a replica's batch.
    first_replica, num_replicas: the replicas of this task, which are successive.
    replicas: number of replicas of all tasks.
    on_bad_example: as in `train_dataset`, except that a bad example is not replaced.

  Returns:
    Elements (images uint8 `[batch_size, H, W, C]`, labels int32 `[batch_size]`, weights float32
    `[batch_size]`: 1; 0 past the last example; -1 for one that cannot be read): for each step, one
    element per replica, in order.
  """

  _, transform = augmentation.TRANSFORMS[recipe.augmentation]
  size = _plan_size(source, transform, batch_size)

  def plan(count):
    batch, start = count * size // batch_size, count * size % batch_size
    replica = batch // num_replicas * replicas + first_replica + batch % num_replicas
    ids = replica * batch_size + start + tf.range(size, dtype=tf.int64)
    return ids, tf.zeros([size, 0])  # No draws.

  def weigh(ids, images, labels, read):
    weights = tf.where(read, 1.0, -1.0)
    return images, labels, tf.where(ids < source.num_examples, weights, 0.0)

  plans = tf.data.Dataset.counter().map(_as_written(plan))
  dataset = _load(recipe, source, plans, transform, size, (batch_size,), on_bad_example)
  return dataset.map(_as_written(weigh)).prefetch(_PREFETCHED)


def evaluation_steps(source, batch_size: int, replicas: int) -> int:
  """Returns how many elements each replica evaluates."""
  return -(-source.num_examples // (batch_size * replicas))


def _split_step(recipe: Recipe, train_examples: int, step):
  """Returns (epoch, step within the epoch) of a step of the run."""
  steps_per_epoch = recipe.steps_per_epoch(train_examples)
  return step // steps_per_epoch, step % steps_per_epoch


def _is_array(source, transform) -> bool:
  """Whether the images of a plan are one array, which is transformed at once."""
  return source.image_shape is not None and not transform.per_image


def _plan_size(source, transform, images: int) -> int:
  """Returns how many of so many images are loaded together: a divisor of their number."""
  if _is_array(source, transform):
    return images
  return max(size for size in range(1, min(images, _LARGEST_PLAN) + 1) if images % size == 0)


def _load(recipe: Recipe, source, plans, transform, size: int, shape: tuple, on_bad_example):
  """Reads, decodes and transforms the examples of plans.

  Args:
    recipe, source, on_bad_example: as in `train_dataset`.
    plans: a data set of (ids int64 `[size]`, draws float32 `[size, …]`); an id past the last
      example stands for the last example.
    transform: an `augmentation.Transform`.
    size: examples in a plan.
    shape: of the examples of an element, which successive plans make up.

  Returns:
    A data set of (ids, images uint8 `[*shape, H, W, C]`, labels int32, read bool); read is false
    where another image replaces one that cannot be read.
  """
  threads = usable_cores()

  def read(ids, draws):
    stored = source.read(tf.minimum(ids, source.num_examples - 1))
    return ids, transform.split_draws(draws), stored

  def to_shape(ids, images, labels, read):
    ids, labels, read = (tf.reshape(x, shape) for x in (ids, labels, read))
    images = tf.reshape(images, [*shape, *images.shape[-3:]])
    return ids, images, image_loading.require_class(labels, source), read

  if _is_array(source, transform):
    load = image_loading.array_loader(recipe, source, transform, size)
  else:
    load = image_loading.image_loader(recipe, source, transform, size, on_bad_example)
  dataset = plans.map(_as_written(read), num_parallel_calls=threads, deterministic=True)
  # A plan that is done early waits for those before it; meanwhile its thread begins another one.
  begun = threads + -(-threads // 2)
  dataset = dataset.map(_as_written(load), num_parallel_calls=begun, deterministic=True)
  plans_in_element = math.prod(shape) // size
  if plans_in_element > 1:  # Batches of one would be copies.
    dataset = dataset.batch(plans_in_element)
  dataset = dataset.map(_as_written(to_shape))
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  # Operations on one image are too small to divide among threads.
  options.threading.max_intra_op_parallelism = 1
  options.autotune.enabled = False
  return dataset.with_options(options)
