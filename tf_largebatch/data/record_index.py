"""The offset of each record in a data set's TFRecord shards, found once and kept.

A TFRecord file has no table of its records, but each record begins with its length. Reading those
lengths once gives random access to any record from then on, for 8 bytes of memory per record.
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
from tf_largebatch.errors import UserError, summary

# A record: its length (uint64, little-endian), a CRC of these 8 bytes, the data, the data's CRC.
_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_FOOTER_BYTES = _CRC.size
_THREADS = 16  # Reading headers waits for the disk or the network, not for a core.


def record_offsets(
  filenames: Sequence[str], counts: Sequence[int], index_dir: str | None
) -> list[np.ndarray]:
  """Returns the byte offsets of the records of each shard, from `index_dir` or from the shards.

  A saved index is used only if the names and sizes of the shards are the same.

  Args:
    filenames: the shards, paths that `tf.io.gfile` supports.
    counts: how many records each shard has according to the data set.
    index_dir: where indices are saved, created if missing; None: nowhere.

  Returns:
    int64 `[records + 1]` per shard: where each record begins, and where the last one ends.

  Raises:
    UserError: a shard is missing, truncated or damaged, or has the wrong number of records.
  """
  filenames = [os.fspath(name) for name in filenames]
  # Absolute, because all of the user's runs share index_dir, whatever directory they start in.
  filenames = [name if "://" in name else os.path.abspath(name) for name in filenames]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    sizes = np.array(list(threads.map(_size, filenames)), np.int64)
  path, offsets = None, None
  if index_dir is not None:
    # Each set of shards has its own file, so that splits and slices do not overwrite each other's.
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
      f"{filename}, a shard of the data set, cannot be read ({summary(error)}); put it back, "
      "or prepare the data set again."
    ) from error


def _scan(filenames: list[str], sizes: np.ndarray) -> list[np.ndarray]:
  """Reads the headers of all records of all shards, several shards at once."""
  logging.info("Indexing %d shards; this happens once.", len(filenames))
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
  """Returns the offsets of a shard's records, after checking the CRC of every header."""
  offset, offsets, headers = 0, [], []
  # Local files are unbuffered: a buffer would read past each header, and so the whole file.
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
  # Checked first, because after a wrong length all offsets are wrong.
  _check_headers(filename, offsets, headers)
  if offset != size:
    raise UserError(
      f"{filename} ends within its record {len(offsets)}: it was cut off; prepare the data set "
      "again."
    )
  return np.array([*offsets, offset], np.int64)


def record_data(content: bytes) -> bytes:
  """Returns the data of a record, given all of its bytes.

  Raises:
    ValueError: the bytes are not exactly one intact record.
  """
  end = len(content) - _FOOTER_BYTES
  header, data, footer = content[: _HEADER.size], content[_HEADER.size : end], content[end:]
  if end < _HEADER.size or _HEADER.unpack(header) != (len(data), _masked(header[:8])):
    raise ValueError("no record begins or ends there: the file has changed since it was indexed")
  if footer != _CRC.pack(_masked(data)):
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


def _load(path: str, filenames: list[str], sizes: np.ndarray) -> list[np.ndarray] | None:
  """Returns the saved offsets, or None if there are none for the shards as they are now."""
  try:
    if not tf.io.gfile.exists(path):
      return None
    with tf.io.gfile.GFile(path, "rb") as file:
      saved = np.load(io.BytesIO(file.read()), allow_pickle=False)
    same = saved["filenames"].tolist() == filenames and np.array_equal(saved["sizes"], sizes)
    ends = np.cumsum(saved["counts"])
    if same and ends[-1] == len(saved["offsets"]):
      return np.split(saved["offsets"], ends[:-1])
  except Exception as error:  # Whatever is wrong with the file, it can be rebuilt.
    logging.warning("The index %s cannot be read (%s) and is rebuilt.", path, summary(error))
    return None
  logging.info("The shards have changed since the index %s was built.", path)
  return None


def _save(path: str, filenames: list[str], sizes: np.ndarray, offsets: list[np.ndarray]):
  content = io.BytesIO()
  counts = np.array([len(found) for found in offsets], np.int64)
  np.savez(
    content, filenames=filenames, sizes=sizes, counts=counts, offsets=np.concatenate(offsets)
  )
  # The partial file has a unique name, because several tasks may save the same index at once.
  partial = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.partial"
  try:
    tf.io.gfile.makedirs(os.path.dirname(path))
    with files.replacing(path, "wb", partial) as file:
      file.write(content.getvalue())
  except files.FAILURES as error:
    logging.warning("The index cannot be saved and will be rebuilt next time: %s", summary(error))
