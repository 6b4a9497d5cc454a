"""From what a source stores to images of the recipe's size, a plan at a time.

A plan is a number of successive examples. One thread decodes the JPEGs of a plan one after another,
which saves a call of a function, and passing on images between threads, for each.
"""

import functools

import tensorflow as tf

from tf_largebatch.data import augmentation, sources
from tf_largebatch.recipe import Recipe

# How many successive examples are tried, from the one that cannot be read.
REPLACEMENTS = 8
# Decodes to the same pixels as Pillow. libjpeg's fast DCT, TensorFlow's default, is off by one grey
# level and saves nothing, because Huffman decoding takes most of the time.
JPEG_DECODING = {"dct_method": "INTEGER_ACCURATE", "fancy_upscaling": True}


def array_loader(recipe: Recipe, source, transform, size: int):
  """Returns the function that transforms the images of a plan at once; all share one shape.

  Args:
    recipe, source, transform, size: as for `image_loader`.
  """

  def load_plan(ids, draws, stored):
    images, labels = stored
    crop_draws, draws = draws
    top, left, height, width = transform.crop(source.image_shape, crop_draws)
    images = augmentation.resize(recipe, images[:, top : top + height, left : left + width])
    if transform.finish is not None:
      images = transform.finish(recipe, images, draws)
    return ids, images, labels, tf.ones([size], tf.bool)

  return load_plan


def image_loader(recipe: Recipe, source, transform, size: int, on_bad_example):
  """Returns the function that decodes and transforms the images of a plan one after another.

  Args:
    recipe, source, on_bad_example: as in `input_pipeline.train_dataset`.
    transform: an `augmentation.Transform`.
    size: examples in a plan.

  Returns:
    A function from (ids int64 `[size]`, the result of `Transform.split_draws`, that of the source's
    `read`) to (ids, images uint8 `[size, H, W, C]`, labels int32 `[size]`, read bool `[size]`).
  """
  channels = len(recipe.channel_mean)

  def load_image(stored, draws):
    image, label = source.parse(stored) if source.image_shape is None else stored
    crop_draws, draws = draws
    image = decode_and_crop(image, lambda shape: transform.crop(shape, crop_draws), channels)
    images = augmentation.resize(recipe, tf.expand_dims(image, 0))
    return transform.finish_one(recipe, images, draws), label

  def load(index, draws, stored):
    return index, *load_image(stored, draws), True

  # Decoded images that are held in memory cannot be unreadable.
  if on_bad_example is not None and source.image_shape is None:
    load = functools.partial(_load_or_replace, recipe, source, load_image, on_bad_example)

  def load_each(*plan):
    images = tf.data.Dataset.from_tensor_slices(plan).map(load)
    return images.batch(size, drop_remainder=True).get_single_element()

  def load_jpegs(ids, draws, encoded, labels):
    images = _decode_jpegs(recipe, transform, size, draws, encoded)
    return ids, images, labels, tf.ones([size], tf.bool)

  def load_or_fail(ids, draws, stored):
    encoded, labels = source.parse(stored)
    return tf.cond(
      _all_jpegs(encoded),
      lambda: load_jpegs(ids, draws, encoded, labels),
      lambda: load_each(ids, draws, stored),
    )

  def load_good_jpegs(ids, draws, stored):
    encoded, labels = source.parse(stored)
    # Otherwise, libjpeg would print a line about each image of another format.
    with tf.control_dependencies([tf.debugging.Assert(_all_jpegs(encoded), ["not JPEGs"])]):
      encoded = tf.identity(encoded)
    return load_jpegs(ids, draws, encoded, require_class(labels, source))

  def load_or_skip(*plan):
    # A graph has no `try`, but a data set can skip the elements that fail.
    plans = tf.data.Dataset.from_tensors(plan)
    attempts = plans.map(load_good_jpegs).ignore_errors().concatenate(plans.map(load_each))
    return attempts.take(1).get_single_element()

  if source.image_shape is not None:
    return load_each
  return load_or_fail if on_bad_example is None else load_or_skip


def _all_jpegs(encoded):
  return tf.reduce_all(tf.io.is_jpeg(encoded))


def _decode_jpegs(recipe: Recipe, transform, size: int, draws, encoded):
  """Decodes and transforms JPEGs, string `[size]`, with few operations for each of them."""
  crop_draws, draws = draws
  jpegs = tf.unstack(encoded, size)
  shapes = tf.stack([tf.io.extract_jpeg_shape(jpeg) for jpeg in jpegs])
  crop = transform.crop(tf.unstack(shapes, axis=1), crop_draws)
  windows = tf.stack([tf.broadcast_to(side, [size]) for side in crop], axis=1)
  channels, images = len(recipe.channel_mean), []
  for jpeg, window, draw in zip(jpegs, tf.unstack(windows), tf.unstack(draws), strict=True):
    # Without the dependencies, TensorFlow would pass them on to other threads.
    with tf.control_dependencies(images[-1:]):
      image = tf.io.decode_and_crop_jpeg(jpeg, window, channels=channels, **JPEG_DECODING)
    image = augmentation.resize(recipe, tf.expand_dims(image, 0))
    images.append(transform.finish_one(recipe, image, draw))
  return tf.stack(images)


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
    return index, image, require_class(label, source), number == 0

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


def require_class(labels, source):
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
