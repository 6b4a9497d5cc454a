"""Where examples come from: a length and random access by index.

A source is any object with

    num_examples, num_classes      ints
    image_shape                    (H, W, C) where all images share it, else None
    read(index)                    int64 scalar → (image, label) in a tf.data graph: the image
                                   uint8 [H, W, C] where image_shape is known, else its encoded
                                   bytes (string scalar); the label an int32 scalar

so that any position of any permutation is read without a shuffle buffer.
"""

import dataclasses
import re
import struct

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from tf_largebatch.errors import UserError

# Splits of images of one shape are decoded once and kept, where they take less than this.
_IN_MEMORY_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class SourceDefaults:
  """What a data set brings to a recipe that does not say (pixel units, 0 to 255)."""

  image_shape: tuple[int, int, int] | None
  validation_split: str
  channel_mean: tuple[float, ...]
  channel_std: tuple[float, ...]


# Means and standard deviations of the training splits; ImageNet's are those of the paper's code
# base (fb.resnet.torch), CIFAR-10's and Fashion-MNIST's are computed from the training images.
_IMAGENET_STATISTICS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_CHANNEL_STATISTICS = {
  "cifar10": ((125.307, 122.950, 113.865), (62.993, 62.089, 66.705)),
  "fashion_mnist": ((72.940,), (90.021,)),
}


class ArraySource:
  """Examples held in memory: images uint8 `[N, H, W, C]`, labels `[N]`."""

  def __init__(self, images: np.ndarray, labels: np.ndarray, num_classes: int):
    self.num_examples = len(images)
    self.num_classes = num_classes
    self.image_shape = tuple(images.shape[1:])
    with tf.device("cpu"):
      self._images = tf.constant(images, tf.uint8)
      self._labels = tf.constant(labels, tf.int32)

  def read(self, index):
    return tf.gather(self._images, index), tf.gather(self._labels, index)


class SyntheticSource:
  """Images made from their index, for dry runs: noise around a mean that tells the class."""

  def __init__(self, num_examples: int, num_classes: int, image_shape: tuple[int, int, int]):
    self.num_examples = num_examples
    self.num_classes = num_classes
    self.image_shape = image_shape

  def read(self, index):
    label = tf.cast(index % self.num_classes, tf.int32)
    seed = tf.stack([tf.cast(label, tf.int64), tf.constant(-1, tf.int64)])
    mean = tf.random.stateless_uniform(self.image_shape[-1:], seed, 64.0, 192.0)
    seed = tf.stack([index, tf.constant(-2, tf.int64)])
    noise = tf.random.stateless_uniform(self.image_shape, seed, -64.0, 64.0)
    return tf.cast(mean + noise, tf.uint8), label


class TFRecordSource:
  """Encoded images in the TFRecord shards that TensorFlow Datasets prepared, read by offset.

  The index takes 12 bytes an example; it is made by reading the records' headers once.
  """

  image_shape = None

  def __init__(self, instructions, image_key: str, label_key: str, num_classes: int):
    """`instructions`: TensorFlow Datasets' `file_instructions` of a split."""
    self.num_classes = num_classes
    self._keys = (image_key, label_key)
    offsets, shards = [], []
    for shard, instruction in enumerate(instructions):
      take = None if instruction.take == -1 else instruction.skip + instruction.take
      found = _record_offsets(instruction.filename, take)[instruction.skip :]
      offsets.append(found)
      shards.append(np.full(len(found), shard, np.int32))
    with tf.device("cpu"):
      self._filenames = tf.constant([str(i.filename) for i in instructions])
      self._offsets = tf.constant(np.concatenate(offsets))
      self._shards = tf.constant(np.concatenate(shards))
    self.num_examples = int(self._offsets.shape[0])

  def read(self, index):
    filename = tf.gather(self._filenames, tf.gather(self._shards, index))
    # One record from its offset on: the reader checks its CRC and works on any tf.io.gfile path.
    signature = {"output_types": [tf.string], "output_shapes": [[]]}
    records = tf.raw_ops.TFRecordDatasetV2(
      filenames=tf.reshape(filename, [1]),
      compression_type="",
      buffer_size=0,
      byte_offsets=tf.reshape(tf.gather(self._offsets, index), [1]),
    )
    first = tf.raw_ops.TakeDataset(
      input_dataset=records, count=tf.constant(1, tf.int64), **signature
    )
    record = tf.raw_ops.DatasetToSingleElement(dataset=first, **signature)[0]
    image_key, label_key = self._keys
    example = tf.io.parse_single_example(
      record,
      {
        image_key: tf.io.FixedLenFeature([], tf.string),
        label_key: tf.io.FixedLenFeature([], tf.int64),
      },
    )
    return example[image_key], tf.cast(example[label_key], tf.int32)


