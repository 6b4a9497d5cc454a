"""Sources return any example by its index."""

import io
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from tests.launching import run_program
from tf_largebatch.data import sources
from tf_largebatch.errors import InterruptedRunError, UserError


def image_of(index, shape):
  return np.full(shape, index, np.uint8)


class TinyFixed(tfds.core.GeneratorBasedBuilder):
  """Images of one shape; a test split but no validation split."""

  VERSION = tfds.core.Version("1.0.0")
  SHAPE = (8, 8, 1)
  SPLITS = ("train", "test")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=self.SHAPE),
        "label": tfds.features.ClassLabel(num_classes=7),
      }
    )
    return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples() for split in self.SPLITS}

  def _generate_examples(self):
    for index in range(20):
      shape = tuple(side or 5 + index for side in self.SHAPE)
      yield index, {"image": image_of(index, shape), "label": index % 7}


class TinyVaried(TinyFixed):
  """Images of many shapes, which stay encoded on disk; the only split is train."""

  SHAPE = (None, None, 3)
  SPLITS = ("train",)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("data"))
  for builder in (TinyFixed, TinyVaried):
    builder(data_dir=directory).download_and_prepare()
  return directory


def read_all(source):
  dataset = tf.data.Dataset.range(source.num_examples).batch(7).map(source.read).unbatch()
  if source.image_shape is None:
    dataset = dataset.map(source.parse)
  pairs = []
  for image, label in dataset:
    if image.dtype == tf.string:
      image = tf.io.decode_png(image)
    pairs.append((image.numpy(), int(label)))
  return pairs


@pytest.mark.parametrize(
  "dataset, kind", [("tiny_fixed", sources.ArraySource), ("tiny_varied", sources.TFRecordSource)]
)
def test_every_example_is_read_by_its_index(data_dir, dataset, kind):
  source = sources.open_source(dataset, "train", data_dir)
  assert isinstance(source, kind)
  assert (source.num_examples, source.num_classes) == (20, 7)
  pairs = read_all(source)
  values = [int(image[0, 0, 0]) for image, _ in pairs]
  assert sorted(values) == list(range(20))
  for value, (image, label) in zip(values, pairs, strict=True):
    shape = (8, 8, 1) if dataset == "tiny_fixed" else (5 + value, 5 + value, 3)
    np.testing.assert_array_equal(image, image_of(value, shape))
    assert label == value % 7


@pytest.mark.parametrize("dataset", ["tiny_fixed", "tiny_varied"])
def test_a_slice_is_a_range_of_the_whole(data_dir, dataset):
  whole = read_all(sources.open_source(dataset, "train", data_dir))
  part = read_all(sources.open_source(dataset, "train[3:9]", data_dir))
  assert len(part) == 6
  for (image, label), (expected, expected_label) in zip(part, whole[3:9], strict=True):
    np.testing.assert_array_equal(image, expected)
    assert label == expected_label


def test_data_is_identified_by_version_and_size(data_dir):
  found = sources.identify("tiny_varied", "train[3:9]", "train[:50%]+train[9:]", data_dir)
  assert found == {
    "name": "tiny_varied/1.0.0",
    "train_examples": 6,
    "validation_examples": 10 + 11,
  }
  assert sources.identify("synthetic", "train", "validation", "") == {"name": "synthetic"}


@pytest.mark.parametrize("split", ["train[9:8]", "train[:9]+train[8:5]", "train[-3:-5]"])
def test_a_slice_that_runs_backwards_is_refused(data_dir, split):
  """TensorFlow Datasets reads [9:8] as [9:], and adds nine and minus three examples to six."""
  for refused in (
    lambda: sources.open_source("tiny_varied", split, data_dir),
    lambda: sources.identify("tiny_varied", "train", split, data_dir),
  ):
    with pytest.raises(UserError, match="after its beginning"):
      refused()


