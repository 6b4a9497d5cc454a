"""Readers of the TFRecords: from a task to an endless iterator of batches (images, labels)."""

import functools
from collections.abc import Iterator
from unittest import mock

import numpy as np

from tf_largebatch.recipe import Recipe
from tools.benchmark.readers.task import AREA, ASPECT, BATCH, CROP_ATTEMPTS, MEAN, SIDE, STD, Task

# The Model Garden's settings.
_SHUFFLE_BUFFER = 10_000  # In records.
_INTERLEAVED_SHARDS = 10


def read_ours(task: Task, on_bad_example=None) -> Iterator:
  """This package's input, as a training run calls it."""
  from tf_largebatch.data import input_pipeline, sources

  recipe = Recipe(
    dataset=task.dataset,
    train_split=task.split,
    image_size=SIDE,
    augmentation="area_crop",
    channel_mean=MEAN,
    channel_std=STD,
    workers=1,
    per_worker_batch_size=BATCH,
  )
  source = sources.open_source(task.dataset, task.split, task.data_dir)
  return iter(
    input_pipeline.train_dataset(
      recipe,
      source,
      first_worker=0,
      num_workers=1,
      workers_per_replica=1,
      on_bad_example=on_bad_example,
    )
  )


def read_ours_and_skip(task: Task) -> Iterator:
  """The same with `--bad_examples=skip`."""
  return read_ours(task, on_bad_example=print)


def read_ours_in_order(task: Task) -> Iterator:
  """The same without the exact shuffle."""
  from tf_largebatch.data import shuffle

  def example_id(recipe, train_examples, epoch, position):
    return position

  with mock.patch.object(shuffle, "example_id", example_id):
    return read_ours(task)


def read_decode_whole(task: Task) -> Iterator:
  import tensorflow as tf

  def load(record):
    jpeg, label = parse(task, record)
    image = tf.io.decode_jpeg(jpeg, channels=3, **task.decoder)
    top, left, height, width = tf.unstack(_sample_crop(tf.shape(image)))
    image = image[top : top + height, left : left + width]
    image = tf.image.resize(tf.image.random_flip_left_right(image), [SIDE, SIDE])
    return tf.cast(tf.round(image), tf.uint8), label

  dataset = shards(task).repeat().flat_map(open_shard)
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return iter(dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def read_model_garden(task: Task, normalized: bool = True) -> Iterator:
  """After the Model Garden's official/core/input_reader.py and official/vision/dataloaders."""
  import tensorflow as tf

  def load(jpeg, label):
    shape = tf.io.extract_jpeg_shape(jpeg)
    crop = tf.io.decode_and_crop_jpeg(jpeg, _sample_crop(shape), channels=3)
    # The crop is the whole image if none could be drawn; then the Model Garden takes the centre.
    image = tf.cond(
      tf.reduce_all(tf.equal(tf.shape(crop), shape)),
      lambda: tf.io.decode_and_crop_jpeg(jpeg, center_crop(shape), channels=3),
      lambda: crop,
    )
    image = tf.image.resize(tf.image.random_flip_left_right(image), [SIDE, SIDE])
    image = tf.ensure_shape(image, [SIDE, SIDE, 3])
    if normalized:
      return (image - tf.constant(MEAN)) / tf.constant(STD), tf.cast(label, tf.int32)
    return tf.cast(tf.round(image), tf.uint8), tf.cast(label, tf.int32)

  def center_crop(shape):
    size = tf.cast(shape[:2], tf.float32)
    side = tf.reduce_min(size) * 0.875
    return tf.cast(tf.concat([(size - side) / 2, [side, side]], axis=0), tf.int32)

  dataset = shards(task).shuffle(len(task.shards)).repeat()
  dataset = dataset.interleave(
    open_shard, cycle_length=_INTERLEAVED_SHARDS, num_parallel_calls=_INTERLEAVED_SHARDS
  )
  dataset = dataset.shuffle(_SHUFFLE_BUFFER)
  dataset = dataset.map(functools.partial(parse, task), num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
  return iter(dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def read_model_garden_uint8(task: Task) -> Iterator:
  return read_model_garden(task, normalized=False)


def shards(task: Task):
  """The task's shards as a tf.data data set, in order."""
  import tensorflow as tf

  names, skips, takes = zip(*task.shards, strict=True)
  return tf.data.Dataset.from_tensor_slices(
    (list(names), np.array(skips, np.int64), np.array(takes, np.int64))
  )


def open_shard(name, skip, take):
  """The records of a shard."""
  import tensorflow as tf

  return tf.data.TFRecordDataset(name).skip(skip).take(take)


def parse(task: Task, record):
  """(JPEG, label) of a record."""
  import tensorflow as tf

  image_key, label_key = task.keys
  types = {image_key: tf.string, label_key: tf.int64}
  features = {key: tf.io.FixedLenFeature([], dtype) for key, dtype in types.items()}
  example = tf.io.parse_single_example(record, features)
  return example[image_key], example[label_key]


def _sample_crop(shape):
  """(top, left, height, width) of a random crop, drawn by TensorFlow's own operation."""
  import tensorflow as tf

  begin, size, _ = tf.image.sample_distorted_bounding_box(
    shape,
    bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    min_object_covered=AREA[0],
    aspect_ratio_range=ASPECT,
    area_range=AREA,
    max_attempts=CROP_ATTEMPTS,
  )
  return tf.concat([begin[:2], size[:2]], axis=0)
