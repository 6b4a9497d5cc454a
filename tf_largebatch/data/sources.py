"""Where examples come from: a length and random access by index.

A source is any object with

    num_examples, num_classes      ints
    image_shape                    (H, W, C) where all images share it, else None
    read(indices)                  int64 `[B]` → in a tf.data graph, where image_shape is known:
                                   (images uint8 `[B, H, W, C]`, labels int32 `[B]`), else:
                                   records, string `[B]`, empty where one cannot be read
    parse(record)                  where image_shape is not known: string scalar → (encoded image,
                                   string scalar; label, int32 scalar)

so that any position of any permutation is read without a shuffle buffer.
"""

import bisect
import dataclasses
import os
import re
import resource
import textwrap

import numpy as np
import psutil
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader

from tf_largebatch.data.record_index import record_data, record_offsets
from tf_largebatch.errors import UserError

# What reading and decoding an example may raise. TensorFlow quotes a record that it cannot parse in
# its message, which is then no text (UnicodeDecodeError, a ValueError).
FAULTS = (tf.errors.OpError, ValueError, OSError, RuntimeError)

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

  def read(self, indices):
    return tf.gather(self._images, indices), tf.gather(self._labels, indices)


class SyntheticSource:
  """Images made from their index, for dry runs: noise around a mean that tells the class."""

  # The noise of an image is the sum of two of these, modulo its range: as even as each of them,
  # and another for each of 61 · 59 successive images.
  _NOISES = (61, 59)

  def __init__(self, num_examples: int, num_classes: int, image_shape: tuple[int, int, int]):
    self.num_examples = num_examples
    self.num_classes = num_classes
    self.image_shape = image_shape
    with tf.device("cpu"):
      self._means, *self._noises = (
        tf.cast(tf.random.stateless_uniform(shape, [0, seed], 0, 128, tf.int32), tf.uint8)
        for seed, shape in enumerate(
          [(num_classes, 1, 1, image_shape[-1]), *((n, *image_shape) for n in self._NOISES)]
        )
      )

  def read(self, indices):
    labels = indices % self.num_classes
    first, second = (
      tf.gather(noise, indices % count)
      for noise, count in zip(self._noises, self._NOISES, strict=True)
    )
    images = tf.gather(self._means, labels) + tf.bitwise.bitwise_and(first + second, 127)
    return images, tf.cast(labels, tf.int32)


class _RecordSource:
  """Encoded images in the records of a data set's shards."""

  image_shape = None

  def __init__(self, instructions, image_key: str, label_key: str, num_classes: int):
    """`instructions`: TensorFlow Datasets' `file_instructions` of a split."""
    self.num_classes = num_classes
    self._keys = (image_key, label_key)
    self._instructions = instructions
    self._filenames = [os.fspath(i.filename) for i in instructions]
    # Where the examples of each shard end.
    self._ends = np.cumsum([i.take for i in instructions]).tolist()
    self.num_examples = self._ends[-1]

  def record(self, index: int) -> bytes:
    """The record of an example.

    Raises:
      ValueError, OSError, tf.errors.OpError: it is damaged, or out of reach.
    """
    raise NotImplementedError

  def read(self, indices):
    def records_of(indices):
      records = np.empty(len(indices), object)
      for place, index in enumerate(indices.tolist()):
        try:
          records[place] = self.record(index)
        except FAULTS:  # Which `fault` will tell whoever wants to use it.
          records[place] = b""
      return records

    # All that Python does, for many at once, is to ask the system for bytes and a library for CRCs.
    records = tf.numpy_function(records_of, [indices], tf.string, stateful=False)
    return tf.ensure_shape(records, indices.shape)

  def parse(self, record):
    image_key, label_key = self._keys
    example = tf.io.parse_single_example(
      record,
      {
        image_key: tf.io.FixedLenFeature([], tf.string),
        label_key: tf.io.FixedLenFeature([], tf.int64),
      },
    )
    return example[image_key], tf.cast(example[label_key], tf.int32)

  def num_bytes(self) -> int:
    """What the examples take on disk, about."""
    return sum(
      tf.io.gfile.stat(name).length * i.take // max(i.examples_in_shard, 1)
      for name, i in zip(self._filenames, self._instructions, strict=True)
    )

  def _locate(self, index: int) -> tuple[int, int]:
    """(shard, record in it) of an example."""
    shard = bisect.bisect_right(self._ends, index)
    instruction = self._instructions[shard]
    return shard, index - self._ends[shard] + instruction.take + instruction.skip


