"""Bad examples and unusual images, from the records to the batches."""

import dataclasses
import errno
import io
import os
import struct
import unittest.mock as mock

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.data.faulty_records import (
  EXAMPLES,
  FAULTS,
  RECIPE,
  SHARD_EXAMPLES,
  Shards,
  encode,
  faulty_shards,
  make_record,
  read_evaluation,
  read_train_batches,
)
from tf_largebatch.data import input_pipeline, memory_sources, sources
from tf_largebatch.errors import InterruptedRunError, UserError


@pytest.fixture
def faulty(tmp_path):
  return faulty_shards(str(tmp_path))


def test_the_offsets_of_the_test_records_are_correct(tmp_path):
  """Each record begins with its length."""
  shards = Shards(str(tmp_path))
  for index, offset in enumerate(shards.offsets):
    with open(shards.paths[index // 8], "rb") as file:
      file.seek(offset)
      (length,) = struct.unpack("<Q", file.read(8))
    assert length == len(make_record(encode(10 * index), index))


def test_a_fault_names_the_examples_file_and_offset(faulty):
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


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("augmentation", ["none", "area_crop"])
def test_skip_uses_the_next_example_and_reports(faulty, augmentation, cache):
  source = faulty.open()
  source = sources.CachedSource(source) if cache else source
  recipe = dataclasses.replace(RECIPE, augmentation=augmentation)
  reported = []
  batches = read_train_batches(recipe, source, reported.append)
  ids = np.stack(
    [[input_pipeline.example_ids(recipe, EXAMPLES, s, w) for w in range(2)] for s in range(2)]
  )
  labels = np.stack([labels for _, labels in batches])
  levels = np.stack([images.numpy()[..., 4, 4, 0] for images, _ in batches])
  # A crop that lies in the intact part of the truncated image is used.
  used = {2} if augmentation == "area_crop" and 2 in labels[ids == 2] else set()
  # Reported twice if the next epoch has been read ahead.
  assert set(reported) | used == set(FAULTS)
  expected = ids.copy()
  for bad in sorted(set(FAULTS) - used, reverse=True):
    expected[expected == bad] = (bad + 1) % EXAMPLES
  # 8, which would replace 7, is bad too.
  expected[ids == 7] = 9
  np.testing.assert_array_equal(labels, expected)
  np.testing.assert_allclose(levels, 10 * expected, atol=2)


def fail_once(monkeypatch, source, method, arguments, error):
  """Makes the first call of a method that begins with some arguments raise an error."""
  original, failed = getattr(source, method), []

  def replacement(*given):
    if given[: len(arguments)] == arguments and not failed:
      failed.append(given)
      raise error
    return original(*given)

  monkeypatch.setattr(source, method, replacement)
  return failed


@pytest.mark.parametrize("index", [6, 9])  # 9 is also read in place of 7 and 8, which are bad.
@pytest.mark.parametrize(
  "code, status, names", [(errno.EMFILE, 1, "ulimit -n"), (errno.ENFILE, 138, "in system")]
)
def test_too_many_open_files_are_not_a_bad_example(faulty, monkeypatch, index, code, status, names):
  source, shard = faulty.open(), index // SHARD_EXAMPLES
  error = OSError(code, os.strerror(code), faulty.paths[shard])
  failed = fail_once(monkeypatch, source, "_read_range", (shard, faulty.offsets[index]), error)
  reported = []
  with pytest.raises(tf.errors.OpError) as raised:
    read_train_batches(RECIPE, source, reported.append)
  assert failed and not set(reported) - set(FAULTS)
  found = sources.read_error(source, "train", raised.value)
  assert found.status == status and faulty.paths[shard] in str(found) and names in str(found)


@pytest.mark.parametrize("error", [ValueError("its CRC is wrong"), MemoryError()])
def test_an_example_that_can_be_read_at_the_second_attempt_is_not_bad(tmp_path, monkeypatch, error):
  source, reported = Shards(str(tmp_path)).open(), []
  failed = fail_once(monkeypatch, source, "record", (6,), error)
  with pytest.raises(tf.errors.OpError) as raised:
    read_train_batches(RECIPE, source, reported.append)
  assert failed and not reported
  assert sources.read_error(source, "train", raised.value).status in (1, 138)


def test_too_little_memory_is_not_a_bad_example(tmp_path, monkeypatch):
  source = Shards(str(tmp_path)).open()
  error = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
  monkeypatch.setattr(sources.tf.io, "decode_image", mock.Mock(side_effect=error))
  with pytest.raises(InterruptedRunError, match=r"example 6 .*memory is exhausted") as raised:
    sources.fault(source, 6)
  assert raised.value.status == 1


def test_a_cache_holds_no_example_that_could_not_be_reached(tmp_path):
  shards = Shards(str(tmp_path))
  source = shards.open()
  os.rename(shards.paths[1], f"{shards.paths[1]}.away")
  with pytest.raises(InterruptedRunError, match=f"{shards.paths[1]} cannot be reached") as error:
    sources.CachedSource(source)
  assert error.value.status == 138


def test_evaluation_counts_every_readable_example_once(faulty):
  reported = []
  _, labels, weights = read_evaluation(faulty.open(), reported.append)
  assert weights.tolist() == [-1 if i in FAULTS else 1 for i in range(EXAMPLES)] + [0] * 4
  assert labels[weights == 1].tolist() == [i for i in range(EXAMPLES) if i not in FAULTS]
  assert set(reported) == set(FAULTS)


def test_a_cache_returns_the_same_examples(tmp_path):
  source = Shards(str(tmp_path)).open()
  cached = sources.CachedSource(source)
  for index in range(EXAMPLES):
    assert cached.read([index])[0].numpy() == source.record(index)
    image, label = cached.parse(cached.read([index])[0])
    assert (image, label) == (encode(10 * index), index)


def test_a_cache_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(memory_sources, "free_memory", lambda: 99)
  with pytest.raises(UserError, match="use --nocache"):
    sources.CachedSource(Shards(str(tmp_path)).open())


def test_a_wrong_length_is_found_when_the_shards_are_indexed(tmp_path):
  shards = Shards(str(tmp_path))
  shards.change(11, 9)
  with pytest.raises(UserError, match=f"{shards.paths[1]} is damaged: .* {shards.offsets[11]} "):
    shards.open()


def test_a_missing_shard_is_named(tmp_path):
  shards = Shards(str(tmp_path))
  os.remove(shards.paths[1])
  with pytest.raises(UserError, match=f"{shards.paths[1]}, a shard .* cannot be read"):
    shards.open()


# Kinds of images that ImageNet has, all of grey level 77.
UNUSUAL_IMAGES = {
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
  "a large one": encode(77, size=(3000, 2000)),
  "bytes after its end": encode(77) + b"\0" * 33,
}


@pytest.mark.parametrize("augmentation", ["none", "area_crop", "pad_crop"])
def test_unusual_images_are_read(tmp_path, augmentation):
  records = {i: make_record(image, i) for i, image in enumerate(UNUSUAL_IMAGES.values())}
  source = Shards(str(tmp_path), records).open()
  recipe = dataclasses.replace(
    RECIPE, augmentation=augmentation, channel_mean=(77.0,) * 3, image_size=32
  )
  batches = [[x.numpy() for x in batch] for batch in read_train_batches(recipe, source)]
  images = np.concatenate([images.reshape(-1, 32, 32, 3) for images, _ in batches])
  labels = np.concatenate([labels.ravel() for _, labels in batches])
  evaluated, *_ = read_evaluation(source)
  for index, name in enumerate(UNUSUAL_IMAGES):
    assert np.any(labels == index)
    np.testing.assert_allclose(images[labels == index], 77, atol=2, err_msg=name)
    np.testing.assert_allclose(evaluated[index], 77, atol=2, err_msg=name)


def test_exif_does_not_rotate_an_image(tmp_path):
  """As in the paper's code base and in torchvision, the pixels keep their stored order."""
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: rotated by 90 degrees.
  pixels = np.zeros((40, 40, 3), np.uint8)
  pixels[:20] = 255
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, "JPEG", quality=100, exif=exif)
  images, *_ = read_evaluation(
    Shards(str(tmp_path), {3: make_record(content.getvalue(), 3)}).open()
  )
  image = images[3]
  np.testing.assert_allclose(image[:3], 255, atol=3)
  np.testing.assert_allclose(image[5:], 0, atol=3)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_jpegs_are_decoded_as_pillow_decodes_them(tmp_path, subsampling):
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, "JPEG", quality=90, subsampling=subsampling)
  source = Shards(str(tmp_path), {3: make_record(content.getvalue(), 3)}).open()
  recipe = dataclasses.replace(RECIPE, image_size=32)
  batches = read_train_batches(recipe, source)
  images = np.concatenate([images.numpy().reshape(-1, 32, 32, 3) for images, _ in batches])
  labels = np.concatenate([labels.numpy().ravel() for _, labels in batches])
  np.testing.assert_array_equal(images[labels == 3][0], Image.open(content))