@pytest.fixture
def array_records(tmp_path):
  builder = TinyVaried(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  (path,) = builder.data_path.glob("*.array_record*")
  return str(tmp_path), path


def test_array_records(array_records):
  data_dir, path = array_records
  source = sources.open_source("tiny_varied", "train[3:9]", data_dir)
  assert isinstance(source, sources.ArrayRecordSource)
  whole = read_all(sources.open_source("tiny_varied", "train", data_dir))
  values = [int(image[0, 0, 0]) for image, _ in whole]
  assert sorted(values) == list(range(20))
  for value, (image, label) in zip(values, whole, strict=True):
    np.testing.assert_array_equal(image, image_of(value, (5 + value, 5 + value, 3)))
    assert label == value % 7
  for (image, label), (expected, expected_label) in zip(read_all(source), whole[3:9], strict=True):
    np.testing.assert_array_equal(image, expected)
    assert label == expected_label
  assert source.describe(2) == f"example 2 (record 5 of {path})"
  assert sources.fault(source, 2) is None


def test_damaged_array_records(array_records):
  data_dir, path = array_records
  content = path.read_bytes()
  source = sources.open_source("tiny_varied", "train", data_dir)
  record = source.record(7)
  place = content.index(record[10:])
  path.write_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
  source = sources.open_source("tiny_varied", "train", data_dir)
  text = sources.fault(source, 7)
  assert text.startswith(f"example 7 (record 7 of {path}): ") and "hash mismatch" in text
  assert [i for i in range(20) if sources.fault(source, i)] == [7]
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=f"{path} has 0 records, .* with 20 there"):
    sources.open_source("tiny_varied", "train", data_dir)
  path.unlink()
  with pytest.raises(UserError, match=rf"{path}, .* cannot be read \(No such file"):
    sources.open_source("tiny_varied", "train", data_dir)


def test_an_array_record_that_cannot_be_read_is_not_damaged(array_records):
  """Replaces the reader's open file by a directory, so that the system call fails."""
  data_dir, path = array_records
  source = sources.open_source("tiny_varied", "train", data_dir)
  descriptors = {
    int(name): os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
  }
  directory = os.open(data_dir, os.O_RDONLY)
  os.dup2(directory, next(number for number, name in descriptors.items() if name == str(path)))
  os.close(directory)
  with pytest.raises(InterruptedRunError, match=rf"{path} cannot be reached .*pread") as error:
    sources.fault(source, 7)
  assert error.value.status == 138


