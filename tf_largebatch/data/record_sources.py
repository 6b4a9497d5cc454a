"""Sources that read encoded images from the record files of a prepared data set."""

import bisect
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import os
import resource

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from tf_largebatch.data.read_errors import FAULTS, READ_FAILURES, missing_shard, unreachable
from tf_largebatch.data.record_index import THREADS, open_index, record_data
from tf_largebatch.errors import LOST_TASK, InterruptedRunError, UserError, summary


class RecordSource:
  """Encoded images in the records of a data set's shards.

  Attributes:
    fingerprint: identifies the contents and the order of the examples.
    unreachable: the error of the last `read` that could not reach the data, or None.
  """

  image_shape = None
  fingerprint: str
  unreachable: InterruptedRunError | None = None

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
    # Of each shard: (first record, record after the last).
    self._ranges = [(i.skip, i.skip + i.take) for i in instructions]
    self.num_examples = self._ends[-1]

  def record(self, index: int) -> bytes:
    """Returns the record of an example.

    Raises:
      ValueError: the record is damaged.
      InterruptedRunError: the file cannot be reached, or memory is exhausted.
    """
    raise NotImplementedError

  def describe(self, index: int) -> str:
    """Returns a phrase that says where an example is stored."""
    raise NotImplementedError

  def read(self, indices):
    @tf.autograph.experimental.do_not_convert
    def records_of(indices):
      records = np.empty(len(indices), object)
      for place, index in enumerate(indices.tolist()):
        try:
          records[place] = self.record(index)
        except FAULTS:  # `sources.fault` reports it if the example is used.
          records[place] = b""
        except InterruptedRunError as error:  # TensorFlow passes on only the text.
          self.unreachable = error
          raise
      return records

    # The only work in Python: for a batch of records, asking the system for bytes and a library for
    # their CRCs.
    records = tf.numpy_function(records_of, [indices], tf.string, stateful=False)
    return tf.ensure_shape(records, indices.shape)

  def parse(self, records):
    image_key, label_key = self._keys
    example = tf.io.parse_example(
      records,
      {
        image_key: tf.io.FixedLenFeature([], tf.string),
        label_key: tf.io.FixedLenFeature([], tf.int64),
      },
    )
    return example[image_key], tf.cast(example[label_key], tf.int32)

  def num_bytes(self) -> int:
    """Returns the approximate size of the examples on disk.

    Raises:
      InterruptedRunError: a shard cannot be reached.
    """
    size = 0
    for name, part in zip(self._filenames, self._instructions, strict=True):
      try:
        size += tf.io.gfile.stat(name).length * part.take // max(part.examples_in_shard, 1)
      except READ_FAILURES as error:
        raise unreachable(name, error) from error
    return size

  def _locate(self, index: int) -> tuple[int, int]:
    """Returns (shard, record in that shard) of an example."""
    shard = bisect.bisect_right(self._ends, index)
    instruction = self._instructions[shard]
    return shard, index - self._ends[shard] + instruction.take + instruction.skip


def read_error(source, name: str, error: Exception) -> InterruptedRunError:
  """Returns the error for a source that a pipeline failed to read, though no example is bad now.

  Args:
    source: any source.
    name: of the source, for the message.
    error: raised by the pipeline.
  """
  if found := getattr(source, "unreachable", None):
    return found
  if isinstance(error, tf.errors.ResourceExhaustedError):
    return unreachable(name, error)
  return InterruptedRunError(
    f"Reading {name} failed ({summary(error)}), but all of its examples can be read now; run again "
    "to continue.",
    LOST_TASK,
  )


