"""A run notices that its data set was prepared again in another order."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.training.small_runs import RECIPE, interrupting, train
from tf_largebatch.errors import UserError
from tf_largebatch.training.metrics import MetricsWriter


class Prepared(tfds.core.GeneratorBasedBuilder):
  """Images that depend on their key, by which TensorFlow Datasets orders them."""

  VERSION = tfds.core.Version("1.0.0")
  PREFIX = "a"

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples(70), "test": self._generate_examples(20)}

  def _generate_examples(self, count):
    for index in range(count):
      image = np.full((9, 8, 3), index, np.uint8)
      yield f"{self.PREFIX}{index}", {"image": image, "label": index % 5}


def test_a_run_on_data_in_another_order_is_not_continued(tmp_path, monkeypatch):
  recipe = dataclasses.replace(
    RECIPE, dataset="prepared", train_split="train", validation_split="test"
  )

  def prepare(prefix):
    monkeypatch.setattr(Prepared, "PREFIX", prefix)
    Prepared(data_dir=tmp_path / prefix).download_and_prepare()
    return {"data_dir": str(tmp_path / prefix), "index_dir": str(tmp_path / "index")}

  first, second = prepare("a"), prepare("b")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(MetricsWriter, "train", interrupting("train", 4))
    train(tmp_path / "run", recipe, **first)
  with pytest.raises(UserError, match="on other examples, or on the same ones in another order"):
    train(tmp_path / "run", recipe, **second)
  assert train(tmp_path / "run", recipe, **first)["status"] == "complete"
