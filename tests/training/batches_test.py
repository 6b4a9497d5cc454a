"""The error that names a bad example, or asks for a restart if there is none."""

import dataclasses
import itertools
import os
import types

import pytest
import tensorflow as tf

from tests.data.faulty_records import (
  EXAMPLES,
  FAULTS,
  RECIPE,
  Shards,
  encode,
  make_record,
  read_train_batches,
)
from tf_largebatch.data import sources
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.training import batches as batches_lib
from tf_largebatch.training.bad_examples import BadExamples


def iterator(source, on_bad_example):
  """An iterator whose `next` reads all of the examples."""
  return (read_train_batches(RECIPE, source, on_bad_example) for _ in range(1))


@pytest.mark.parametrize("bad", FAULTS)
def test_fail_names_the_bad_example(tmp_path, bad):
  shards = Shards(str(tmp_path), {bad: FAULTS[bad][0]})
  if bad == 23:
    shards.change(23, 100)
  strategy = tf.distribute.get_strategy()
  cluster = types.SimpleNamespace(num_tasks=1, task_index=0)
  source = shards.open()
  batches = batches_lib.train_batches(strategy, cluster, RECIPE, source, 0, None)
  with pytest.raises(UserError) as error:
    list(itertools.islice(batches, 2))
  text = str(error.value)
  assert sources.fault(source, bad) in text and "--bad_examples=skip" in text
  assert "\n" not in text


@pytest.mark.parametrize("on_bad_example", [None, lambda index: None])
def test_a_shard_deleted_during_the_run_ends_it_even_with_skip(tmp_path, on_bad_example):
  shards = Shards(str(tmp_path))
  source = shards.open()
  os.remove(shards.paths[1])
  with pytest.raises(InterruptedRunError, match=f"{shards.paths[1]} .*No such file") as error:
    batches = iterator(source, on_bad_example)
    batches_lib.next_batch(batches, RECIPE, "train", source, range(EXAMPLES), bool(on_bad_example))
  # If it stays away, the next start says that it is missing and exits with 1.
  assert error.value.status == 138


def test_a_shard_that_changes_after_it_was_indexed(tmp_path):
  """Before a run, the shard is indexed again; during a run, the records' CRCs reveal the change."""
  shards, index_dir = Shards(str(tmp_path)), str(tmp_path / "index")
  source = shards.open(index_dir)
  other = Shards(str(tmp_path), {11: make_record(encode(110, quality=99), 11)})
  again = other.open(index_dir)
  assert [x for part in again._offsets for x in part[:-1]] == other.offsets != shards.offsets
  with pytest.raises(UserError, match=f"offset {shards.offsets[11]} of {shards.paths[1]}"):
    batches_lib.next_batch(iterator(source, None), RECIPE, "train", source, range(EXAMPLES), False)


def test_skip_gives_up_after_nine_bad_examples_in_a_row(tmp_path):
  source = Shards(str(tmp_path), dict.fromkeys(range(7, 16), b"")).open()
  with pytest.raises(UserError, match=r"example 7 .* too many successive examples") as error:
    batches = iterator(source, lambda index: None)
    batches_lib.next_batch(batches, RECIPE, "train", source, range(EXAMPLES), True)
  assert "--bad_examples" not in str(error.value)  # It is already set to skip.


def test_a_bad_example_does_not_hide_data_that_cannot_be_reached(tmp_path):
  """Example 7 is bad, and 8, which replaces it, is in a shard that vanishes."""
  shards = Shards(str(tmp_path), {7: b""})
  source = shards.open()
  os.remove(shards.paths[1])
  with pytest.raises(InterruptedRunError, match=f"{shards.paths[1]} cannot be reached") as error:
    batches = iterator(source, lambda index: None)
    batches_lib.next_batch(batches, RECIPE, "train", source, range(8), True)
  assert error.value.status == 138


def test_a_fault_is_found_with_the_pipelines_channels(tmp_path):
  """A CMYK image cannot be decoded as a grey one, so a restart would not help."""
  cmyk = make_record(encode(30, mode="CMYK"), 3)
  source = Shards(str(tmp_path), {3: cmyk}).open()
  grey = dataclasses.replace(RECIPE, channel_mean=(0.0,), channel_std=(1.0,))
  assert sources.fault(source, 3) is None
  with pytest.raises(UserError, match=r"example 3 .*Prepare the data again"):
    batches = (read_train_batches(grey, source) for _ in range(1))
    batches_lib.next_batch(batches, grey, "train", source, range(EXAMPLES), False)
  bad = BadExamples(str(tmp_path), 0, 1)
  bad.record("train", source, 3)
  bad.write()
  assert "failed once" not in (tmp_path / "bad_examples.jsonl").read_text()


def test_temporarily_unreachable_data_ask_for_a_restart(tmp_path):
  """No example is bad now, so a launcher may restart the run."""

  def fail():
    raise tf.errors.UnavailableError(None, None, "Connection reset")
    yield

  source = Shards(str(tmp_path)).open()
  with pytest.raises(
    InterruptedRunError, match=r"Connection reset.*all .* can be read now"
  ) as error:
    batches_lib.next_batch(fail(), RECIPE, "train", source, range(EXAMPLES), False)
  assert error.value.status == 138
