"""Where each record of a data set's TFRecord shards lies, found once and kept.

A TFRecord file has no table of its records: each says how long it is. Reading those lengths once
gives random access to any record from then on, for 8 bytes of memory a record.
"""

import concurrent.futures
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
from tf_largebatch.errors import UserError, first_line

# A record: its length (uint64, little-endian), a CRC of these 8 bytes, the data, a CRC of them.
_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_FOOTER_BYTES = _CRC.size
_THREADS = 16  # Reading headers waits for the disk or the network, not for a core.


def record_offsets(
  filenames: Sequence[str], counts: Sequence[int], index_dir: str | None
) -> list[np.ndarray]:
  """Byte offsets of the records of each shard, from `index_dir` or else from the shards.

  What was saved counts only for the same shards, by name and size.

  Args:
    filenames: the shards; any path that `tf.io.gfile` takes.
    counts: how many records the data set says that each has.
    index_dir: where indices are saved, made if missing; None: nowhere.

  Returns:
    int64 `[records + 1]` a shard: where each record begins, and where the last one ends.

  Raises:
    UserError: a shard is missing, cut off, damaged or has another number of records.
  """
  filenames = [os.fspath(name) for name in filenames]
  # Absolute, for index_dir is shared by all that the user runs, wherever from.
  filenames = [name if "://" in name else os.path.abspath(name) for name in filenames]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    sizes = np.array(list(threads.map(_size, filenames)), np.int64)
  path, offsets = None, None
  if index_dir is not None:
    # A name of its own for each set of shards: splits and slices do not overwrite each other's.
    digest = hashlib.sha256("\n".join(filenames).encode()).hexdigest()
    path = os.path.join(index_dir, f"{digest[:32]}.npz")
    offsets = _load(path, filenames, sizes)
  if offsets is None:
    offsets = _scan(filenames, sizes)
    if path is not None:
      _save(path, filenames, sizes, offsets)
  for name, count, found in zip(filenames, counts, offsets, strict=True):
    if len(found) != count + 1:
      raise UserError(
        f"{name} has {len(found) - 1} records, but its data set was prepared with {count} there; "
        "prepare it again."
      )
  return offsets


def _size(filename: str) -> int:
  try:
    found = tf.io.gfile.stat(filename)
    if found.is_directory:
      raise IsADirectoryError("it is a directory")
    return found.length
  except files.FAILURES as error:
    raise UserError(
      f"{filename}, a shard of the data set, cannot be read ({first_line(error)}); put it back, "
      "or prepare the data set again."
    ) from error


def _scan(filenames: list[str], sizes: np.ndarray) -> list[np.ndarray]:
  """Reads the headers of all records of all shards, several shards at once."""
  logging.info("Indexing %d shards, once.", len(filenames))
  progress = tqdm.tqdm(total=len(filenames), desc="Indexing", unit="shard", disable=None)
  with progress, concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    futures = [
      threads.submit(_scan_shard, name, int(size))
      for name, size in zip(filenames, sizes, strict=True)
    ]
    try:
      for _ in concurrent.futures.as_completed(futures):
        progress.update()
      return [future.result() for future in futures]
    except BaseException:
      threads.shutdown(wait=False, cancel_futures=True)
      raise


def _scan_shard(filename: str, size: int) -> np.ndarray:
  """The offsets of one shard's records; every header's CRC is checked."""
  offset, offsets, headers = 0, [], []
  # Local files without a buffer, which would read on past each header, and so the whole file.
  remote = "://" in filename
  with tf.io.gfile.GFile(filename, "rb") if remote else open(filename, "rb", 0) as file:
    while offset < size:
      file.seek(offset)
      header = file.read(_HEADER.size)
      if len(header) < _HEADER.size:
        break
      offsets.append(offset)
      headers.append(header)
      offset += _HEADER.size + _HEADER.unpack(header)[0] + _FOOTER_BYTES
  # First, for a wrong length leads astray.
  _check_headers(filename, offsets, headers)
  if offset != size:
    raise UserError(
      f"{filename} ends within its record {len(offsets)}: it was cut off; prepare the data set "
      "again."
    )
  return np.array([*offsets, offset], np.int64)


def record_data(content: bytes) -> bytes:
  """The data of a record, given all of its bytes.

  Raises:
    ValueError: they are no whole record.
  """
  end = len(content) - _FOOTER_BYTES
  header, data, footer = content[: _HEADER.size], content[_HEADER.size : end], content[end:]
  if end < _HEADER.size or _HEADER.unpack(header) != (len(data), _masked(header[:8])):
    raise ValueError("no record begins or ends there: the file has changed since it was indexed")
  if footer != _CRC.pack(_masked(data)):
    raise ValueError("its record is corrupted, for its CRC is wrong")
  return data


def _masked(data: bytes) -> int:
  """TFRecord's CRC: CRC-32C, rotated and shifted by a constant (TensorFlow's `crc32c.h`)."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _check_headers(filename: str, offsets: list[int], headers: list[bytes]):
  for offset, header in zip(offsets, headers, strict=True):
    if _HEADER.unpack(header)[1] != _masked(header[:8]):
      raise UserError(
        f"{filename} is damaged: the length of the record at offset {offset} has a wrong CRC; "
        "prepare the data set again."
      )


def _load(path: str, filenames: list[str], sizes: np.ndarray) -> list[np.ndarray] | None:
  """The saved offsets, or None where there are none of these shards as they are now."""
  try:
    if not tf.io.gfile.exists(path):
      return None
    with tf.io.gfile.GFile(path, "rb") as file:
      saved = np.load(io.BytesIO(file.read()), allow_pickle=False)
    same = saved["filenames"].tolist() == filenames and np.array_equal(saved["sizes"], sizes)
    ends = np.cumsum(saved["counts"])
    if same and ends[-1] == len(saved["offsets"]):
      return np.split(saved["offsets"], ends[:-1])
  except Exception as error:  # Whatever is wrong with the file, it can be made anew.
    logging.warning("The index %s cannot be read (%s).", path, first_line(error))
    return None
  logging.info("The shards have changed since %s was made.", path)
  return None


def _save(path: str, filenames: list[str], sizes: np.ndarray, offsets: list[np.ndarray]):
  content = io.BytesIO()
  counts = np.array([len(found) for found in offsets], np.int64)
  np.savez(
    content, filenames=filenames, sizes=sizes, counts=counts, offsets=np.concatenate(offsets)
  )
  # Under a name of its own first: several tasks may save the same index at once.
  suffix = f".{os.getpid()}.{os.urandom(4).hex()}.partial"
  try:
    tf.io.gfile.makedirs(os.path.dirname(path))
    with files.replacing(path, "wb", suffix) as file:
      file.write(content.getvalue())
  except files.FAILURES as error:
    logging.warning("The index cannot be saved, and will be made again: %s", first_line(error))
