"""Which examples each worker sees at each step, and how they become tensors.

Nothing here has state. Step s of epoch e takes the positions [s·kn, (s+1)·kn) of a permutation that
depends only on (seed, e), and worker j takes the j-th n of them: one shuffle of the training set
per epoch, divided among all workers (remark 4). The augmentation draws from (seed, e, position). So
any step can be rebuilt from its number, on any cluster.

The ids and draws of a worker's n images are computed together. The rest is done for all n at once
if the images share one shape, else for one encoded image at a time, on all cores.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_largebatch.data import augmentation, shuffle, sources
from tf_largebatch.machine import usable_cores
from tf_largebatch.recipe import Recipe

# How many successive examples are tried, from the one that cannot be read.
REPLACEMENTS = 8
# Decodes to the same pixels as Pillow. libjpeg's fast DCT, TensorFlow's default, is off by one grey
# level and saves nothing, because Huffman decoding takes most of the time.
JPEG_DECODING = {"dct_method": "INTEGER_ACCURATE", "fancy_upscaling": True}
# Data sets convert functions with AutoGraph, which ours do not need and which takes long.
_as_written = tf.autograph.experimental.do_not_convert
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

  def plan(count):
    """Returns the ids and the draws of one worker's images."""
    epoch, step_in_epoch = _split_step(recipe, source.num_examples, count // num_workers)
    worker = first_worker + count % num_workers
    first = step_in_epoch * recipe.global_batch_size + worker * n
    ids = shuffle.example_id(recipe, source.num_examples, epoch, tf.range(first, first + n))
    return ids, shuffle.draws(recipe, epoch, first, n)

  # Endless, because with a finite data set all tasks would ask each other at every step whether
  # one has reached the end.
  plans = tf.data.Dataset.counter(first_step * num_workers).map(_as_written(plan))
  transform, _ = augmentation.TRANSFORMS[recipe.augmentation]
  dataset = _load(recipe, source, plans, transform, n, workers_per_replica, on_bad_example)
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

  def plan(count):
    replica = count // num_replicas * replicas + first_replica + count % num_replicas
    ids = replica * batch_size + tf.range(batch_size, dtype=tf.int64)
    return ids, tf.zeros([batch_size, 1])  # Unused draws; `unbatch` crashes if there are none.

  def weigh(ids, images, labels, read):
    weights = tf.where(read, 1.0, -1.0)
    return images[0], labels[0], tf.where(ids < source.num_examples, weights, 0.0)[0]

  plans = tf.data.Dataset.counter().map(_as_written(plan))
  _, transform = augmentation.TRANSFORMS[recipe.augmentation]
  dataset = _load(recipe, source, plans, transform, batch_size, 1, on_bad_example)
  return dataset.map(_as_written(weigh)).prefetch(_PREFETCHED)


def evaluation_steps(source, batch_size: int, replicas: int) -> int:
  """Returns how many elements each replica evaluates."""
  return -(-source.num_examples // (batch_size * replicas))


def _split_step(recipe: Recipe, train_examples: int, step):
  """Returns (epoch, step within the epoch) of a step of the run."""
  steps_per_epoch = recipe.steps_per_epoch(train_examples)
  return step // steps_per_epoch, step % steps_per_epoch


def _load(recipe: Recipe, source, plans, transform, size: int, groups: int, on_bad_example):
  """Reads, decodes and transforms the examples of plans.

  Args:
    recipe, source, on_bad_example: as in `train_dataset`.
    plans: a data set of (ids int64 `[size]`, draws float32 `[size, …]`); an id past the last
      example stands for the last example.
    transform: an `augmentation.Transform`.
    size: examples in a plan.
    groups: plans that make up one element.

  Returns:
    A data set of (ids, images uint8 `[groups, size, H, W, C]`, labels int32, read bool); read is
    false where another image replaces one that cannot be read.
  """
  threads = usable_cores()
  parallel = {"num_parallel_calls": threads, "deterministic": True}

  def read(ids, draws):
    stored = source.read(tf.minimum(ids, source.num_examples - 1))
    return ids, transform.prepare_draws(draws), stored

  def to_groups(ids, images, labels, read):
    return tuple(
      tf.reshape(x, [groups, size, *x.shape[1:]])
      for x in (ids, images, _require_class(labels, source), read)
    )

  dataset = plans.map(_as_written(read), **parallel)
  if source.image_shape is not None and not transform.per_image:
    load = _plan_loader(recipe, source, transform, size)
    dataset = dataset.map(_as_written(load), **parallel).batch(groups)
  else:
    load = _image_loader(recipe, source, transform, on_bad_example)
    dataset = dataset.unbatch().map(_as_written(load), **parallel)
    dataset = dataset.batch(groups * size).map(_as_written(to_groups))
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  # Operations on one image are too small to divide among threads.
  options.threading.max_intra_op_parallelism = 1
  options.autotune.enabled = False
  return dataset.with_options(options)


def _plan_loader(recipe: Recipe, source, transform, size: int):
  """Returns the function that transforms the images of a plan at once; all share one shape."""

  def load_plan(ids, draws, stored):
    images, labels = stored
    top, left, height, width = transform.crop(source.image_shape, draws)
    images = augmentation.resize(recipe, images[:, top : top + height, left : left + width])
    if transform.finish is not None:
      images = transform.finish(recipe, images, draws)
    return ids, images, labels, tf.ones([size], tf.bool)

  return load_plan


def _image_loader(recipe: Recipe, source, transform, on_bad_example):
  """Returns the function that decodes and transforms one image, or one that replaces it."""
  channels = len(recipe.channel_mean)

  def load_image(stored, draws):
    image, label = source.parse(stored) if source.image_shape is None else stored
    image = decode_and_crop(image, lambda shape: transform.crop(shape, draws), channels)
    images = augmentation.resize(recipe, image[tf.newaxis])
    return transform.finish_one(recipe, images, draws), label

  def load(index, draws, stored):
    return index, *load_image(stored, draws), True

  # Decoded images that are held in memory cannot be unreadable.
  if on_bad_example is None or source.image_shape is not None:
    return load
  return functools.partial(_load_or_replace, recipe, source, load_image, on_bad_example)


def _load_or_replace(recipe: Recipe, source, load_image, on_bad_example, index, draws, stored):
  """Loads an image or, if it cannot be read, the next readable one with the same draws."""

  def fetch(number):
    """Returns the stored form of the number-th example after this one."""

    def previous():
      return (tf.minimum(index, source.num_examples - 1) + number - 1) % source.num_examples

    def replacement():
      with tf.control_dependencies([tf.numpy_function(report, [previous()], tf.bool)]):
        return source.read(((previous() + 1) % source.num_examples)[tf.newaxis])[0]

    return number, tf.cond(number > 0, replacement, lambda: stored)

  def load(number, stored):
    image, label = load_image(stored, draws)
    return index, image, _require_class(label, source), number == 0

  def load_if_good(number, stored):
    # A graph has no `try`, but a data set can skip the elements that fail.
    return tf.data.Dataset.from_tensors((number, stored)).map(load).ignore_errors()

  @tf.autograph.experimental.do_not_convert
  def report(bad):
    if sources.fault(source, int(bad), len(recipe.channel_mean)) is None:
      raise RuntimeError(f"example {bad} could not be read")
    on_bad_example(int(bad))
    return True

  # An error in `fetch` or `report` is not skipped: an example that cannot be reached, or that can
  # be read at the second attempt, is not bad.
  attempts = tf.data.Dataset.range(REPLACEMENTS).map(fetch).flat_map(load_if_good)
  return attempts.take(1).get_single_element()


def _require_class(labels, source):
  """Returns the labels, or fails if one is not a class: training would silently ignore it."""
  are_classes = tf.reduce_all((labels >= 0) & (labels < source.num_classes))
  with tf.control_dependencies([tf.debugging.Assert(are_classes, [labels])]):
    return tf.identity(labels)


def decode_and_crop(image, crop, channels: int):
  """Returns a part of an image, which may be encoded, uint8 `[H, W, C]`.

  Args:
    image: string scalar, or uint8 `[H, W, C]`.
    crop: shape → (top, left, height, width).
    channels: C, to which an encoded image is decoded.
  """

  def cut(image):
    top, left, height, width = tf.unstack(crop(tf.shape(image)))
    return image[top : top + height, left : left + width]

  def decode_jpeg():
    # Decodes only the blocks of the crop.
    return tf.io.decode_and_crop_jpeg(
      image, crop(tf.io.extract_jpeg_shape(image)), channels=channels, **JPEG_DECODING
    )

  def decode_other():
    return cut(tf.io.decode_image(image, channels=channels, expand_animations=False))

  if image.dtype != tf.string:
    return cut(image)
  decoded = tf.cond(tf.io.is_jpeg(image), decode_jpeg, decode_other)
  return tf.ensure_shape(decoded, [None, None, channels])
