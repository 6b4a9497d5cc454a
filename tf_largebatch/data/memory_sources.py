"""Sources that hold their examples in memory."""

import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch.data.record_sources import RecordSource, read_error
from tf_largebatch.errors import UserError
from tf_largebatch.machine import free_memory


class ArraySource:
  """Decoded images: uint8 `[N, H, W, C]`, with labels `[N]`."""

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    fingerprint: str | None = None,
  ):
    self.fingerprint = fingerprint
    self.num_examples = len(images)
    self.num_classes = num_classes
    self.image_shape = tuple(images.shape[1:])
    with tf.device("cpu"):
      self._images = tf.constant(images, tf.uint8)
      self._labels = tf.constant(labels, tf.int32)

  def read(self, indices):
    return tf.gather(self._images, indices), tf.gather(self._labels, indices)


class CachedSource:
  """The encoded images of another source."""

  image_shape = None

  def __init__(self, source: RecordSource):
    """
    Raises:
      UserError: the images do not fit in memory.
      InterruptedRunError: they cannot be reached.
    """
    self.fingerprint = source.fingerprint
    self.num_examples, self.num_classes = source.num_examples, source.num_classes
    self.record, self.parse, self.describe = source.record, source.parse, source.describe
    require_memory(source.num_bytes())
    logging.info("Reading %d examples into memory.", source.num_examples)
    # In the order of the shards, the fastest order to read them in.
    dataset = tf.data.Dataset.range(source.num_examples).batch(256)
    dataset = dataset.map(source.read, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
    try:
      with tf.device("cpu"):
        self._records = dataset.batch(source.num_examples).get_single_element()
    except tf.errors.OpError as error:
      raise read_error(source, "the data set", error) from error

  def read(self, indices):
    return tf.gather(self._records, indices)


def fits_in_memory(num_bytes: int) -> bool:
  """Whether so much memory is free, with a margin for everything else."""
  return num_bytes <= 0.9 * free_memory()


def require_memory(num_bytes: int, remedy: str = "--nocache"):
  """Raises a UserError that recommends `remedy` unless so much memory is free."""
  if not fits_in_memory(num_bytes):
    raise UserError(
      f"The split needs {num_bytes / 2**30:.1f} GiB of memory, but only "
      f"{free_memory() / 2**30:.1f} GiB are free (a container's limit and ulimit -v count too); "
      f"use {remedy}."
    )
