"""Which example each worker sees at each step, and how it becomes a tensor.

Nothing here has a state: step s of epoch e takes the positions [s·kn, (s+1)·kn) of a permutation
that depends on (seed, e) alone, worker j the j-th n of them (one shuffle of the training set an
epoch, divided among all workers: remark 4), and the augmentation draws from (seed, e, position).
So any step can be rebuilt from its number, on any cluster.

The draws and the ids of a worker's n images are computed together, and what follows is done to
all n at once where images have one shape, else to one encoded image after the other, on all cores.
"""

import math
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tf_largebatch.recipe import Recipe

_PADDING = 4  # Pixels on each side, He et al. 2016 (arXiv 1512.03385), §4.2.
_CROP_TRIES = 10
_CENTER_FRACTION = 224 / 256  # Shorter side 256, centre crop 224 (§5.1).
# Words of 32 bits that a position draws: four a crop's try and one for the flip, in blocks of four.
_DRAWS = 4 * _CROP_TRIES + 4
# For these max_index the cipher of the op is a bit short (log2 of max_index, not of the number of
# indices): one index would come twice, and the last one never.
_BITS_SHORT = frozenset(4**power for power in range(8, 32))
# How many successive examples are tried in place of one that cannot be read.
_REPLACEMENTS = 8
# Pixel for pixel as Pillow decodes. libjpeg's fast DCT, TensorFlow's default, is off by a grey
# level and gains nothing, as Huffman decoding takes most of the time.
JPEG_DECODING = {"dct_method": "INTEGER_ACCURATE", "fancy_upscaling": True}
# A step of a device that carries many workers takes gigabytes: few are held.
_PREFETCHED = 2


def _split_step(recipe: Recipe, train_examples: int, step):
  """(epoch, step within it) of a step of the run."""
  steps_per_epoch = recipe.steps_per_epoch(train_examples)
  return step // steps_per_epoch, step % steps_per_epoch


def _example_id(recipe: Recipe, train_examples: int, epoch, position):
  """The example at a position of the epoch's permutation of all training examples.

  A block cipher over the positions: nothing is stored, and any number of positions at once will do.
  `tf.random.experimental.index_shuffle` runs it for 4 rounds on the seed as it stands, which looks
  at the low bits alone: successive epochs then correlate (0.75 for 50 000 examples) and seeds 0 and
  256 agree. A hashed key and 24 rounds leave nothing of that.
  """
  seed = tf.stack([tf.constant(recipe.seed, tf.int64), tf.cast(epoch, tf.int64)])
  key = tf.random.stateless_uniform([3], seed, minval=None, maxval=None, dtype=tf.int32)

  def shuffle(index, last: int):
    return tf.raw_ops.RandomIndexShuffle(
      index=tf.cast(index, tf.int64),
      seed=key,
      max_index=tf.constant(last, tf.int64),
      rounds=24,
    )

  last = train_examples - 1
  if last not in _BITS_SHORT:
    return shuffle(position, last)
  # One index more, and in its place what it leads to.
  ids = shuffle(position, train_examples)
  return tf.where(ids == train_examples, shuffle(train_examples, train_examples), ids)


