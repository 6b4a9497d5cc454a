"""The index of a data set's TFRecord shards: where each record is, built once and kept.

A TFRecord file has no table of its records, but each record begins with its length. Reading those
lengths once gives random access to any record from then on, for 8 bytes of memory per record. The
CRC of a record's data is next to the following length, so the same reads also give a fingerprint of
all records.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np
import tensorflow as tf
import tqdm
from absl import logging

from tf_largebatch import files
from tf_largebatch.data.read_errors import READ_FAILURES, missing_shard
from tf_largebatch.errors import UserError, summary

# A record: its length (uint64, little-endian), a CRC of these 8 bytes, the data, the data's CRC.
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
THREADS = 16  # Reading headers waits for the disk or the network, not for a core.


@dataclasses.dataclass(frozen=True)
class RecordIndex:
  """Where each record of a data set's shards is.

  Attributes:
    offsets: int64 `[records + 1]` per shard: where each record begins, and where the last one ends.
    checksums: uint32 `[records]` per shard: the CRC of each record's data, as stored in the shard.
    path: where the index is kept; None: nowhere.
  """

  offsets: list[np.ndarray]
  checksums: list[np.ndarray]
  path: str | None

  def fingerprint(self, ranges: Sequence[tuple[int, int]]) -> str:
    """Returns a digest of the records in a range of each shard: their contents and their order.

    It depends on each record's length and CRC, not on how the records are divided into shards.

    Args:
      ranges: (first record, record after the last) per shard.
    """
    digest = hashlib.sha256()
    for offsets, checksums, (first, end) in zip(self.offsets, self.checksums, ranges, strict=True):
      records = np.column_stack([np.diff(offsets[first : end + 1]), checksums[first:end]])
      digest.update(records.astype("<i8").tobytes())
    return f"tfrecord:{digest.hexdigest()[:16]}"


def open_index(
  filenames: Sequence[str], counts: Sequence[int], index_dir: str | None
) -> RecordIndex:
  """Returns the index of some shards, from `index_dir` or from the shards themselves.

  A saved index is used only if the names, sizes and modification times of the shards are the same
  and a few records of each shard are where the index says. (Equal times do not prove equal files:
  archives and images are often made with fixed times. Object stores set the time of each write, so
  their shards are not read for this.) Otherwise it is rebuilt.

  Args:
    filenames: the shards, paths that `tf.io.gfile` supports.
    counts: how many records each shard has according to the data set.
    index_dir: where indices are saved, created if missing; None: nowhere.

  Raises:
    UserError: a shard is missing, truncated or damaged, or has the wrong number of records.
    InterruptedRunError: the process has too many open files or too little memory.
  """
  filenames = [os.fspath(name) for name in filenames]
  # Absolute, because all of the user's runs share index_dir, whatever directory they start in.
  filenames = [name if "://" in name else os.path.abspath(name) for name in filenames]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
    stamps = np.array(list(threads.map(_stamp, filenames)), np.int64).reshape(-1, 2)
  path, index = None, None
  if index_dir is not None:
    # Each set of shards has its own file, so that splits and slices do not overwrite each other's.
    digest = hashlib.sha256("\n".join(filenames).encode()).hexdigest()
    path = os.path.join(index_dir, f"{digest[:32]}.npz")
    index = _load(path, filenames, stamps, counts)
  if index is None:
    index = _scan(filenames, stamps[:, 0], path)
    if path is not None:
      _save(index, filenames, stamps)
  for name, count, found in zip(filenames, counts, index.checksums, strict=True):
    if len(found) != count:
      raise UserError(
        f"{name} has {len(found)} records, but its data set was prepared with {count} there; "
        "prepare it again."
      )
  return index


def _stamp(filename: str) -> tuple[int, int]:
  """Returns the size of a shard and the time of its last modification in nanoseconds."""
  try:
    if tf.io.gfile.isdir(filename):
      raise IsADirectoryError("it is a directory")
    if "://" in filename:
      remote = tf.io.gfile.stat(filename)
      return remote.length, remote.mtime_nsec
    local = os.stat(filename)  # TensorFlow rounds the time to seconds.
    return local.st_size, local.st_mtime_ns
  except READ_FAILURES as error:
    raise missing_shard(filename, error) from error


def _scan(filenames: list[str], sizes: np.ndarray, path: str | None) -> RecordIndex:
  """Reads the headers of all records of all shards, several shards at once."""
  logging.info("Indexing %d shards; this happens once.", len(filenames))
  progress = tqdm.tqdm(total=len(filenames), desc="Indexing", unit="shard", disable=None)
  with progress, concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
    futures = [
      threads.submit(_scan_shard, name, int(size))
      for name, size in zip(filenames, sizes, strict=True)
    ]
    try:
      for _ in concurrent.futures.as_completed(futures):
        progress.update()
      offsets, checksums = zip(*(future.result() for future in futures), strict=True)
      return RecordIndex(list(offsets), list(checksums), path)
    except BaseException:
      threads.shutdown(wait=False, cancel_futures=True)
      raise


def _scan_shard(filename: str, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the offsets of a shard's records and their CRCs, after checking every header."""
  offset, offsets, headers, footers = 0, [], [], []
  # Local files are unbuffered: a buffer would read past each header, and so the whole file.
  remote = "://" in filename
  try:
    with tf.io.gfile.GFile(filename, "rb") if remote else open(filename, "rb", 0) as file:
      header = file.read(_HEADER.size)
      while len(header) == _HEADER.size:
        offsets.append(offset)
        headers.append(header)
        offset += _HEADER.size + _HEADER.unpack(header)[0] + _FOOTER.size
        if offset > size:
          break
        # A record's footer and the next header are adjacent.
        file.seek(offset - _FOOTER.size)
        around = file.read(_FOOTER.size + _HEADER.size)
        footers.append(around[: _FOOTER.size])
        header = around[_FOOTER.size :]
  except READ_FAILURES as error:
    raise missing_shard(filename, error) from error
  # Checked first, because after a wrong length all offsets are wrong.
  _check_headers(filename, offsets, headers)
  checksums = np.frombuffer(b"".join(footers), "<u4")
  if offset != size or len(checksums) != len(offsets):
    raise UserError(
      f"{filename} ends within its record {len(offsets)}: it was cut off; prepare the data set "
      "again."
    )
  return np.array([*offsets, offset], np.int64), checksums


