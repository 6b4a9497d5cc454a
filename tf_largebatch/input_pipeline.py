"""Which example each worker sees at each step, and how it becomes a tensor.

Nothing here has a state: step s of epoch e takes the positions [s·kn, (s+1)·kn) of a permutation
that depends on (seed, e) alone, worker j the j-th n of them (one shuffle of the training set an
epoch, divided among all workers: remark 4), and the augmentation draws from (seed, e, position).
So any step can be rebuilt from its number, on any cluster.
"""

import math

import numpy as np
import tensorflow as tf

from tf_largebatch.recipe import Recipe

_PADDING = 4  # Pixels on each side, He et al. 2016 (arXiv 1512.03385), §4.2.
_CROP_TRIES = 10
_CENTER_FRACTION = 224 / 256  # Shorter side 256, centre crop 224 (§5.1).


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
  return tf.raw_ops.RandomIndexShuffle(
    index=tf.cast(position, tf.int64),
    seed=key,
    max_index=tf.constant(train_examples - 1, tf.int64),
    rounds=24,
  )


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
) -> tf.data.Dataset:
  """The batches of some successive workers, without end, from a step on.

  Args:
    recipe: resolved (no field is None).
    source: see `sources`.
    first_worker, num_workers: the workers of this task.
    workers_per_replica: how many of them each replica carries; it divides num_workers.
    first_step: of the run.

  Returns:
    Elements (images uint8 `[workers_per_replica, n, H, W, C]`, labels int32
    `[workers_per_replica, n]`), for each step one a replica, in order.
  """
  n = recipe.per_worker_batch_size
  images_per_step = num_workers * n

  def load(count):
    epoch, step_in_epoch = _split_step(recipe, source.num_examples, count // images_per_step)
    in_step = first_worker * n + count % images_per_step
    position = step_in_epoch * recipe.global_batch_size + in_step
    image, label = source.read(_example_id(recipe, source.num_examples, epoch, position))
    # (seed, epoch, position) as the two numbers of a stateless seed.
    seed = tf.stack([tf.constant(recipe.seed, tf.int64), epoch * 2**40 + position])
    return _train_image(recipe, source, image, seed), label

  # Endless: a finite data set would make every task ask all others, each step, who is at the end.
  dataset = tf.data.Dataset.counter(first_step * images_per_step)
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  dataset = dataset.batch(workers_per_replica * n, drop_remainder=True)

  def by_worker(tensor):
    return tf.reshape(tensor, [workers_per_replica, n, *tensor.shape[1:]])

  # A step of a device that carries many workers takes gigabytes: few are held.
  return dataset.map(lambda *batch: tuple(map(by_worker, batch))).prefetch(2)


def evaluation_dataset(
  recipe: Recipe, source, *, batch_size: int, first_replica: int, num_replicas: int, replicas: int
) -> tf.data.Dataset:
  """The validation batches of some successive replicas, without end; every example counts once.

  Args:
    recipe, source: as in `train_dataset`.
    batch_size: images of a replica's batch.
    first_replica, num_replicas: the replicas of this task.
    replicas: of all tasks.

  Returns:
    Elements (images uint8 `[batch_size, H, W, C]`, labels int32 `[batch_size]`, weights float32
    `[batch_size]`: 1, or 0 past the last example), for each step one a replica, in order.
  """

  def load(count):
    step, in_step = count // (num_replicas * batch_size), count % (num_replicas * batch_size)
    index = (step * replicas + first_replica) * batch_size + in_step
    image, label = source.read(tf.minimum(index, source.num_examples - 1))
    weight = tf.cast(index < source.num_examples, tf.float32)
    return _evaluation_image(recipe, source, image), label, weight

  dataset = tf.data.Dataset.counter()
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return dataset.batch(batch_size, drop_remainder=True).prefetch(1)


def evaluation_steps(source, batch_size: int, replicas: int) -> int:
  """Steps until every validation example was seen."""
  return math.ceil(source.num_examples / (batch_size * replicas))


def _train_image(recipe: Recipe, source, image, seed):
  if recipe.augmentation == "area_crop":
    image = _decode_crop(recipe, source, image, lambda shape: _random_area(shape, seed))
  else:
    image = _evaluation_image(recipe, source, image)
    if recipe.augmentation == "pad_crop":
      image = _random_shift(recipe, image, seed)
  if recipe.augmentation != "none":
    flip_seed = tf.random.experimental.stateless_fold_in(seed, 1)
    flip = tf.random.stateless_uniform([], flip_seed, 0, 2, tf.int32) == 1
    image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
  return image


def _evaluation_image(recipe: Recipe, source, image):
  if recipe.augmentation == "area_crop":
    return _decode_crop(recipe, source, image, _center)
  return _decode_crop(recipe, source, image, _whole)


def _random_shift(recipe: Recipe, image, seed):
  """Pads by 4 and crops at random; the padding is the mean pixel, 0 once it is normalised."""
  size = recipe.image_size
  mean = tf.constant([round(value) for value in recipe.channel_mean], tf.uint8)
  padding = [[_PADDING, _PADDING], [_PADDING, _PADDING], [0, 0]]
  # Padded as (pixel − mean) modulo 256: tf.pad knows but one constant for all channels.
  image = tf.pad(image - mean, padding) + mean
  offset = tf.random.stateless_uniform([2], seed, 0, 2 * _PADDING + 1, tf.int32)
  return tf.slice(image, [offset[0], offset[1], 0], [size, size, image.shape[-1]])


def _random_area(shape, seed):
  """(top, left, height, width) of a crop of 8-100% of the area, aspect 3/4-4/3 (§5.1).

  Ten tries at once, of which the first that fits is taken, else the largest centre crop of an
  allowed aspect; the aspect is uniform in its logarithm, as in torchvision.
  """
  height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
  draws = tf.random.stateless_uniform([_CROP_TRIES, 4], seed)
  area = (0.08 + draws[:, 0] * 0.92) * height * width
  aspect = tf.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
  widths, heights = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
  fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
  tops = tf.floor(draws[:, 2] * (height - heights + 1))
  lefts = tf.floor(draws[:, 3] * (width - widths + 1))
  first = tf.argmax(tf.cast(fits, tf.int32))
  drawn = tf.gather(tf.stack([tops, lefts, heights, widths], axis=1), first)
  fall_height = tf.minimum(height, tf.maximum(tf.round(width * 4 / 3), 1))
  fall_width = tf.minimum(width, tf.maximum(tf.round(height * 4 / 3), 1))
  fallback = tf.stack(
    [(height - fall_height) // 2, (width - fall_width) // 2, fall_height, fall_width]
  )
  return tf.cast(tf.where(tf.reduce_any(fits), drawn, fallback), tf.int32)


def _center(shape):
  """The centre crop that is 224 wide when the shorter side is 256."""
  side = tf.cast(tf.minimum(shape[0], shape[1]), tf.float32) * _CENTER_FRACTION
  side = tf.maximum(tf.cast(tf.round(side), tf.int32), 1)
  return tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])


def _whole(shape):
  return tf.stack([0, 0, shape[0], shape[1]])


def _decode_crop(recipe: Recipe, source, image, crop_of):
  """uint8 `[size, size, C]` of a crop; `crop_of`: shape → (top, left, height, width)."""
  size = recipe.image_size
  if crop_of is _whole and source.image_shape and source.image_shape[:2] == (size, size):
    return image
  if source.image_shape is not None:
    crop = _crop_decoded(image, crop_of)
    channels = source.image_shape[-1]
  else:
    channels = len(recipe.channel_mean)
    crop = tf.cond(
      tf.io.is_jpeg(image),
      # Decodes the blocks of the crop alone.
      lambda: tf.io.decode_and_crop_jpeg(
        image, crop_of(tf.io.extract_jpeg_shape(image)), channels=channels
      ),
      lambda: _crop_decoded(
        tf.io.decode_image(image, channels=channels, expand_animations=False), crop_of
      ),
    )
  resized = tf.image.resize(crop, [size, size])
  resized = tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
  resized.set_shape([size, size, channels])
  return resized


def _crop_decoded(image, crop_of):
  top, left, height, width = tf.unstack(crop_of(tf.shape(image)))
  return image[top : top + height, left : left + width]
