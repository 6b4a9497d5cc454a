"""Where examples come from: a length, and random access by index.

A source is any object with

    num_examples, num_classes      ints
    image_shape                    (H, W, C) if all images share it, else None
    fingerprint                    text that identifies the examples and their order, or None
    read(indices)                  int64 `[B]` → in a tf.data graph, if image_shape is known:
                                   (images uint8 `[B, H, W, C]`, labels int32 `[B]`), else:
                                   records, string `[B]`, empty where one cannot be read
    parse(records)                 if image_shape is not known: strings of any shape → (encoded
                                   images, strings, and labels, int32, of this shape)

so that the examples at any positions of any permutation can be read without a shuffle buffer.
"""

import dataclasses
import hashlib
import re

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from tf_largebatch.data.features import image_and_label
from tf_largebatch.data.memory_sources import (
  ArraySource,
  CachedSource,
  fits_in_memory,
  require_memory,
)
from tf_largebatch.data.read_errors import FAULTS, unreachable
from tf_largebatch.data.record_sources import (
  ArrayRecordSource,
  RecordSource,
  TFRecordSource,
  read_error,
)
from tf_largebatch.data.synthetic import SyntheticSource
from tf_largebatch.errors import UserError, summary
from tf_largebatch.machine import usable_cores

# Data sets that are computed: name → class with SPLITS and CHANNELS, made from a number of examples
# and an image size. All other names are those of TensorFlow Datasets.
GENERATED = {"synthetic": SyntheticSource}

# TensorFlow Datasets' file formats: name → class of record source.
_RECORD_SOURCES = {"tfrecord": TFRecordSource, "array_record": ArrayRecordSource}

# A split whose images share one shape is decoded once and kept if it takes at most this and fits.
_IN_MEMORY_BYTES = 2 * 2**30
# Begins the fingerprint of such a split, which is of its pixels and labels: prepared on another
# machine, the same PNGs can have other bytes.
PIXELS = "pixels:"


@dataclasses.dataclass(frozen=True)
class SourceDefaults:
  """What a data set supplies where the recipe leaves a field out (pixel values from 0 to 255)."""

  image_shape: tuple[int, int, int] | None
  validation_split: str
  channel_mean: tuple[float, ...]
  channel_std: tuple[float, ...]


# Means and standard deviations of the training splits. ImageNet's are those of the paper's code
# base (fb.resnet.torch); CIFAR-10's and Fashion-MNIST's are computed from the training images.
_IMAGENET_STATISTICS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_CHANNEL_STATISTICS = {
  "cifar10": ((125.307, 122.950, 113.865), (62.993, 62.089, 66.705)),
  "fashion_mnist": ((72.940,), (90.021,)),
}


def defaults(dataset: str, data_dir: str, validation_split: str | None = None) -> SourceDefaults:
  """Returns what the data set supplies where the recipe leaves a field out.

  Raises:
    UserError: no validation split is named and the data set has neither a validation nor a test
      split, or the data set is not one of image classification.
  """
  if dataset in GENERATED:
    splits, shape = list(GENERATED[dataset].SPLITS), (None, None, GENERATED[dataset].CHANNELS)
  else:
    info = tfds.builder(dataset, data_dir=data_dir).info
    splits, shape = list(info.splits), info.features[image_and_label(info)[0]].shape
  if validation_split is None:
    found = [split for split in ("validation", "test") if split in splits]
    if not found:
      raise UserError(
        f"{dataset} has no validation or test split (it has {', '.join(splits)}); name one with "
        "validation_split, or a slice of train that train_split leaves out."
      )
    validation_split = found[0]
  channels = shape[-1] or 3
  fallback = _IMAGENET_STATISTICS if channels == 3 else ((127.5,) * channels, (64.0,) * channels)
  statistics = _CHANNEL_STATISTICS.get(dataset.split("/")[0].split(":")[0], fallback)
  return SourceDefaults(None if None in shape else tuple(shape), validation_split, *statistics)


def identify(dataset: str, train_split: str, validation_split: str, data_dir: str) -> dict:
  """Returns what distinguishes data of the same name: the version and the numbers of examples.

  Raises:
    UserError: a split is missing or empty.
  """
  if dataset in GENERATED:  # The names of the splits determine the examples.
    return {"name": dataset}
  info = tfds.builder(dataset, data_dir=data_dir).info
  return {
    "name": info.full_name,
    "train_examples": _select(info, dataset, train_split).num_examples,
    "validation_examples": _select(info, dataset, validation_split).num_examples,
  }


def open_source(
  dataset: str,
  split: str,
  data_dir: str,
  image_size: int | None = None,
  *,
  index_dir: str | None = None,
  cache: bool = False,
):
  """Opens a split of a generated data set or of a prepared one (see `preparation.prepare`).

  Args:
    dataset: a key of `GENERATED`, or the name of a TensorFlow Datasets image classification set.
    split: a split, or a slice of one such as "train[:5120]".
    data_dir: TensorFlow Datasets' data directory.
    image_size: side of generated images in pixels, 224 if None; other images have their own sizes.
    index_dir: where the offsets of the records are kept between runs; None: nowhere.
    cache: hold the split in memory, whatever its size.

  Raises:
    UserError: the split is missing or empty, the data set is not one of image classification, its
      shards are missing or damaged, or the cache does not fit in memory.
    InterruptedRunError: the data could not be reached for a moment, or the process has too many
      open files or too little memory.
  """
  if dataset in GENERATED:
    source = GENERATED[dataset]
    return source(_count_generated(dataset, split, source.SPLITS), image_size or 224)
  info = tfds.builder(dataset, data_dir=data_dir).info
  selected = _select(info, dataset, split)
  shape = info.features[image_and_label(info)[0]].shape
  if None in shape:
    records = _open_records(info, selected, index_dir)
    return CachedSource(records) if cache else records
  num_bytes = selected.num_examples * int(np.prod(shape))
  needed = 3 * num_bytes  # In batches, in one array and as a tensor.
  if cache:
    require_memory(needed)
  elif num_bytes > _IN_MEMORY_BYTES or not fits_in_memory(needed):
    return _open_records(info, selected, index_dir)
  return _decode_all(_open_records(info, selected, index_dir))