def example_ids(recipe: Recipe, train_examples: int, step: int, worker: int) -> np.ndarray:
  """The ids of the training examples that a worker sees at a step, in order.

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
  return _example_id(recipe, train_examples, epoch, positions).numpy()


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
  """The batches of some successive workers, without end, from a step on.

  Args:
    recipe: resolved (no field is None).
    source: see `sources`.
    first_worker, num_workers: the workers of this task.
    workers_per_replica: how many of them each replica carries; it divides num_workers.
    first_step: of the run.
    on_bad_example: None: an example that cannot be read ends the data set with an error. Otherwise
      the next one of the split that can takes its place, and this is called with the bad one's id
      whenever that happened; `sources.fault` tells what is wrong with it.

  Returns:
    Elements (images uint8 `[workers_per_replica, n, H, W, C]`, labels int32
    `[workers_per_replica, n]`), for each step one a replica, in order.
  """
  n = recipe.per_worker_batch_size

  def plan(count):
    """The ids and the draws of one worker's images."""
    epoch, step_in_epoch = _split_step(recipe, source.num_examples, count // num_workers)
    worker = first_worker + count % num_workers
    first = step_in_epoch * recipe.global_batch_size + worker * n
    ids = _example_id(recipe, source.num_examples, epoch, tf.range(first, first + n))
    return ids, _draws(recipe, epoch, first, n)

  # Endless: a finite data set would make every task ask all others, each step, who is at the end.
  plans = tf.data.Dataset.counter(first_step * num_workers).map(plan)
  groups = workers_per_replica
  dataset = _load(recipe, source, plans, n, groups, training=True, on_bad_example=on_bad_example)
  return dataset.map(lambda _, images, labels, read: (images, labels)).prefetch(_PREFETCHED)


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
  """The validation batches of some successive replicas, without end; every example counts once.

  Args:
    recipe, source: as in `train_dataset`.
    batch_size: images of a replica's batch.
    first_replica, num_replicas: the replicas of this task.
    replicas: of all tasks.
    on_bad_example: as in `train_dataset`, but that nothing takes a bad example's place.

  Returns:
    Elements (images uint8 `[batch_size, H, W, C]`, labels int32 `[batch_size]`, weights float32
    `[batch_size]`: 1; 0 past the last example; -1 where it cannot be read), for each step one a
    replica, in order.
  """

  def plan(count):
    replica = count // num_replicas * replicas + first_replica + count % num_replicas
    ids = replica * batch_size + tf.range(batch_size, dtype=tf.int64)
    return ids, tf.zeros([batch_size, 1])  # Draws nobody reads; of none `unbatch` crashes.

  def weigh(ids, images, labels, read):
    weights = tf.where(read, 1.0, -1.0)
    return images[0], labels[0], tf.where(ids < source.num_examples, weights, 0.0)[0]

  plans = tf.data.Dataset.counter().map(plan)
  dataset = _load(
    recipe, source, plans, batch_size, 1, training=False, on_bad_example=on_bad_example
  )
  return dataset.map(weigh).prefetch(_PREFETCHED)


def evaluation_steps(source, batch_size: int, replicas: int) -> int:
  """How many elements a replica evaluates."""
  return -(-source.num_examples // (batch_size * replicas))


def _draws(recipe: Recipe, epoch, first, count: int):
  """What successive positions of an epoch draw: uniform in [0, 1), float32 `[count, _DRAWS]`.

  Philox makes four words a counter, so a position's draws are its own: counted from the epoch's
  beginning, whatever is drawn beside them.
  """
  # Another stream than the shuffle's, whose seed has the epoch itself.
  seed = tf.stack([tf.constant(recipe.seed, tf.int64), -1 - epoch])
  key = tf.random.stateless_uniform([1], seed, minval=None, maxval=None, dtype=tf.uint64)
  return tf.raw_ops.StatelessRandomUniformV2(
    shape=[count, _DRAWS],
    key=key,
    counter=tf.cast(tf.stack([first * (_DRAWS // 4), 0]), tf.uint64),
    alg=tf.random.Algorithm.PHILOX.value,
  )


def _load(recipe: Recipe, source, plans, size: int, groups: int, *, training: bool, on_bad_example):
  """Reads and prepares what plans tell.

  Args:
    recipe, source, on_bad_example: as in `train_dataset`.
    plans: a data set of (ids int64 `[size]`, draws float32 `[size, …]`); ids past the last example
      stand for that one.
    size, groups: so many plans of that size make one element.
    training: with the recipe's augmentation, or as for evaluation.

  Returns:
    A data set of (ids, images uint8 `[groups, size, H, W, C]`, labels int32, read bool); read is
    false where another image stands for one that cannot be read.
  """
  threads = len(os.sched_getaffinity(0))
  parallel = {"num_parallel_calls": threads, "deterministic": True}
  random_crops = training and recipe.augmentation == "area_crop"

  def read(ids, draws):
    stored = source.read(tf.minimum(ids, source.num_examples - 1))
    return ids, _crop_tries(draws) if random_crops else draws, stored

  def load_plan(ids, draws, stored):
    images, labels = stored
    top, left, height, width = _fixed_crop(recipe, source.image_shape)
    images = _resize(recipe, images[:, top : top + height, left : left + width])
    if training and recipe.augmentation == "pad_crop":
      images = _shift_and_flip(recipe, images, draws)
    return ids, images, labels, tf.ones([size], tf.bool)

  def load_image(stored, draws):
    image, label = source.parse(stored) if source.image_shape is None else stored

    def crop_of(shape):
      return _random_crop(shape, draws[1:]) if random_crops else _fixed_crop(recipe, shape)

    images = _resize(recipe, _decode_and_crop(recipe, image, crop_of)[tf.newaxis])
    if training and recipe.augmentation == "pad_crop":
      images = _shift_and_flip(recipe, images, draws[tf.newaxis])
    image = images[0]
    if random_crops:
      image = tf.cond(draws[0, 0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    return image, label

  def require_class(labels):
    """Otherwise a wrong label would train on nothing, without a word."""
    are_classes = tf.reduce_all((labels >= 0) & (labels < source.num_classes))
    with tf.control_dependencies([tf.debugging.Assert(are_classes, [labels])]):
      return tf.identity(labels)

  def load(index, draws, stored):
    return index, *load_image(stored, draws), True

  def to_groups(ids, images, labels, read):
    return tuple(
      tf.reshape(x, [groups, size, *x.shape[1:]])
      for x in (ids, images, require_class(labels), read)
    )

  def load_or_replace(index, draws, stored):
    def attempt(number):
      def previous():
        return (tf.minimum(index, source.num_examples - 1) + number - 1) % source.num_examples

      def replacement():
        with tf.control_dependencies([tf.numpy_function(tell, [previous()], tf.bool)]):
          return source.read(((previous() + 1) % source.num_examples)[tf.newaxis])[0]

      image, label = load_image(tf.cond(number > 0, replacement, lambda: stored), draws)
      return index, image, require_class(label), number == 0

    def tell(bad):
      on_bad_example(int(bad))
      return True

    # A graph has no `try`, but a data set can leave out what fails.
    attempts = tf.data.Dataset.range(_REPLACEMENTS).map(attempt).ignore_errors()
    return attempts.take(1).get_single_element()

  dataset = plans.map(read, **parallel)
  if source.image_shape is not None and not random_crops:
    dataset = dataset.map(load_plan, **parallel).batch(groups)
  else:
    # What is held in memory as images cannot be unreadable.
    fails = on_bad_example is None or source.image_shape is not None
    one = load if fails else load_or_replace
    dataset = dataset.unbatch().map(one, **parallel).batch(groups * size)
    dataset = dataset.map(to_groups)
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  # Ops on one image are too small to be shared out among threads.
  options.threading.max_intra_op_parallelism = 1
  options.autotune.enabled = False
  return dataset.with_options(options)


def _shift_and_flip(recipe: Recipe, images, draws):
  """Pads images `[B, H, W, C]` by 4, crops and flips them at random, by draws `[B, 3 or more]`.

  The padding is the mean pixel, 0 once it is normalised.
  """
  size = recipe.image_size
  mean = tf.constant([round(value) for value in recipe.channel_mean], tf.uint8)
  padding = [[0, 0], [_PADDING, _PADDING], [_PADDING, _PADDING], [0, 0]]
  # Padded as (pixel − mean) modulo 256: tf.pad knows but one constant for all channels.
  images = tf.pad(images - mean, padding) + mean
  offsets = tf.cast(draws[:, 1:3, tf.newaxis] * (2 * _PADDING + 1), tf.int32)
  rows = offsets[:, 0] + tf.range(size)
  columns = offsets[:, 1] + tf.where(draws[:, :1] < 0.5, tf.range(size)[::-1], tf.range(size))
  return tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def _crop_tries(draws):
  """What a random crop takes of its draws `[B, _DRAWS]` whatever its image: `[B, 1 + tries, 4]`.

  The first of the four of row 0 is for the flip. The other rows are tries: height and width of an
  area of 8-100 % and an aspect of 3/4-4/3, uniform in its logarithm (as in torchvision), in units
  of the square root of the image's area; then where, top and left, in shares of what room there is.
  """
  draws = tf.reshape(draws, [-1, 1 + _CROP_TRIES, 4])
  area = 0.08 + draws[..., 0] * 0.92
  aspect = tf.exp((2 * draws[..., 1] - 1) * math.log(4 / 3))
  sizes = tf.sqrt(tf.stack([area / aspect, area * aspect], axis=-1))
  tries = tf.concat([sizes, draws[..., 2:]], axis=-1)
  return tf.concat([draws[:, :1], tries[:, 1:]], axis=1)


def _random_crop(shape, tries):
  """(top, left, height, width), int32, of a crop of 8-100% of the area, aspect 3/4-4/3 (§5.1).

  The first try that fits is taken, else the largest centre crop of an allowed aspect.

  Args:
    shape: (H, W, …) of the image, int32.
    tries: see `_crop_tries`, `[tries, 4]`.
  """
  shape = tf.cast(shape[:2], tf.float32)
  sizes = tf.maximum(tf.round(tries[:, :2] * tf.sqrt(shape[0] * shape[1])), 1)
  room = shape - sizes
  fits = tf.reduce_all(room >= 0, axis=1)
  offsets = tf.floor(tries[:, 2:] * (room + 1))
  drawn = tf.concat([offsets, sizes], axis=1)[tf.argmax(fits)]
  largest = tf.minimum(shape, tf.maximum(tf.round(shape[::-1] * (4 / 3)), 1))
  fallback = tf.concat([(shape - largest) // 2, largest], axis=0)
  return tf.cast(tf.where(tf.reduce_any(fits), drawn, fallback), tf.int32)


def _fixed_crop(recipe: Recipe, shape):
  """(top, left, height, width) of the centre crop, or of all where training crops nothing."""
  height, width = shape[0], shape[1]
  if recipe.augmentation != "area_crop":
    return [0, 0, height, width]
  side = tf.cast(tf.minimum(height, width), tf.float32) * _CENTER_FRACTION
  side = tf.maximum(tf.cast(tf.round(side), tf.int32), 1)
  return [(height - side) // 2, (width - side) // 2, side, side]


def _decode_and_crop(recipe: Recipe, image, crop_of):
  """Part of an image, encoded or not; `crop_of`: shape → (top, left, height, width)."""
  channels = len(recipe.channel_mean)

  def cut(image):
    top, left, height, width = tf.unstack(crop_of(tf.shape(image)))
    return image[top : top + height, left : left + width]

  def decode_jpeg():
    # Decodes the blocks of the crop alone.
    return tf.io.decode_and_crop_jpeg(
      image,
      crop_of(tf.io.extract_jpeg_shape(image)),
      channels=channels,
      **JPEG_DECODING,
    )

  def decode_other():
    return cut(tf.io.decode_image(image, channels=channels, expand_animations=False))

  if image.dtype != tf.string:
    return cut(image)
  decoded = tf.cond(tf.io.is_jpeg(image), decode_jpeg, decode_other)
  return tf.ensure_shape(decoded, [None, None, channels])


def _resize(recipe: Recipe, images):
  """Images `[B, H, W, C]` of the recipe's size, bilinear, in uint8."""
  size = recipe.image_size
  if images.shape[1:3] == (size, size):
    return images
  resized = tf.raw_ops.ResizeBilinear(images=images, size=[size, size], half_pixel_centers=True)
  return tf.cast(resized + 0.5, tf.uint8)
