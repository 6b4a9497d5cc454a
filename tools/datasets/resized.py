"""Makes a data set of the same examples with smaller images, which take less time to decode.

Its name says what it is: `imagenet2012_shorter480` has the examples of `imagenet2012` in the same
order, and images whose shorter side is at most 480 pixels. To train on it is another recipe,
because its pixels differ.
"""

import collections
import io
import re
from collections.abc import Callable, Iterator

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from tf_largebatch.data import preparation
from tf_largebatch.data.features import image_and_label
from tf_largebatch.data.image_loading import decode_and_crop
from tf_largebatch.data.sources import open_source
from tf_largebatch.errors import UserError
from tools.datasets.image_checks import in_order

_QUALITY = 95  # Of the JPEGs that are written.


def prepare(dataset: str, shorter_side: int, data_dir: str, file_format: str | None) -> str:
  """Makes sure that the resized data set is prepared, and returns its name.

  Args:
    dataset: a prepared data set, as `name`, `name/config` or `name/config:version`.
    shorter_side: the most pixels that the shorter side of an image keeps.
    data_dir: TFDS's data directory, with `dataset`.
    file_format: "tfrecord" or "array_record"; None: TFDS's default.

  Raises:
    UserError: `dataset` is not one of image classification, or all its images have one size and
      none would be resized; `data_dir` cannot be written.
  """
  info = tfds.builder(dataset, data_dir=data_dir).info
  shape = info.features[image_and_label(info)[0]].shape
  if None not in shape:
    raise UserError(
      f"All images of {dataset} are {shape[0]}×{shape[1]} pixels; --resize_shorter_side is for "
      "photographs of various sizes."
    )
  base = info.full_name.rsplit("/", 1)[0]  # Without the version.
  name = f"{re.sub('[^a-z0-9_]', '_', base.lower())}_shorter{shorter_side}"

  def resized_examples(split: str) -> Iterator[tuple[bytes, int]]:
    return _examples(open_source(dataset, split, data_dir), split, shorter_side, shape[-1])

  builder_class = _make_builder_class(name, info, shorter_side, resized_examples)
  preparation.prepare_with(builder_class, data_dir, file_format)
  return name


def shrink(content: bytes, shorter_side: int, channels: int) -> bytes:
  """Returns the image file with at most `shorter_side` pixels on its shorter side.

  A file is returned unchanged if its image is small enough, or if it cannot be decoded, which
  remains for the trainer to report. Others are resized (bicubic, antialiased) and encoded, JPEGs as
  JPEG of quality 95 with their own chroma subsampling, or 4:2:0 in place of 4:2:2, and all others
  as PNG.
  """
  try:
    with Image.open(io.BytesIO(content)) as header:
      width, height = header.size
      is_jpeg = header.format in ("JPEG", "MPO")  # MPO: a JPEG that more pictures follow.
      subsampled = is_jpeg and JpegImagePlugin.get_sampling(header) in (1, 2)
  except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
    return content
  if min(width, height) <= shorter_side:
    return content
  try:
    # As the trainer decodes.
    pixels = decode_and_crop(
      tf.constant(content), lambda shape: [0, 0, shape[0], shape[1]], channels
    )
  except tf.errors.InvalidArgumentError:
    return content
  scale = shorter_side / min(width, height)
  size = [round(height * scale), round(width * scale)]
  resized = tf.image.resize(pixels, size, tf.image.ResizeMethod.BICUBIC, antialias=True)
  pixels = tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
  if is_jpeg:
    encoded = tf.io.encode_jpeg(pixels, quality=_QUALITY, chroma_downsampling=subsampled)
  else:
    encoded = tf.io.encode_png(pixels)
  return encoded.numpy()


def _make_builder_class(
  dataset: str,
  info: tfds.core.DatasetInfo,
  shorter_side: int,
  examples: Callable[[str], Iterator[tuple[bytes, int]]],
) -> type[tfds.core.DatasetBuilder]:
  image, label = image_and_label(info)

  class ResizedImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images and labels in the order of the original."""

    name = dataset
    VERSION = tfds.core.Version(str(info.version))

    def _info(self):
      features = {image: tfds.features.Image(shape=info.features[image].shape)}
      return tfds.core.DatasetInfo(
        builder=self,
        description=f"{info.full_name} with images of at most {shorter_side} pixels on the shorter "
        f"side; JPEG quality {_QUALITY}.",
        features=tfds.features.FeaturesDict(features | {label: info.features[label]}),
        supervised_keys=(image, label),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in info.splits}

    def _generate_examples(self, split):
      for number, (content, number_of_class) in enumerate(examples(split)):
        yield number, {image: content, label: number_of_class}

  return ResizedImages


def _examples(source, split: str, shorter_side: int, channels: int) -> Iterator[tuple[bytes, int]]:
  """Yields (resized image file, label) of each example, then logs how many were resized."""

  def resize(index: int) -> tuple[bytes, bytes, int]:
    content, label = source.parse(source.record(index))
    before = content.numpy()
    return before, shrink(before, shorter_side, channels), int(label)

  counts = collections.Counter()
  for before, after, label in in_order(resize, range(source.num_examples)):
    counts.update(resized=after is not before, before=len(before), after=len(after))
    yield after, label
  logging.info(
    "%s: resized %d of %d images; %.1f%% of the bytes remain.",
    *(split, counts["resized"], source.num_examples),
    100 * counts["after"] / counts["before"],
  )
