"""Data sets for the tests of surroundings."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.training import small_runs


class Squares(tfds.core.GeneratorBasedBuilder):
  """Images of one shape, which are held decoded in memory."""

  VERSION = tfds.core.Version("1.0.0")
  SHAPE = (8, 8, 3)

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=self.SHAPE),
      "label": tfds.features.ClassLabel(num_classes=5),
    }
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples(60), "test": self._generate_examples(20)}

  def _generate_examples(self, count):
    rng = np.random.default_rng(0)
    for index in range(count):
      shape = tuple(side or 6 + index % 5 for side in self.SHAPE)
      yield index, {"image": rng.integers(0, 255, shape, np.uint8), "label": index % 5}


class Rectangles(Squares):
  """Images of several shapes, which stay encoded on the disk."""

  SHAPE = (None, 9, 3)


def _prepare(builder, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("data")
  builder(data_dir=data_dir).download_and_prepare()
  return builder.name, str(data_dir)


@pytest.fixture(scope="session")
def decoded_set(tmp_path_factory):
  """(name, data_dir) of a data set that fits in memory."""
  return _prepare(Squares, tmp_path_factory)


@pytest.fixture(scope="session")
def encoded_set(tmp_path_factory):
  """(name, data_dir) of a data set that is read from the disk."""
  return _prepare(Rectangles, tmp_path_factory)


@pytest.fixture(scope="session")
def undisturbed_sha256(tmp_path_factory):
  """The digest of the weights of `small_runs.RECIPE`'s run."""
  return small_runs.train(tmp_path_factory.mktemp("undisturbed"))["weights_sha256"]
