"""Data as it should not be: what cannot be read is named or left out, never passed over."""

import dataclasses
import io
import itertools
import json
import os
import struct
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tf_largebatch import files
from tf_largebatch.data import input_pipeline, memory_sources, sources
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import batches as batches_lib
from tf_largebatch.training.bad_examples import BadExamples

SHARDS, SHARD_EXAMPLES, CLASSES = 3, 8, 24
EXAMPLES = SHARDS * SHARD_EXAMPLES
RECIPE = Recipe(
  dataset="test",
  validation_split="validation",
  image_size=8,
  augmentation="none",
  channel_mean=(10.0, 20.0, 30.0),
  channel_std=(1.0, 1.0, 1.0),
  network="resnet8",
  workers=2,
  per_worker_batch_size=6,
  epochs=3,
  warmup_epochs=1,
  decay_epochs=(2,),
)


def encode(value, kind="JPEG", size=(40, 30), mode="RGB", **options):
  """A file of an image of one grey level."""
  content = io.BytesIO()
  image = Image.new("RGB", size, (value,) * 3).convert(mode, palette=Image.Palette.ADAPTIVE)
  image.save(content, kind, **options)
  return content.getvalue()


def make_record(image, label):
  feature = {
    "picture": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
    "kind": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
  }
  return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