class TFRecordSource(RecordSource):
  """Encoded images in TFRecord shards, read by offset; the index takes 8 bytes per example.

  The fingerprint covers the length and the CRC of every record.
  """

  def __init__(
    self, instructions, image_key: str, label_key: str, num_classes: int, index_dir: str | None
  ):
    """
    Args:
      instructions, image_key, label_key, num_classes: as for `RecordSource`.
      index_dir: where the index is kept, see `record_index.open_index`.

    Raises:
      UserError: a shard is missing or damaged, or has the wrong number of records.
    """
    super().__init__(instructions, image_key, label_key, num_classes)
    counts = [instruction.examples_in_shard for instruction in instructions]
    index = open_index(self._filenames, counts, index_dir)
    self._offsets, self._index_path = index.offsets, index.path
    self.fingerprint = index.fingerprint(self._ranges)

  def record(self, index: int) -> bytes:
    shard, position = self._locate(index)
    begin, end = self._offsets[shard][position : position + 2].tolist()
    try:
      content = self._read_range(shard, begin, end - begin)
    except READ_FAILURES as error:
      if getattr(error, "errno", None) == errno.EIO:  # A bad sector; the rest can be read.
        raise ValueError(summary(error)) from error
      raise unreachable(self._filenames[shard], error) from error
    return record_data(content, self._index_path)

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
  """Encoded images in ArrayRecord shards, which hold an index of their own.

  The fingerprint covers the size of each shard and the first, middle and last record that the
  source reads of it: the format has no CRCs that could be read without reading all data.
  """

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
    # Thread safe. A reader keeps its file open until it leaves the cache and no thread uses it.
    most = _most_readers()
    self._reader = functools.lru_cache(most)(_open_reader)
    counts = [instruction.examples_in_shard for instruction in instructions]
    with concurrent.futures.ThreadPoolExecutor(min(THREADS, most)) as threads:
      samples = list(threads.map(self._sample, self._filenames, counts, self._ranges))
    digest = hashlib.sha256(repr(samples).encode())
    self.fingerprint = f"array_record:{digest.hexdigest()[:16]}"

  def record(self, index: int) -> bytes:
    shard, position = self._locate(index)
    return self._read(self._filenames[shard], position)

  def _read(self, filename: str, position: int) -> bytes:
    try:
      return self._reader(filename).read([position])[0]
    except (RuntimeError, IndexError) as error:
      text = summary(error)
      # Riegeli, which reads the file, names a system call that failed.
      if "() failed: " in text and os.strerror(errno.EIO) not in text:
        raise unreachable(filename, error) from error
      raise ValueError(text) from error
    except READ_FAILURES as error:
      raise unreachable(filename, error) from error

  def _sample(self, filename: str, count: int, records: tuple[int, int]) -> tuple:
    """Returns what the fingerprint covers of a shard, after checking its number of records."""
    try:
      size = os.path.getsize(filename)
      found = self._reader(filename).num_records()
    except READ_FAILURES as error:
      raise missing_shard(filename, error) from error
    except ValueError:
      found = 0
    if found != count:
      raise UserError(
        f"{filename} has {found} records, but its data set was prepared with {count} there; "
        "prepare it again."
      )
    first, end = records
    digests = []
    for position in sorted({first, (first + end) // 2, end - 1}):
      try:
        digests.append(hashlib.sha256(self._read(filename, position)).hexdigest())
      except ValueError:  # A bad example, which the run may skip.
        digests.append("damaged")
    return size, end - first, digests

  def describe(self, index: int) -> str:
    shard, position = self._locate(index)
    return f"example {index} (record {position} of {self._filenames[shard]})"


def _open_reader(filename: str) -> ArrayRecordReader:
  """Opens an ArrayRecord file.

  Raises:
    OSError: it cannot be opened.
    ValueError: it is not an ArrayRecord file, or it was cut off.
  """
  # No read-ahead, because the next record is elsewhere.
  reader = ArrayRecordReader(filename, "readahead_buffer_size:0,max_parallelism:0")
  if not reader.ok():
    with open(filename, "rb"):  # Raises the reason if it cannot be opened.
      raise ValueError("it is not an ArrayRecord file, or it was cut off")
  return reader


def _most_readers() -> int:
  """Returns how many files a source may keep open, of the largest number the system allows.

  A quarter, because a run has two sources, and TensorFlow and the checkpoints need files too.
  """
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  # The limit in force is often 1024, below the largest one.
  with contextlib.suppress(OSError, ValueError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
  limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return max(1, limit // 4) if limit != resource.RLIM_INFINITY else 65536
