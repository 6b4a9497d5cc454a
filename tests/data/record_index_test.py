"""The index of records is correct, kept, and rebuilt when it does not fit the shards."""

import itertools
import os
import resource

import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch.data import record_index
from tf_largebatch.errors import InterruptedRunError, UserError


def write(path, lengths):
  """Writes a shard of records of the given lengths; returns the offsets the format implies."""
  with tf.io.TFRecordWriter(str(path)) as writer:
    for length in lengths:
      writer.write(b"x" * length)
  return np.concatenate([[0], np.cumsum([length + 16 for length in lengths])]).astype(int)


def record_offsets(filenames, counts, index_dir):
  return record_index.open_index(filenames, counts, index_dir).offsets


@pytest.fixture
def shards(tmp_path):
  lengths = {"a": [5, 0, 100_000, 1], "b": [], "c": [7, 7]}
  expected = [write(tmp_path / name, length) for name, length in lengths.items()]
  return [str(tmp_path / name) for name in lengths], expected


def assert_offsets(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.dtype == np.int64
    np.testing.assert_array_equal(one, other)


def test_offsets_are_where_the_records_begin(shards):
  filenames, expected = shards
  found = record_offsets(filenames, [4, 0, 2], None)
  assert_offsets(found, [expected[0], [0], expected[2]])


def test_data_is_what_was_written(tmp_path):
  with tf.io.TFRecordWriter(str(tmp_path / "a")) as writer:
    for text in (b"first", b"", b"x" * 100_000):
      writer.write(text)
  content = (tmp_path / "a").read_bytes()
  (offsets,) = record_offsets([str(tmp_path / "a")], [3], None)
  records = [content[a:b] for a, b in itertools.pairwise(offsets)]
  assert [record_index.record_data(record) for record in records] == [b"first", b"", b"x" * 100_000]
  # Any changed byte, and any number of missing bytes.
  for place in range(len(records[0])):
    changed = bytearray(records[0])
    changed[place] ^= 1
    with pytest.raises(ValueError, match="indexed" if place < 12 else "CRC"):
      record_index.record_data(bytes(changed))
    with pytest.raises(ValueError, match="indexed"):
      record_index.record_data(records[0][:place])


def test_with_a_saved_index_no_shard_is_read(shards, tmp_path, monkeypatch):
  filenames, expected = shards
  index_dir = str(tmp_path / "below" / "index")
  record_offsets(filenames, [4, 0, 2], index_dir)
  assert len(os.listdir(index_dir)) == 1 and os.listdir(index_dir)[0].endswith(".npz")
  monkeypatch.setattr(record_index, "_scan_shard", None)
  assert_offsets(record_offsets(filenames, [4, 0, 2], index_dir), expected)


def test_an_index_belongs_to_files_not_to_names(shards, tmp_path, monkeypatch):
  """Two projects have their own data/ and share index_dir."""
  filenames, expected = shards
  index_dir = str(tmp_path / "index")
  record_offsets(filenames, [4, 0, 2], index_dir)
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  other = write(elsewhere / "a", [3])
  monkeypatch.chdir(tmp_path)
  assert_offsets(record_offsets(["a", "b", "c"], [4, 0, 2], index_dir), expected)
  assert len(os.listdir(index_dir)) == 1
  monkeypatch.chdir(elsewhere)
  assert_offsets(record_offsets(["a"], [1], index_dir), [other])


def test_other_shards_have_their_own_index(shards, tmp_path):
  filenames, expected = shards
  index_dir = str(tmp_path / "index")
  record_offsets(filenames, [4, 0, 2], index_dir)
  assert_offsets(record_offsets(filenames[2:], [2], index_dir), expected[2:])
  assert len(os.listdir(index_dir)) == 2


def test_a_changed_shard_is_indexed_again(shards, tmp_path):
  filenames, expected = shards
  index_dir = str(tmp_path / "index")
  record_offsets(filenames, [4, 0, 2], index_dir)
  changed = write(filenames[2], [9, 9, 9])
  assert_offsets(record_offsets(filenames, [4, 0, 3], index_dir), [*expected[:2], changed])
  assert len(os.listdir(index_dir)) == 1


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04"])
def test_a_damaged_index_is_rebuilt(shards, tmp_path, content):
  filenames, expected = shards
  index_dir = tmp_path / "index"
  record_offsets(filenames, [4, 0, 2], str(index_dir))
  (path,) = index_dir.iterdir()
  path.write_bytes(content)
  assert_offsets(record_offsets(filenames, [4, 0, 2], str(index_dir)), expected)
  assert len(path.read_bytes()) > 100


def test_an_index_dir_that_cannot_be_written_costs_a_warning(shards, tmp_path, caplog):
  filenames, expected = shards
  assert_offsets(record_offsets(filenames, [4, 0, 2], f"{filenames[0]}/below"), expected)
  assert "cannot be saved" in caplog.text


def test_remote_paths():
  """TensorFlow's in-memory file system stands for those that tf.io.gfile supports."""
  expected = write("ram://shard", [3, 70_000, 2])
  found = record_offsets(["ram://shard"], [3], "ram://index")
  assert_offsets(found, [expected])
  assert len(tf.io.gfile.glob("ram://index/*.npz")) == 1
  assert_offsets(record_offsets(["ram://shard"], [3], "ram://index"), [expected])


def write_texts(path, texts):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for text in texts:
      writer.write(text)


_TEXTS = [b"a" * 70, b"b" * 20, b"c" * 50, b"d" * 20, b"e" * 9]


@pytest.mark.parametrize("same_times", [False, True])
@pytest.mark.parametrize("texts", [_TEXTS[::-1], [b"a" * 70, b"B" * 20, *_TEXTS[2:]]])
def test_data_prepared_again_with_equal_sizes_are_indexed_again(
  tmp_path, caplog, texts, same_times
):
  """Archives and container images may give other files the same times."""
  path, index_dir = tmp_path / "shard", str(tmp_path / "index")
  write_texts(path, _TEXTS)
  before = record_index.open_index([str(path)], [5], index_dir)
  times = path.stat().st_atime_ns, path.stat().st_mtime_ns
  write_texts(path, texts)
  os.utime(path, ns=times if same_times else (times[0], times[1] + 1))
  with caplog.at_level("INFO", logger="absl"):
    after = record_index.open_index([str(path)], [5], index_dir)
  assert_offsets(after.offsets, [np.cumsum([0, *(len(text) + 16 for text in texts)])])
  assert before.fingerprint([(0, 5)]) != after.fingerprint([(0, 5)])
  reason = "records are not where it says" if same_times else "the shards have changed"
  assert f"Rebuilding the index {after.path}: {reason}." in caplog.text
  assert len(os.listdir(index_dir)) == 1


def test_an_index_of_an_older_version_is_rebuilt(shards, tmp_path, caplog):
  filenames, expected = shards
  index = record_index.open_index(filenames, [4, 0, 2], str(tmp_path / "index"))
  sizes = [os.path.getsize(name) for name in filenames]
  offsets = np.concatenate(index.offsets)
  with open(index.path, "wb") as file:
    np.savez(file, filenames=filenames, sizes=sizes, counts=[5, 1, 3], offsets=offsets)
  with caplog.at_level("INFO", logger="absl"):
    assert_offsets(record_offsets(filenames, [4, 0, 2], str(tmp_path / "index")), expected)
  assert "an older version built it" in caplog.text


def test_an_index_of_other_numbers_of_records_is_rebuilt(shards, tmp_path, caplog):
  filenames, _ = shards
  record_offsets(filenames, [4, 0, 2], str(tmp_path))
  with caplog.at_level("INFO", logger="absl"), pytest.raises(UserError, match="with 3 there"):
    record_offsets(filenames, [4, 0, 3], str(tmp_path))
  assert "it has other numbers of records" in caplog.text


def test_a_fingerprint_is_of_the_records_and_their_order(tmp_path):
  """It does not depend on the shards that hold them, nor on the records outside of the ranges."""

  def fingerprint(parts, ranges):
    names = [str(tmp_path / str(number)) for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
      write_texts(name, part)
    return record_index.open_index(names, [len(part) for part in parts], None).fingerprint(ranges)

  expected = fingerprint([_TEXTS], [(0, 5)])
  assert expected.startswith("tfrecord:")
  assert fingerprint([_TEXTS[:2], [], _TEXTS[2:]], [(0, 2), (0, 0), (0, 3)]) == expected
  assert fingerprint([[b"x", *_TEXTS[:3]], [*_TEXTS[3:], b"y"]], [(1, 4), (0, 2)]) == expected
  others = [_TEXTS[::-1], [*_TEXTS[:4], b"E" * 9], [_TEXTS[0], *_TEXTS[:4]]]
  assert len({expected, *(fingerprint([texts], [(0, 5)]) for texts in others)}) == 4
  assert fingerprint([_TEXTS], [(0, 4)]) != expected


def test_too_few_open_files_are_not_taken_for_a_missing_shard(shards):
  filenames, _ = shards
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  lowest = os.dup(0)  # The limit is on the numbers of descriptors, which may have gaps.
  os.close(lowest)
  resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
  try:
    with pytest.raises(InterruptedRunError, match=f"limit of {lowest} open files") as error:
      record_offsets(filenames, [4, 0, 2], None)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  assert error.value.status == 1 and "ulimit -n" in str(error.value)


def message(filenames, counts):
  with pytest.raises(UserError) as error:
    record_offsets(filenames, counts, None)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_missing_shard(tmp_path):
  text = message([str(tmp_path / "gone")], [1])
  assert str(tmp_path / "gone") in text and "cannot be read" in text


@pytest.mark.parametrize("kept", [1, 11, 12, 15, 16 + 99, 16 + 100 + 3, 16 + 100 + 12])
def test_a_shard_that_was_cut_off(tmp_path, kept):
  path = tmp_path / "shard"
  write(path, [100, 100])
  path.write_bytes(path.read_bytes()[:kept])
  text = message([str(path)], [2])
  assert str(path) in text and "cut off" in text


def test_a_shard_that_was_cut_off_between_records(tmp_path):
  path = tmp_path / "shard"
  write(path, [100, 100])
  path.write_bytes(path.read_bytes()[:116])
  text = message([str(path)], [2])
  assert "has 1 records" in text and "with 2" in text


@pytest.mark.parametrize("byte", [0, 3, 7, 8, 11])
def test_a_wrong_length_is_reported_with_its_offset(tmp_path, byte):
  path = tmp_path / "shard"
  _, offset, *_ = write(path, [100, 100, 100])
  content = bytearray(path.read_bytes())
  content[offset + byte] ^= 0x40
  path.write_bytes(content)
  text = message([str(path)], [3])
  assert f"offset {offset} " in text and "CRC" in text and str(path) in text