class Shards:
  """Three TFRecord files of images whose grey level is 10 times their id, as is their label."""

  def __init__(self, directory, replaced=None):
    """`replaced`: records by the ids of the examples that they take the place of."""
    self.paths, self.offsets = [], []
    for shard in range(SHARDS):
      self.paths.append(os.path.join(directory, f"shard{shard}"))
      offset = 0
      with tf.io.TFRecordWriter(self.paths[-1]) as writer:
        for index in range(shard * SHARD_EXAMPLES, (shard + 1) * SHARD_EXAMPLES):
          record = (replaced or {}).get(index, make_record(encode(10 * index), index))
          writer.write(record)
          self.offsets.append(offset)
          offset += 16 + len(record)

  def open(self, index_dir=None):
    instructions = [
      types.SimpleNamespace(filename=path, skip=0, take=8, examples_in_shard=8)
      for path in self.paths
    ]
    return sources.TFRecordSource(instructions, "picture", "kind", CLASSES, index_dir)

  def change(self, index, position):
    """Changes a byte of an example's record, counted from its offset."""
    with open(self.paths[index // SHARD_EXAMPLES], "r+b") as file:
      file.seek(self.offsets[index] + position)
      old = file.read(1)[0]
      file.seek(-1, os.SEEK_CUR)
      file.write(bytes([old ^ 0x20]))


# The record of an example → a word of what is wrong with it. Two in a row are among them.
FAULTS = {
  2: (make_record(encode(20)[:-200], 2), "JPEG"),  # Cut off.
  5: (make_record(b"no image at all", 5), "Unknown image"),
  7: (make_record(b"", 7), "empty"),
  8: (make_record(encode(80)[:20], 8), "JPEG"),  # The header alone.
  10: (b"", "is required"),
  12: (b"\xff" * 50, "not a tf.train.Example"),
  14: (make_record(encode(140), CLASSES), "label is 24, but there are 24 classes"),
  17: (make_record(encode(170), -1), "label is -1"),
  23: (make_record(encode(230), 23), "corrupted"),  # Whose CRC is wrong.
}


@pytest.fixture
def faulty(tmp_path):
  shards = Shards(str(tmp_path), {index: record for index, (record, _) in FAULTS.items()})
  shards.change(23, 100)
  return shards


def train_batches(recipe, source, on_bad_example=None, steps=2):
  """The first steps; two are an epoch, all of the examples."""
  dataset = input_pipeline.train_dataset(
    recipe,
    source,
    first_worker=0,
    num_workers=2,
    workers_per_replica=2,
    on_bad_example=on_bad_example,
  )
  return [next(iterator) for iterator in [iter(dataset)] for _ in range(steps)]


def evaluate(source, on_bad_example=None):
  """(images, labels, weights) of an evaluation of all."""
  dataset = input_pipeline.evaluation_dataset(
    RECIPE,
    source,
    batch_size=7,
    first_replica=0,
    num_replicas=1,
    replicas=1,
    on_bad_example=on_bad_example,
  )
  return [np.concatenate(parts) for parts in zip(*dataset.take(4), strict=True)]


def test_a_fault_is_told_with_the_examples_file_and_offset(faulty):
  source = faulty.open()
  cached = sources.CachedSource(source)
  for index in range(EXAMPLES):
    text = sources.fault(source, index)
    assert sources.fault(cached, index) == text
    if index in FAULTS:
      path = faulty.paths[index // SHARD_EXAMPLES]
      assert text.startswith(f"example {index} (offset {faulty.offsets[index]} of {path}): ")
      assert FAULTS[index][1] in text and "\n" not in text and "{{" not in text
    else:
      assert text is None


@pytest.mark.parametrize("bad", FAULTS)
def test_fail_ends_the_run_by_that_line(tmp_path, bad):
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


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("augmentation", ["none", "area_crop"])
def test_skip_takes_the_next_example_and_tells(faulty, augmentation, cache):
  source = faulty.open()
  source = sources.CachedSource(source) if cache else source
  recipe = dataclasses.replace(RECIPE, augmentation=augmentation)
  told = []
  batches = train_batches(recipe, source, told.append)
  ids = np.stack(
    [[input_pipeline.example_ids(recipe, EXAMPLES, s, w) for w in range(2)] for s in range(2)]
  )
  labels = np.stack([labels for _, labels in batches])
  levels = np.stack([images.numpy()[..., 4, 4, 0] for images, _ in batches])
  # A crop that lies in what is left of the image that was cut off can be used, and is.
  used = {2} if augmentation == "area_crop" and 2 in labels[ids == 2] else set()
  # More than once where the next epoch was read ahead.
  assert set(told) | used == set(FAULTS)
  expected = ids.copy()
  for bad in sorted(set(FAULTS) - used, reverse=True):
    expected[expected == bad] = (bad + 1) % EXAMPLES
  # 7 gives way to 8, and that to 9.
  expected[ids == 7] = 9
  np.testing.assert_array_equal(labels, expected)
  np.testing.assert_allclose(levels, 10 * expected, atol=2)


def test_evaluation_counts_all_others_once(faulty):
  told = []
  _, labels, weights = evaluate(faulty.open(), told.append)
  assert weights.tolist() == [-1 if i in FAULTS else 1 for i in range(EXAMPLES)] + [0] * 4
  assert labels[weights == 1].tolist() == [i for i in range(EXAMPLES) if i not in FAULTS]
  assert set(told) == set(FAULTS)


def test_a_cache_has_the_very_examples(tmp_path):
  source = Shards(str(tmp_path)).open()
  cached = sources.CachedSource(source)
  for index in range(EXAMPLES):
    assert cached.read([index])[0].numpy() == source.record(index)
    image, label = cached.parse(cached.read([index])[0])
    assert (image, label) == (encode(10 * index), index)


def test_a_cache_that_memory_does_not_hold_is_refused(tmp_path, monkeypatch):
  memory = types.SimpleNamespace(available=99)
  monkeypatch.setattr(memory_sources.psutil, "virtual_memory", lambda: memory)
  with pytest.raises(UserError, match="use --nocache"):
    sources.CachedSource(Shards(str(tmp_path)).open())


def test_a_wrong_length_is_found_when_the_shards_are_indexed(tmp_path):
  shards = Shards(str(tmp_path))
  shards.change(11, 9)
  with pytest.raises(UserError, match=f"{shards.paths[1]} is damaged: .* {shards.offsets[11]} "):
    shards.open()


def test_a_shard_that_is_missing(tmp_path):
  shards = Shards(str(tmp_path))
  os.remove(shards.paths[1])
  with pytest.raises(UserError, match=f"{shards.paths[1]}, a shard .* cannot be read"):
    shards.open()


@pytest.mark.parametrize("told", [None, lambda index: None])
def test_a_shard_that_vanishes_during_the_run_ends_it_even_under_skip(tmp_path, told):
  shards = Shards(str(tmp_path))
  source = shards.open()
  os.remove(shards.paths[1])
  with pytest.raises(UserError, match=f"{shards.paths[1]}.*No such file"):
    batches = iter_of(source, told)
    batches_lib.next_batch(batches, RECIPE, "train", source, range(EXAMPLES), bool(told))


def iter_of(source, told):
  """An iterator whose `next` reads all of the examples."""
  return (train_batches(RECIPE, source, told) for _ in range(1))


def test_a_shard_that_changes_after_it_was_indexed(tmp_path):
  """Before a run: indexed again. During it: the CRCs of the records tell."""
  shards, index_dir = Shards(str(tmp_path)), str(tmp_path / "index")
  source = shards.open(index_dir)
  other = Shards(str(tmp_path), {11: make_record(encode(110, quality=99), 11)})
  again = other.open(index_dir)
  assert [x for part in again._offsets for x in part[:-1]] == other.offsets != shards.offsets
  with pytest.raises(UserError, match=f"offset {shards.offsets[11]} of {shards.paths[1]}"):
    batches_lib.next_batch(iter_of(source, None), RECIPE, "train", source, range(EXAMPLES), False)


def test_nine_bad_examples_in_a_row_are_no_accident(tmp_path):
  source = Shards(str(tmp_path), dict.fromkeys(range(7, 16), b"")).open()
  with pytest.raises(UserError, match=r"example 7 .* too many successive examples") as error:
    batches = iter_of(source, lambda index: None)
    batches_lib.next_batch(batches, RECIPE, "train", source, range(EXAMPLES), True)
  assert "--bad_examples" not in str(error.value)  # That is what does not help.


# ImageNet as it is: an encoded image → its grey level.
ODD_IMAGES = {
  "grey JPEG": encode(77, mode="L"),
  "CMYK JPEG": encode(77, mode="CMYK", quality=100),
  "progressive JPEG": encode(77, progressive=True),
  "PNG": encode(77, "PNG"),
  "grey PNG": encode(77, "PNG", mode="L"),
  "PNG with alpha": encode(77, "PNG", mode="RGBA"),
  "PNG with a palette": encode(77, "PNG", mode="P"),
  "GIF": encode(77, "GIF"),
  "BMP": encode(77, "BMP"),
  "1x1": encode(77, size=(1, 1)),
  "1x1 PNG": encode(77, "PNG", size=(1, 1)),
  "a sliver": encode(77, size=(500, 1)),
  "smaller than the crop": encode(77, size=(5, 7)),
  "larger than most": encode(77, size=(3000, 2000)),
  "bytes behind its end": encode(77) + b"\0" * 33,
}


@pytest.mark.parametrize("augmentation", ["none", "area_crop", "pad_crop"])
def test_odd_images_are_images(tmp_path, augmentation):
  records = {i: make_record(image, i) for i, image in enumerate(ODD_IMAGES.values())}
  source = Shards(str(tmp_path), records).open()
  recipe = dataclasses.replace(
    RECIPE, augmentation=augmentation, channel_mean=(77.0,) * 3, image_size=32
  )
  batches = [[x.numpy() for x in batch] for batch in train_batches(recipe, source)]
  images = np.concatenate([images.reshape(-1, 32, 32, 3) for images, _ in batches])
  labels = np.concatenate([labels.ravel() for _, labels in batches])
  evaluated, *_ = evaluate(source)
  for index, name in enumerate(ODD_IMAGES):
    assert np.any(labels == index)
    np.testing.assert_allclose(images[labels == index], 77, atol=2, err_msg=name)
    np.testing.assert_allclose(evaluated[index], 77, atol=2, err_msg=name)


def test_exif_does_not_turn_an_image(tmp_path):
  """As in the paper's code base and in torchvision: pixels are taken as they are stored."""
  exif = Image.Exif()
  exif[0x0112] = 6  # To be shown turned by 90 degrees.
  pixels = np.zeros((40, 40, 3), np.uint8)
  pixels[:20] = 255
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, "JPEG", quality=100, exif=exif)
  images, *_ = evaluate(Shards(str(tmp_path), {3: make_record(content.getvalue(), 3)}).open())
  image = images[3]
  np.testing.assert_allclose(image[:3], 255, atol=3)
  np.testing.assert_allclose(image[5:], 0, atol=3)


def test_a_fault_is_of_what_the_pipeline_decodes(tmp_path):
  """Else a restart would seem to help: no CMYK image becomes a grey one."""
  cmyk = make_record(encode(30, mode="CMYK"), 3)
  source = Shards(str(tmp_path), {3: cmyk}).open()
  grey = dataclasses.replace(RECIPE, channel_mean=(0.0,), channel_std=(1.0,))
  assert sources.fault(source, 3) is None
  with pytest.raises(UserError, match=r"example 3 .*Prepare the data again"):
    batches = (train_batches(grey, source) for _ in range(1))
    batches_lib.next_batch(batches, grey, "train", source, range(EXAMPLES), False)
  bad = BadExamples(str(tmp_path), 0, 1)
  bad.record("train", source, 3)
  bad.write()
  assert "failed once" not in (tmp_path / "bad_examples.jsonl").read_text()


def test_what_is_told_is_listed_once_with_its_fault(tmp_path, faulty, caplog):
  source = faulty.open()
  work_dir = tmp_path / "run[1]"  # No pattern, but a name.
  work_dir.mkdir()
  bad = BadExamples(str(work_dir), 0, 3)
  assert bad.write() == 0
  assert not list(work_dir.iterdir())
  for _ in range(2):
    bad.record("train", source, 10)
  assert bad.write() == bad.write() == 1
  (line,) = (work_dir / "bad_examples.jsonl").read_text().splitlines()
  line = json.loads(line)
  assert (line["split"], line["example"]) == ("train", 10)
  assert line["fault"] == sources.fault(source, 10)
  assert "example 10 " in caplog.text
  # Another task, which came upon it too and upon another.
  other = BadExamples(str(work_dir), 1, 3)
  other.record("train", source, 10)
  other.record("validation", source, 3)
  assert other.write() == 2
  assert "failed once" in (work_dir / "bad_examples.1.jsonl").read_text()
  # The run goes on.
  bad = BadExamples(str(work_dir), 0, 3)
  bad.record("train", source, 10)
  assert bad.write() == 2
  assert len((work_dir / "bad_examples.jsonl").read_text().splitlines()) == 1


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, faulty, caplog, monkeypatch):
  source = faulty.open()
  work_dir = tmp_path / "run"
  work_dir.mkdir()
  bad = BadExamples(str(work_dir), 0, 3)
  bad.record("train", source, 10)

  def refuse(path, text):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as full:
    full.setattr(files, "write_text", refuse)
    bad.write()
  assert "/bad_examples.jsonl (" in caplog.text and not list(work_dir.iterdir())
  assert bad.write() == 1
  assert len((work_dir / "bad_examples.jsonl").read_text().splitlines()) == 1


def test_data_that_were_out_of_reach_for_a_moment(tmp_path):
  """No example has a fault now: the same command goes on, so a launcher may start it again."""

  def fail():
    raise tf.errors.UnavailableError(None, None, "Connection reset")
    yield

  source = Shards(str(tmp_path)).open()
  with pytest.raises(
    InterruptedRunError, match=r"Connection reset.*all .* can be read now"
  ) as error:
    batches_lib.next_batch(fail(), RECIPE, "train", source, range(EXAMPLES), False)
  assert error.value.status == 138


def test_a_header_is_as_the_tests_take_it(tmp_path):
  """The offsets above are true: each begins with the length of its record."""
  shards = Shards(str(tmp_path))
  for index, offset in enumerate(shards.offsets):
    with open(shards.paths[index // 8], "rb") as file:
      file.seek(offset)
      (length,) = struct.unpack("<Q", file.read(8))
    assert length == len(make_record(encode(10 * index), index))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_jpegs_are_decoded_as_pillow_decodes_them(tmp_path, subsampling):
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, "JPEG", quality=90, subsampling=subsampling)
  source = Shards(str(tmp_path), {3: make_record(content.getvalue(), 3)}).open()
  recipe = dataclasses.replace(RECIPE, image_size=32)
  batches = train_batches(recipe, source)
  images = np.concatenate([images.numpy().reshape(-1, 32, 32, 3) for images, _ in batches])
  labels = np.concatenate([labels.numpy().ravel() for _, labels in batches])
  np.testing.assert_array_equal(images[labels == 3][0], Image.open(content))
