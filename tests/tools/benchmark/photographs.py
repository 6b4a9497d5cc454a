"""A tiny prepared data set of photographs: JPEGs of one colour each, of many sizes."""

import functools
import io
import json
import pathlib
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tools.benchmark.readers.files import write_files
from tools.benchmark.readers.task import Task

COUNT = 80
_CLASSES = 10
# The colour of each class.
COLOURS = np.array([[20 * label + 30, 128, 220 - 20 * label] for label in range(_CLASSES)])


class TinyPhotographs(tfds.core.GeneratorBasedBuilder):
  """JPEGs whose colour depends on their label."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=_CLASSES),
      }
    )
    return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(COUNT), "few": self._generate_examples(31)}

  def _generate_examples(self, count):
    for index in range(count):
      label = index % _CLASSES
      image = np.broadcast_to(COLOURS[label], (40 + index % 7, 50 - index % 5, 3))
      buffer = io.BytesIO()
      Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=95)
      yield index, {"image": io.BytesIO(buffer.getvalue()), "label": label}


class TinyPngs(TinyPhotographs):
  """Declared as JPEGs, but stored as PNGs."""

  def _generate_examples(self, count):
    for index in range(count):
      buffer = io.BytesIO()
      Image.new("RGB", (8, 6)).save(buffer, "PNG")
      yield index, {"image": io.BytesIO(buffer.getvalue()), "label": 0}


@functools.cache  # Once for all tests of a process; removed when it exits.
def _directory() -> tempfile.TemporaryDirectory:
  directory = tempfile.TemporaryDirectory()
  # Several shards, so that their order matters.
  config = tfds.download.DownloadConfig(num_shards=3)
  for builder in (TinyPhotographs, TinyPngs):
    builder(data_dir=directory.name).download_and_prepare(download_config=config)
  TinyPhotographs(
    data_dir=f"{directory.name}/array_record", file_format="array_record"
  ).download_and_prepare()
  return directory


def data_dir() -> str:
  """The directory of the prepared data sets; its array_record/ holds the other file format."""
  return _directory().name


def write(files, dataset="tiny_photographs", split="train", examples=10_000, data_dir=None) -> Task:
  """Writes the JPEGs to `files`; the task as a reader's process receives it."""
  task = Task(dataset, split, data_dir or _directory().name, str(files), cores=1)
  found = write_files(task, examples)
  return Task(**{**vars(task), **json.loads(json.dumps(found))})


@functools.cache
def task() -> Task:
  """The task of the whole training split."""
  files = pathlib.Path(data_dir()) / "files"
  files.mkdir()
  return write(files)
