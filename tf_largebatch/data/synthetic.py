"""Images computed from their index, for dry runs: the data set 'synthetic'."""

from typing import ClassVar

import tensorflow as tf

from tf_largebatch.data.memory_sources import require_memory

# The noise of an image is the sum of two of these many, modulo its range: distributed as evenly as
# each of them, and different for each of 61 · 59 successive images.
_NOISES = (61, 59)


class SyntheticSource:
  """RGB images of noise around a mean that identifies the class."""

  SPLITS: ClassVar[dict[str, int]] = {"train": 1_281_167, "validation": 50_000}  # ImageNet's.
  CHANNELS = 3
  num_classes = 1000
  fingerprint = None  # The name determines the examples.

  def __init__(self, num_examples: int, image_size: int):
    """
    Args:
      num_examples: length.
      image_size: side of the square images in pixels.

    Raises:
      UserError: the noise for images of this size does not fit in memory.
    """
    self.num_examples = num_examples
    self.image_shape = (image_size, image_size, self.CHANNELS)
    pixels = sum(_NOISES) * image_size**2 * self.CHANNELS
    require_memory(5 * pixels, f"an image_size below {image_size}")  # As integers and as bytes.
    with tf.device("cpu"):
      self._means, *self._noises = (
        tf.cast(tf.random.stateless_uniform(shape, [0, seed], 0, 128, tf.int32), tf.uint8)
        for seed, shape in enumerate(
          [(self.num_classes, 1, 1, self.CHANNELS), *((n, *self.image_shape) for n in _NOISES)]
        )
      )

  def read(self, indices):
    labels = indices % self.num_classes
    first, second = (
      tf.gather(noise, indices % count) for noise, count in zip(self._noises, _NOISES, strict=True)
    )
    images = tf.gather(self._means, labels) + tf.bitwise.bitwise_and(first + second, 127)
    return images, tf.cast(labels, tf.int32)