class TFRecordSource(_RecordSource):
  """Encoded images in TFRecord shards, read by offset; 8 bytes of memory an example."""

  def __init__(
    self, instructions, image_key: str, label_key: str, num_classes: int, index_dir: str | None
  ):
    """`index_dir`: see `record_index.record_offsets`, which says what is raised; else as above."""
    super().__init__(instructions, image_key, label_key, num_classes)
    counts = [instruction.examples_in_shard for instruction in instructions]
    self._offsets = record_offsets(self._filenames, counts, index_dir)

  def record(self, index: int) -> bytes:
    shard, position = self._locate(index)
    begin, end = self._offsets[shard][position : position + 2].tolist()
    return record_data(self._read_range(shard, begin, end - begin))

  def _read_range(self, shard: int, offset: int, size: int) -> bytes:
    filename = self._filenames[shard]
    if "://" in filename:
      with tf.io.gfile.GFile(filename, "rb") as file:
        file.seek(offset)
        return file.read(size)
    # Not kept open: data sets have more shards than a process may have open files.
    with open(filename, "rb", 0) as file:
      return os.pread(file.fileno(), size, offset)

  def describe(self, index: int) -> str:
    """Words for where an example lies."""
    shard, position = self._locate(index)
    offset = self._offsets[shard][position]
    return f"example {index} (offset {offset} of {self._filenames[shard]})"


class ArrayRecordSource(_RecordSource):
  """Encoded images in ArrayRecord shards, which know where their records are."""

  def __init__(self, instructions, image_key: str, label_key: str, num_classes: int):
    """As above.

    Raises:
      UserError: a shard is missing, damaged or has another number of records.
    """
    super().__init__(instructions, image_key, label_key, num_classes)
    # Each reader has a file open, which a process may have no more than 1024 of by default.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    self._readers = []
    for filename, instruction in zip(self._filenames, instructions, strict=True):
      # Without read-ahead, for the next record will be elsewhere; where the file is missing or cut
      # off the reader finds no records.
      reader = ArrayRecordReader(filename, "readahead_buffer_size:0,max_parallelism:0")
      found = reader.num_records() if os.path.exists(filename) else 0
      if found != instruction.examples_in_shard:
        raise UserError(
          f"{filename} has {found} records, but its data set was prepared with "
          f"{instruction.examples_in_shard} there; prepare it again."
        )
      self._readers.append(reader)

  def record(self, index: int) -> bytes:
    shard, position = self._locate(index)
    return self._readers[shard].read([position])[0]

  def describe(self, index: int) -> str:
    """Words for where an example lies."""
    shard, position = self._locate(index)
    return f"example {index} (record {position} of {self._filenames[shard]})"


class CachedSource:
  """The encoded images of another source, held in memory."""

  image_shape = None

  def __init__(self, source: _RecordSource):
    """
    Raises:
      UserError: memory does not hold them all.
    """
    self.num_examples, self.num_classes = source.num_examples, source.num_classes
    self.record, self.parse, self.describe = source.record, source.parse, source.describe
    _require_memory(source.num_bytes())
    logging.info("Reading %d examples into memory.", source.num_examples)
    # In the shards' order, which is the fastest there is.
    dataset = tf.data.Dataset.range(source.num_examples).batch(256)
    dataset = dataset.map(source.read, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
    with tf.device("cpu"):
      self._records = dataset.batch(source.num_examples).get_single_element()

  def read(self, indices):
    return tf.gather(self._records, indices)


def fault(source, index: int, channels: int = 0) -> str | None:
  """What is wrong with an example, in one line that says where it lies; None: nothing.

  Args:
    source: any.
    index: of the example.
    channels: that it is decoded to; 0: its own.
  """
  if source.image_shape is not None:
    return None
  try:
    image, label = source.parse(source.record(index))
    tf.io.decode_image(image, channels, expand_animations=False)
    if 0 <= label < source.num_classes:
      return None
    reason = f"its label is {int(label)}, but there are {source.num_classes} classes"
  except FAULTS as error:
    reason = _first_line(error)
  return f"{source.describe(index)}: {reason}"


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


def identify(dataset: str, train_split: str, validation_split: str, data_dir: str) -> dict:
  """What tells data from others of the same name: version and numbers of examples.

  Raises:
    UserError: a split is missing or empty.
  """
  if dataset == "synthetic":  # Its splits tell all.
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
  """Opens a split of a prepared data set (see `preparation.prepare`) or of 'synthetic'.

  Args:
    dataset: a TensorFlow Datasets name with an image and a label, or "synthetic".
    split: a split, or a slice of one such as "train[:5120]".
    data_dir: TensorFlow Datasets' data directory.
    image_size: side of the synthetic images; the others have their own.
    index_dir: where the places of the records are kept from run to run; None: nowhere.
    cache: hold the split in memory, whatever its size.

  Raises:
    UserError: the split is missing or empty, the set is not one of image classification, its shards
      are missing or damaged, or the cache does not fit memory.
  """
  if dataset == "synthetic":
    return _open_synthetic(split, image_size or 224)
  info = tfds.builder(dataset, data_dir=data_dir).info
  selected = _select(info, dataset, split)
  shape = info.features[_keys(info)[0]].shape
  if None in shape:
    records = _open_records(info, selected, index_dir)
    return CachedSource(records) if cache else records
  num_bytes = selected.num_examples * int(np.prod(shape))
  if num_bytes > _IN_MEMORY_BYTES:
    if not cache:
      return _open_records(info, selected, index_dir)
    _require_memory(3 * num_bytes)  # As they come, in one array, and as a tensor.
  return _read_all(_open_records(info, selected, index_dir))


def _select(info, dataset: str, split: str):
  """TensorFlow Datasets' split, or slice of one.

  Raises:
    UserError: it is missing or empty, or a slice that runs backwards, for which TensorFlow Datasets
      counts too many or too few.
  """
  try:
    selected = info.splits[split]
    slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits)
  except (KeyError, ValueError, AssertionError, NotImplementedError) as error:
    raise _missing_split(dataset, split, info.splits) from error
  if selected.num_examples == 0:
    raise UserError(f"The split {split!r} of {dataset} holds no examples.")
  for part in slices:
    size = info.splits[part.splitname].num_examples
    first, end = part.from_ or 0, size if part.to is None else part.to
    if first >= end:
      raise UserError(
        f"The split {split!r} of {dataset} has a slice from example {first} to {end} of "
        f"{part.splitname}, which holds none; name one that ends behind its beginning."
      )
  return selected