def record_data(content: bytes, index_path: str | None = None) -> bytes:
  """Returns the data of a record, given all of its bytes.

  Args:
    content: the bytes where the index says that the record is.
    index_path: where the index is kept.

  Raises:
    ValueError: the bytes are not exactly one intact record.
  """
  end = len(content) - _FOOTER.size
  header, data, footer = content[: _HEADER.size], content[_HEADER.size : end], content[end:]
  if end < _HEADER.size or _HEADER.unpack(header) != (len(data), _masked(header[:8])):
    remedy = f"to index it again, remove {index_path} and run again"
    raise ValueError(
      "no record begins or ends there: the file is damaged, or it has changed since it was indexed"
      f" ({remedy if index_path else 'run again to index it again'})"
    )
  if footer != _FOOTER.pack(_masked(data)):
    raise ValueError("its record is corrupted: its CRC is wrong")
  return data


def _masked(data: bytes) -> int:
  """Returns TFRecord's CRC: a CRC-32C, rotated, plus a constant (TensorFlow's `crc32c.h`)."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _check_headers(filename: str, offsets: list[int], headers: list[bytes]):
  for offset, header in zip(offsets, headers, strict=True):
    if _HEADER.unpack(header)[1] != _masked(header[:8]):
      raise UserError(
        f"{filename} is damaged: the length of the record at offset {offset} has a wrong CRC; "
        "prepare the data set again."
      )


def _load(
  path: str, filenames: list[str], stamps: np.ndarray, counts: Sequence[int]
) -> RecordIndex | None:
  """Returns the saved index, or None if there is none that fits the shards as they are now."""
  try:
    if not tf.io.gfile.exists(path):
      return None
    with tf.io.gfile.GFile(path, "rb") as file:
      saved = np.load(io.BytesIO(file.read()), allow_pickle=False)
    if "checksums" not in saved:
      reason = "an older version built it"
    elif saved["filenames"].tolist() != filenames or not np.array_equal(saved["stamps"], stamps):
      reason = "the shards have changed"
    elif saved["counts"].tolist() != list(counts):
      reason = "it has other numbers of records"
    else:
      ends = np.cumsum(counts)
      # Each shard has one offset more than records.
      offsets = np.split(saved["offsets"], (ends + np.arange(1, len(ends) + 1))[:-1])
      index = RecordIndex(offsets, np.split(saved["checksums"], ends[:-1]), path)
      with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        if all(threads.map(_fits, filenames, index.offsets, index.checksums)):
          return index
      reason = "records are not where it says"
  except Exception as error:  # Whatever is wrong with the file, it can be rebuilt.
    reason = f"it cannot be read: {summary(error)}"
  logging.info("Rebuilding the index %s: %s.", path, reason)
  return None


def _fits(filename: str, offsets: np.ndarray, checksums: np.ndarray) -> bool:
  """Returns whether a local shard's first, middle and last records are where its index says.

  Of a boundary between records, compares the 16 bytes around it: the CRC of the record that ends
  there and the header of the one that begins.
  """
  if "://" in filename:
    return True
  count = len(checksums)
  with open(filename, "rb", 0) as file:
    for boundary in (0, count // 2, count):
      expected = _FOOTER.pack(checksums[boundary - 1]) if boundary else b""
      begin = int(offsets[boundary]) - len(expected)
      if boundary < count:
        length = int(offsets[boundary + 1] - offsets[boundary]) - _HEADER.size - _FOOTER.size
        size = struct.pack("<Q", length)
        expected += _HEADER.pack(length, _masked(size))
      if os.pread(file.fileno(), len(expected), begin) != expected:
        return False
  return True


def _save(index: RecordIndex, filenames: list[str], stamps: np.ndarray):
  content = io.BytesIO()
  np.savez(
    content,
    filenames=filenames,
    stamps=stamps,
    counts=[len(found) for found in index.checksums],
    offsets=np.concatenate(index.offsets),
    checksums=np.concatenate(index.checksums),
  )
  # The partial file has a unique name, because several tasks may save the same index at once.
  partial = f"{index.path}.{os.getpid()}.{os.urandom(4).hex()}.partial"
  try:
    tf.io.gfile.makedirs(os.path.dirname(index.path))
    with files.replacing(index.path, "wb", partial) as file:
      file.write(content.getvalue())
  except files.FAILURES as error:
    logging.warning("The index cannot be saved and will be rebuilt next time: %s", summary(error))