def fault(source, index: int, channels: int = 0) -> str | None:
  """Returns what is wrong with an example and where it is stored, on one line, or None.

  Args:
    source: any source.
    index: the example's index.
    channels: number of channels to decode to; 0: as many as the image has.

  Raises:
    InterruptedRunError: the example cannot be reached, or memory is exhausted, which says nothing
      about the example.
  """
  if source.image_shape is not None:
    return None
  try:
    image, label = source.parse(source.record(index))
    if tf.io.is_jpeg(image):
      tf.io.extract_jpeg_shape(image)  # The first part that the input pipeline reads.
    tf.io.decode_image(image, channels, expand_animations=False)
    if 0 <= label < source.num_classes:
      return None
    reason = f"its label is {int(label)}, but there are {source.num_classes} classes"
  except UnicodeDecodeError:
    reason = "its record is not a tf.train.Example"
  except (MemoryError, tf.errors.ResourceExhaustedError) as error:
    raise unreachable(source.describe(index), error) from error
  except FAULTS as error:
    reason = summary(error)
  return f"{source.describe(index)}: {reason}"


def _count_generated(dataset: str, split: str, splits: dict[str, int]) -> int:
  """Returns the number of examples of a split of a generated data set, or of its first ones."""
  match = re.fullmatch(r"(\w+)(?:\[:0*([1-9][0-9]{0,17})\])?", split)
  if not match or match[1] not in splits:
    raise _missing_split(dataset, split, splits)
  return min(int(match[2] or 2**63), splits[match[1]])


def _select(info, dataset: str, split: str):
  """Returns TensorFlow Datasets' split, or slice of one.

  Raises:
    UserError: the split is missing or empty, or a slice ends before it begins, in which case
      TensorFlow Datasets counts too many or too few examples.
  """
  try:
    selected = info.splits[split]
    slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
  except (KeyError, ValueError, AssertionError, NotImplementedError) as error:
    raise _missing_split(dataset, split, info.splits) from error
  if selected.num_examples == 0:
    raise UserError(f"The split {split!r} of {dataset} has no examples; name another.")
  for part in slices:
    size = info.splits[part.splitname].num_examples
    first, end = part.from_ or 0, size if part.to is None else part.to
    if first >= end:
      raise UserError(
        f"The split {split!r} of {dataset} contains the slice of {part.splitname} from example "
        f"{first} to {end}, which is empty; name a slice that ends after its beginning."
      )
  return selected


def _missing_split(dataset: str, split: str, splits) -> UserError:
  if not splits:
    return UserError(
      f"{dataset} has no splits at all: the data set in its directory is incomplete; move it away "
      "and prepare it again."
    )
  return UserError(
    f"{dataset} has no split {split!r}; it has {', '.join(splits)}, and slices such as "
    f"{next(iter(splits))}[:1000]."
  )


def _open_records(info, selected, index_dir: str | None) -> RecordSource:
  """Opens the records of a split in whichever format TensorFlow Datasets wrote them."""
  source = _RECORD_SOURCES.get(info.file_format.value)
  if source is None:
    raise UserError(
      f"{info.name} was prepared as {info.file_format.value}; prepare it as "
      f"{' or '.join(_RECORD_SOURCES)}."
    )
  image_key, label_key = image_and_label(info)
  num_classes = info.features[label_key].num_classes
  return source(selected.file_instructions, image_key, label_key, num_classes, index_dir)


def _decode_all(records: RecordSource) -> ArraySource:
  """Decodes all images of a split, which share one shape."""

  def load(record):
    image, label = records.parse(record)
    return tf.io.decode_image(image, expand_animations=False), label

  def load_batch(indices):
    # One call of a data set's function for each small image would take longer than the image.
    return tf.map_fn(
      load,
      records.read(indices),
      fn_output_signature=(tf.uint8, tf.int32),
      parallel_iterations=1,
    )

  dataset = tf.data.Dataset.range(records.num_examples).batch(1024)
  load_batch = tf.autograph.experimental.do_not_convert(load_batch)
  dataset = dataset.map(load_batch, num_parallel_calls=usable_cores())
  try:
    batches = list(dataset.as_numpy_iterator())
    failure = None
  except FAULTS as error:
    batches, failure = [], error
  if failure or any(
    np.any((labels < 0) | (labels >= records.num_classes)) for _, labels in batches
  ):
    faults = (fault(records, index) for index in range(records.num_examples))
    found = next(filter(None, faults), None)
    if found is None:
      raise read_error(records, "the data set", failure) from failure
    raise UserError(f"The data set is damaged: {found}; prepare it again.")
  images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  digest = hashlib.blake2b(images, digest_size=8)
  digest.update(labels)
  return ArraySource(images, labels, records.num_classes, PIXELS + digest.hexdigest())
