"""Bad data and splits: one clear line each, and no work directory is made."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.bad_input.checks import (
  LONG,
  SMALL,
  check_main,
  replace,
)
from tf_largebatch.data import sources


class FewPictures(tfds.core.GeneratorBasedBuilder):
  """Images of several sizes, which are read through an index of their records."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for index in range(count):
      yield index, {"image": np.zeros((8 + index, 9, 3), np.uint8), "label": index % 5}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("pictures") / "data"
  FewPictures(data_dir=data_dir).download_and_prepare()
  return data_dir


_VERSION = "few_pictures/1.0.0"


_SHARD = f"{_VERSION}/few_pictures-train.tfrecord-00000-of-00001"


# Case → (change of the data, further flags, part of the error).
DATA = {
  "a data_dir that is a file": (None, [f"--data_dir={__file__}"], __file__),
  "a file in place of the data set": (replace("few_pictures", b""), [], "few_pictures"),
  "a file in place of the version": (replace(_VERSION, b""), [], "few_pictures"),
  "an unprepared version": (replace(_VERSION, None), [], "few_pictures"),
  "dataset_info.json junk": (replace(f"{_VERSION}/dataset_info.json", b"{"), [], "few_pictures"),
  "dataset_info.json binary": (
    replace(f"{_VERSION}/dataset_info.json", b"\xff\0"),
    [],
    "few_pictures",
  ),
  "a truncated shard": (replace(_SHARD, b"\0" * 30), [], _SHARD),
  "an empty shard": (replace(_SHARD, b""), [], _SHARD),
  "a directory in place of a shard": (replace(_SHARD, None), [], _SHARD),
  "an unknown version": (None, ["--dataset=few_pictures:9.9.9"], "few_pictures:9.9.9"),
  "an unknown config": (None, ["--dataset=few_pictures/blue"], "few_pictures/blue"),
  "a misspelt data set": (None, ["--dataset=cifar11"], "did you mean cifar10"),
  "an empty name": (None, ["--dataset="], "dataset ''"),
  "a name that is a path": (None, ["--dataset=../data"], "../data"),
  "a name of 10 kB": (None, [f"--dataset={LONG}"], "xxx"),
  "a name of two lines": (None, ["--dataset=few\npictures"], r"few\npictures"),
  "an unknown split": (None, ["--train_split=training"], "'training'"),
  "an empty split": (None, ["--train_split="], "split ''"),
  "a slice not closed": (None, ["--train_split=train[:5"], "'train[:5'"),
  "a slice of words": (None, ["--train_split=train[a:b]"], "'train[a:b]'"),
  "a slice backwards": (None, ["--train_split=train[9:5]"], "train[9:5]"),
  "a slice backwards by one": (None, ["--train_split=train[9:8]"], "train[9:8]"),
  "a slice backwards after another": (
    None,
    ["--train_split=train[:9]+train[8:5]"],
    "train[:9]+train[8:5]",
  ),
  "a slice of the reserved name all": (None, ["--train_split=all[:5]"], "'all[:5]'"),
  "a slice of 200 %": (None, ["--train_split=train[:200%]"], "train[:200%]"),
  "an empty slice": (None, ["--validation_split=test[:0]"], "test[:0]"),
  "a split of 10 kB": (None, [f"--validation_split={LONG}"], "xxx"),
  "a slice of 5000 digits": (None, [f"--train_split=train[:{'9' * 5000}]"], "999"),
  "a slice up to 00": (
    None,
    ["--dataset=synthetic", "--validation_split=validation[:00]"],
    "validation[:00]",
  ),
  "a synthetic slice of 5000 digits": (
    None,
    ["--dataset=synthetic", f"--train_split=train[:{'9' * 5000}]"],
    "999",
  ),
  "images larger than memory": (
    None,
    ["--dataset=synthetic", "--image_size=60000"],
    "image_size below 60000",
  ),
  "a step larger than the split": (None, ["--workers=400"], "4000 images is more than the 20"),
  "two channels": (None, ["--channel_mean=1,2"], "channel_mean=1.0,2.0"),
  "workers_per_pass that does not divide": (
    None,
    ["--workers_per_pass=7"],
    "workers_per_pass=7 does not divide",
  ),
  "NCCL without a GPU": (None, ["--communication=nccl"], "'nccl'"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, pictures, tmp_path, capfd, monkeypatch):
  change, arguments, names = DATA[case]
  monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [])
  data_dir = tmp_path / "data"
  shutil.copytree(pictures, data_dir)
  if change:
    change(data_dir)
  check_main(
    capfd,
    tmp_path / "run",
    names,
    *SMALL,
    "--dataset=few_pictures",
    "--train_split=train",
    "--validation_split=test",
    f"--data_dir={data_dir}",
    f"--index_dir={tmp_path / 'index'}",
    *arguments,
  )
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("index_dir", ["file", "file/under", "foo://x", LONG])
def test_an_index_that_cannot_be_saved_costs_a_warning(index_dir, pictures, tmp_path, caplog):
  """The run does not need a saved index."""
  (tmp_path / "file").write_text("precious")
  index_dir = index_dir if "://" in index_dir else str(tmp_path / index_dir)
  with caplog.at_level("WARNING", logger="absl"):
    source = sources.open_source("few_pictures", "train", str(pictures), index_dir=index_dir)
  assert source.num_examples == 20 and "The index cannot be saved" in caplog.text
  assert (tmp_path / "file").read_text() == "precious"