def _read_all(records: _RecordSource) -> ArraySource:
  """Decodes images of one shape once and for all."""

  def load(record):
    image, label = records.parse(record)
    return tf.io.decode_image(image, expand_animations=False), label

  dataset = tf.data.Dataset.range(records.num_examples).batch(256).map(records.read).unbatch()
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(1024)
  try:
    batches = list(dataset.as_numpy_iterator())
    found = None
  except FAULTS as error:
    batches, found = [], _first_line(error)
  if found or any(np.any((labels < 0) | (labels >= records.num_classes)) for _, labels in batches):
    faults = (fault(records, index) for index in range(records.num_examples))
    raise UserError(
      f"The data set is damaged: {next(filter(None, faults), found)}; prepare it again."
    )
  images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  return ArraySource(images, labels, records.num_classes)


def _open_records(info, selected, index_dir: str | None) -> _RecordSource:
  """The records of a split, in whichever format TensorFlow Datasets wrote them."""
  image_key, label_key = _keys(info)
  arguments = (selected.file_instructions, image_key, label_key)
  num_classes = info.features[label_key].num_classes
  if info.file_format == tfds.core.FileFormat.TFRECORD:
    return TFRecordSource(*arguments, num_classes, index_dir)
  if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
    return ArrayRecordSource(*arguments, num_classes)
  raise UserError(
    f"{info.name} was prepared as {info.file_format.value}; tfrecord or array_record would do."
  )


def _require_memory(num_bytes: int, would_do: str = "--nocache"):
  free = psutil.virtual_memory().available
  if num_bytes > 0.9 * free:
    raise UserError(
      f"The split takes {num_bytes / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are "
      f"free; {would_do} would do."
    )


def _first_line(error: Exception) -> str:
  """What TensorFlow says, without the names of its ops."""
  if isinstance(error, UnicodeDecodeError):
    return "its record is no tf.train.Example"
  text = re.sub(r"\{\{.*?\}\}|\[Op:.*|\[\[.*", "", (str(error) or type(error).__name__))
  return textwrap.shorten(text, 300, placeholder=" …").rstrip(" .")


def _open_synthetic(split: str, image_size: int) -> SyntheticSource:
  match = re.fullmatch(r"(\w+)(?:\[:0*([1-9][0-9]{0,17})\])?", split)
  if not match or match[1] not in _SYNTHETIC_SPLITS:
    raise _missing_split("synthetic", split, _SYNTHETIC_SPLITS)
  num_examples = min(int(match[2] or 2**63), _SYNTHETIC_SPLITS[match[1]])
  pixels = sum(SyntheticSource._NOISES) * image_size**2 * 3
  _require_memory(5 * pixels, f"an image_size below {image_size}")  # As integers and as bytes.
  return SyntheticSource(num_examples, _SYNTHETIC_CLASSES, (image_size, image_size, 3))


def _missing_split(dataset: str, split: str, splits) -> UserError:
  if not splits:
    return UserError(
      f"{dataset} has no splits at all: what lies in its directory was not prepared to the end; "
      "move it away and prepare it again."
    )
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