def test_fingerprints_of_decoded_images(tmp_path):
  """They are of the pixels and labels in their order, however the images are encoded."""

  def store(name, images, labels, **options):
    files = []
    for image in images:
      file = io.BytesIO()
      Image.fromarray(image).save(file, "PNG", **options)
      files.append(file.getvalue())

    class Encoded(tfds.core.GeneratorBasedBuilder, skip_registration=True):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        features = {
          "image": tfds.features.Image(shape=(8, 8, 3)),
          "label": tfds.features.ClassLabel(num_classes=7),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for index, (file, label) in enumerate(zip(files, labels, strict=True)):
          yield index, {"image": file, "label": label}

    Encoded.name = name
    Encoded(data_dir=tmp_path).download_and_prepare()
    return sources.open_source(name, "train", str(tmp_path)).fingerprint

  images = np.random.default_rng(0).integers(0, 99, (6, 8, 8, 3), np.uint8)
  labels = list(range(6))
  expected = store("plain", images, labels, compress_level=9)
  assert expected.startswith("pixels:")
  assert store("uncompressed", images, labels, compress_level=0) == expected
  changed = images.copy()
  changed[5, 7, 7, 2] += 1
  others = {
    store("pixel", changed, labels),
    store("label", images, [*labels[:5], 0]),
    store("order", images[::-1], labels[::-1]),
    store("fewer", images[:5], labels[:5]),
  }
  assert len(others - {expected}) == 4


def test_fingerprints_of_array_records(array_records, tmp_path):
  data_dir, path = array_records

  def fingerprint(split="train"):
    return sources.open_source("tiny_varied", split, data_dir).fingerprint

  expected = fingerprint()
  assert expected.startswith("array_record:") and expected == fingerprint()
  assert len({expected, fingerprint("train[1:]"), fingerprint("train[:19]")}) == 3
  source = sources.open_source("tiny_varied", "train", data_dir)
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for index in reversed(range(20)):
    writer.write(source.record(index))
  del source
  writer.close()
  assert fingerprint() != expected


def test_slices_across_shards(tmp_path):
  """Each file has its own skip and take, as in TensorFlow Datasets' instructions."""
  instructions, expected = [], []
  for shard, (skip, take) in enumerate([(4, -1), (0, -1), (0, 3)]):
    path = str(tmp_path / f"shard{shard}")
    with tf.io.TFRecordWriter(path) as writer:
      for index in range(6):
        name = f"{shard}-{index}" * (index + 1)
        feature = {
          "picture": tf.train.Feature(bytes_list=tf.train.BytesList(value=[name.encode()])),
          "kind": tf.train.Feature(int64_list=tf.train.Int64List(value=[index])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        writer.write(example.SerializeToString())
        if index >= skip and (take == -1 or index < skip + take):
          expected.append((name.encode(), index))
    instructions.append(
      tfds.core.utils.shard_utils.FileInstruction(path, skip=skip, take=take, examples_in_shard=6)
    )
  source = sources.TFRecordSource(instructions, "picture", "kind", 6, None)
  records = source.read(tf.range(source.num_examples, dtype=tf.int64))
  found = [source.parse(record) for record in records]
  assert [(name.numpy(), int(kind)) for name, kind in found] == expected


def test_synthetic_images_depend_on_their_index_alone():
  source = sources.open_source("synthetic", "train[:2000]", "", 8)
  assert (source.num_examples, source.num_classes, source.image_shape) == (2000, 1000, (8, 8, 3))
  (image, other), (label, _) = source.read(tf.constant([1234, 234], tf.int64))
  (again,), _ = source.read(tf.constant([1234], tf.int64))
  assert image.dtype == tf.uint8 and int(label) == 234
  np.testing.assert_array_equal(image, again)
  assert np.any(image.numpy() != other.numpy())
  # Two examples of a class share its mean: 64 values of noise within 64 of it.
  np.testing.assert_allclose(
    np.mean(image.numpy(), (0, 1)), np.mean(other.numpy(), (0, 1)), atol=30
  )


@pytest.mark.parametrize(
  "dataset, split", [("synthetic", "test"), ("synthetic", "train[5:9]"), ("tiny_fixed", "val")]
)
def test_a_missing_split_names_those_that_exist(data_dir, dataset, split):
  with pytest.raises(UserError) as error:
    sources.open_source(dataset, split, data_dir)
  assert split in str(error.value) and "train" in str(error.value)
  assert "\n" not in str(error.value)


def test_defaults(data_dir):
  fixed = sources.defaults("tiny_fixed", data_dir)
  assert fixed.validation_split == "test"
  assert fixed.image_shape == (8, 8, 1)
  assert len(fixed.channel_mean) == len(fixed.channel_std) == 1
  synthetic = sources.defaults("synthetic", data_dir)
  assert synthetic.validation_split == "validation" and synthetic.image_shape is None
  # The usual ImageNet values: 255 times (0.485, 0.456, 0.406), (0.229, 0.224, 0.225).
  np.testing.assert_allclose(
    synthetic.channel_mean, 255 * np.array([0.485, 0.456, 0.406]), rtol=1e-12
  )
  np.testing.assert_allclose(
    synthetic.channel_std, 255 * np.array([0.229, 0.224, 0.225]), rtol=1e-12
  )
  with pytest.raises(UserError, match="no validation or test split"):
    sources.defaults("tiny_varied", data_dir)
  assert sources.defaults("tiny_varied", data_dir, "train[:5]").validation_split == "train[:5]"


def test_more_shards_than_open_files(tmp_path):
  """ArrayRecord's readers keep their files open."""
  builder = TinyVaried(data_dir=tmp_path, file_format="array_record")
  config = tfds.download.DownloadConfig(num_shards=20)
  builder.download_and_prepare(download_config=config)
  program = f"""
import json, os, resource
from tf_largebatch.data import sources
limit = len(os.listdir("/proc/self/fd")) + 19
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
source = sources.open_source("tiny_varied", "train", {str(tmp_path)!r})
records = [source.record(index) for index in (*range(source.num_examples), 0)]
print(json.dumps([len(source._filenames), len(set(records)), source.num_examples]))
"""
  shards, different, examples = run_program(program)
  assert shards == 20 and different == examples