def _record_offsets(filename, stop: int | None) -> np.ndarray:
  """Byte offset of each record of a TFRecord file, up to `stop` records."""
  offsets, offset = [], 0
  size = tf.io.gfile.stat(filename).length
  # Without a buffer where it can be: one would read on past each header, and so the whole file.
  remote = "://" in str(filename)
  with tf.io.gfile.GFile(filename, "rb") if remote else open(filename, "rb", 0) as file:
    while offset < size and (stop is None or len(offsets) < stop):
      offsets.append(offset)
      file.seek(offset)
      # A record: length (uint64), its CRC (4 bytes), the data, their CRC (4 bytes).
      (length,) = struct.unpack("<Q", file.read(8))
      offset += 16 + length
  return np.array(offsets, np.int64)


_SYNTHETIC_SPLITS = {"train": 1_281_167, "validation": 50_000}
_SYNTHETIC_CLASSES = 1000


def defaults(dataset: str, data_dir: str, validation_split: str | None = None) -> SourceDefaults:
  """What the data set says where the recipe does not.

  Raises:
    UserError: no validation split was named, and the data set has neither a validation nor a test
      split; or it is not one of image classification.
  """
  splits, shape = list(_SYNTHETIC_SPLITS), (None, None, 3)
  if dataset != "synthetic":
    info = tfds.builder(dataset, data_dir=data_dir).info
    splits, shape = list(info.splits), info.features[_keys(info)[0]].shape
  if validation_split is None:
    found = [split for split in ("validation", "test") if split in splits]
    if not found:
      raise UserError(
        f"{dataset} has no validation or test split (it has {', '.join(splits)}); name one by "
        "validation_split, or a slice of train that train_split leaves out."
      )
    validation_split = found[0]
  channels = shape[-1] or 3
  fallback = _IMAGENET_STATISTICS if channels == 3 else ((127.5,) * channels, (64.0,) * channels)
  statistics = _CHANNEL_STATISTICS.get(dataset.split("/")[0].split(":")[0], fallback)
  return SourceDefaults(None if None in shape else tuple(shape), validation_split, *statistics)


def open_source(dataset: str, split: str, data_dir: str, image_size: int | None = None):
  """Opens a split of a prepared data set (see `preparation.prepare`) or of 'synthetic'.

  Args:
    dataset: a TensorFlow Datasets name with an image and a label, or "synthetic".
    split: a split, or a slice of one such as "train[:5120]".
    data_dir: TensorFlow Datasets' data directory.
    image_size: side of the synthetic images; the others have their own.

  Raises:
    UserError: the split is missing or empty, or the set is not one of image classification.
  """
  if dataset == "synthetic":
    return _open_synthetic(split, image_size or 224)
  builder = tfds.builder(dataset, data_dir=data_dir)
  info = builder.info
  try:
    selected = info.splits[split]
  except (KeyError, ValueError, AssertionError) as error:
    raise _missing_split(dataset, split, info.splits) from error
  if selected.num_examples == 0:
    raise UserError(f"The split {split!r} of {dataset} holds no examples.")
  image_key, label_key = _keys(info)
  num_classes = info.features[label_key].num_classes
  shape = info.features[image_key].shape
  if None in shape or selected.num_examples * np.prod(shape) > _IN_MEMORY_BYTES:
    return TFRecordSource(selected.file_instructions, image_key, label_key, num_classes)
  # One file after the other: the order of the examples is that of the shards.
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  batches = builder.as_dataset(split, batch_size=1024, read_config=config)
  images, labels = [], []
  for batch in batches.as_numpy_iterator():
    images.append(batch[image_key])
    labels.append(batch[label_key])
  return ArraySource(np.concatenate(images), np.concatenate(labels), num_classes)


def _open_synthetic(split: str, image_size: int) -> SyntheticSource:
  match = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", split)
  if not match or match[1] not in _SYNTHETIC_SPLITS or match[2] == "0":
    raise _missing_split("synthetic", split, _SYNTHETIC_SPLITS)
  num_examples = min(int(match[2] or 2**63), _SYNTHETIC_SPLITS[match[1]])
  return SyntheticSource(num_examples, _SYNTHETIC_CLASSES, (image_size, image_size, 3))


def _missing_split(dataset: str, split: str, splits) -> UserError:
  return UserError(
    f"{dataset} has no split {split!r}; it has {', '.join(splits)}, and slices such as "
    f"{next(iter(splits))}[:1000]."
  )


def _keys(info) -> tuple[str, str]:
  """The features that hold the image and the label."""
  keys = info.supervised_keys
  if keys and len(keys) == 2 and all(key in info.features for key in keys):
    image, label = (info.features[key] for key in keys)
    if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
      return keys
  raise UserError(
    f"{info.name} is no image classification set: its features are {', '.join(info.features)}, "
    "and one image with one label is needed."
  )
