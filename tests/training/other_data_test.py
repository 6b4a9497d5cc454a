"""A run notices that its data set was prepared again in another order."""

import dataclasses
import json
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.training.small_runs import RECIPE, interrupting, train
from tf_largebatch.errors import UserError
from tf_largebatch.training import trainer
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
  # A run of an older version has no fingerprints.
  path = tmp_path / "run" / "recipe.json"
  facts = json.loads(path.read_text())
  fingerprints = facts["data"].pop("fingerprints")
  path.write_text(json.dumps(facts))
  result = train(tmp_path / "run", recipe, **first)
  assert json.loads(path.read_text())["data"]["fingerprints"] == fingerprints
  # A complete run's result needs no data.
  assert train(tmp_path / "run", recipe, **second) == result


def test_tasks_agree_on_the_data_and_on_what_is_stored(tmp_path, monkeypatch):
  """Otherwise one task would refuse and the others would wait for it."""
  agreed = []
  monkeypatch.setattr(trainer, "require_agreement", lambda _, facts, reason: agreed.append(facts))
  source = types.SimpleNamespace(fingerprint="tfrecord:1")
  cluster = types.SimpleNamespace(num_tasks=2)
  arguments = ({"name": "x"}, source, source, str(tmp_path), cluster, None)
  now = {"train": "tfrecord:1", "validation": "tfrecord:1"}
  assert trainer._with_fingerprints(*arguments) == {"name": "x", "fingerprints": now}
  before = {"train": "tfrecord:2", "validation": "tfrecord:1"}
  stored = {"recipe": RECIPE.to_dict(), "data": {"name": "x", "fingerprints": before}}
  (tmp_path / "recipe.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match="on other examples"):
    trainer._with_fingerprints(*arguments)
  assert agreed == [(now, None), (now, before)]


@pytest.mark.parametrize(
  "stored, now, is_refused",
  [
    ("pixels:1", "pixels:2", True),
    ("pixels:1", "tfrecord:1", True),
    ("tfrecord:1", "array_record:1", True),
    ("pixels:1", "pixels:1", False),
    # An older version's, of data that are decoded when they are opened.
    ("tfrecord:1", "pixels:2", False),
  ],
)
def test_which_fingerprints_contradict_each_other(tmp_path, stored, now, is_refused):
  fingerprints = {"train": "tfrecord:7", "validation": stored}
  facts = {"recipe": RECIPE.to_dict(), "data": {"name": "x", "fingerprints": fingerprints}}
  (tmp_path / "recipe.json").write_text(json.dumps(facts))
  train, validation = (types.SimpleNamespace(fingerprint=each) for each in ("tfrecord:7", now))
  cluster = types.SimpleNamespace(num_tasks=1)
  arguments = ({"name": "x"}, train, validation, str(tmp_path), cluster, None)
  if is_refused:
    with pytest.raises(UserError, match="on other examples"):
      trainer._with_fingerprints(*arguments)
  else:
    found = {"train": "tfrecord:7", "validation": now}
    assert trainer._with_fingerprints(*arguments)["fingerprints"] == found
