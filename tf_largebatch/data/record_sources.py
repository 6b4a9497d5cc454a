"""Sources that read encoded images from the record files of a prepared data set."""

import bisect
import os
import resource

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from tf_largebatch.data.record_index import record_data, record_offsets
from tf_largebatch.errors import UserError

# What reading and decoding an example may raise. TensorFlow's message quotes a record that it
# cannot parse, and such a message may not be text (UnicodeDecodeError, a ValueError).
FAULTS = (tf.errors.OpError, ValueError, OSError, RuntimeError)


class RecordSource:
  """Encoded images in the records of a data set's shards."""

  image_shape = None

  def __init__(self, instructions, image_key: str, label_key: str, num_classes: int):
    """
    Args:
      instructions: TensorFlow Datasets' `file_instructions` of a split.
      image_key, label_key: names of the features to read.
      num_classes: number of classes.
    """
    self.num_classes = num_classes
    self._keys = (image_key, label_key)
    self._instructions = instructions
    self._filenames = [os.fspath(i.filename) for i in instructions]
    # Index after the last example of each shard.
    self._ends = np.cumsum([i.take for i in instructions]).tolist()
    self.num_examples = self._ends[-1]

  def record(self, index: int) -> bytes:
    """Returns the record of an example.

    Raises:
      ValueError, OSError, tf.errors.OpError: the record is damaged or cannot be reached.
    """
    raise NotImplementedError

  def describe(self, index: int) -> str:
    """Returns a phrase that says where an example is stored."""
    raise NotImplementedError

  def read(self, indices):
    def records_of(indices):
      records = np.empty(len(indices), object)
      for place, index in enumerate(indices.tolist()):
        try:
          records[place] = self.record(index)
        except FAULTS:  # `sources.fault` reports it if the example is used.
          records[place] = b""
      return records

    # The only work in Python: for a batch of records, asking the system for bytes and a library for
    # their CRCs.
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
    """Returns the approximate size of the examples on disk."""
    return sum(
      tf.io.gfile.stat(name).length * i.take // max(i.examples_in_shard, 1)
      for name, i in zip(self._filenames, self._instructions, strict=True)
    )

  def _locate(self, index: int) -> tuple[int, int]:
    """Returns (shard, record in that shard) of an example."""
    shard = bisect.bisect_right(self._ends, index)
    instruction = self._instructions[shard]
    return shard, index - self._ends[shard] + instruction.take + instruction.skip


class TFRecordSource(RecordSource):
  """Encoded images in TFRecord shards, read by offset; the index takes 8 bytes per example."""

  def __init__(
    self, instructions, image_key: str, label_key: str, num_classes: int, index_dir: str | None
  ):
    """
    Args:
      instructions, image_key, label_key, num_classes: as for `RecordSource`.
      index_dir: where the index is kept, see `record_index.record_offsets`.

    Raises:
      UserError: a shard is missing or damaged, or has the wrong number of records.
    """
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
    # Opened for each read: a data set may have more shards than a process may have open files.
    with open(filename, "rb", 0) as file:
      return os.pread(file.fileno(), size, offset)

  def describe(self, index: int) -> str:
    shard, position = self._locate(index)
    offset = self._offsets[shard][position]
    return f"example {index} (offset {offset} of {self._filenames[shard]})"


class ArrayRecordSource(RecordSource):
  """Encoded images in ArrayRecord shards, which hold an index of their own."""

  def __init__(
    self,
    instructions,
    image_key: str,
    label_key: str,
    num_classes: int,
    index_dir: str | None = None,
  ):
    """
    Args:
      instructions, image_key, label_key, num_classes: as for `RecordSource`.
      index_dir: not used; every class of record source takes the same arguments.

    Raises:
      UserError: a shard is missing or damaged, or has the wrong number of records.
    """
    super().__init__(instructions, image_key, label_key, num_classes)
    # Each reader keeps a file open, and the default limit is often 1024 per process.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    self._readers = []
    for filename, instruction in zip(self._filenames, instructions, strict=True):
      # No read-ahead, because the next record is elsewhere. The reader of a missing or truncated
      # file finds no records.
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
    shard, position = self._locate(index)
    return f"example {index} (record {position} of {self._filenames[shard]})"
