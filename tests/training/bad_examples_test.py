"""Bad examples: the lists of them, and a whole run and an evaluation that meet some."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.data.faulty_records import faulty_shards
from tf_largebatch import files
from tf_largebatch.data import sources
from tf_largebatch.data.record_index import open_index
from tf_largebatch.errors import UserError
from tf_largebatch.models.networks import build_model
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import resolution, trainer
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.evaluation import make_evaluation
from tf_largebatch.training.metrics import read_metrics


@pytest.fixture
def faulty(tmp_path):
  return faulty_shards(str(tmp_path))


def test_each_example_is_listed_once_with_its_fault(tmp_path, faulty, caplog):
  source = faulty.open()
  work_dir = tmp_path / "run[1]"  # A name that is also a glob pattern.
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
  # Another task, which skips the same example and one more.
  other = BadExamples(str(work_dir), 1, 3)
  other.record("train", source, 10)
  other.record("validation", source, 3)
  assert other.write() == 2
  assert "failed once" in (work_dir / "bad_examples.1.jsonl").read_text()
  # The run is resumed.
  bad = BadExamples(str(work_dir), 0, 3)
  bad.record("train", source, 10)
  assert bad.write() == 2
  assert len((work_dir / "bad_examples.jsonl").read_text().splitlines()) == 1


def test_a_temporarily_full_disk_loses_no_line(tmp_path, faulty, caplog, monkeypatch):
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


class FewPhotographs(tfds.core.GeneratorBasedBuilder):
  """PNGs of several shapes, which stay encoded on disk."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(num_classes=5),
    }
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(20), "test": self._generate_examples(11)}

  def _generate_examples(self, count):
    for index in range(count):
      pixels = np.random.default_rng(index).integers(0, 256, (9 + index, 20, 3))
      yield index, {"image": pixels.astype(np.uint8), "label": index % 5}


@pytest.fixture
def damaged(tmp_path):
  """A data directory where a training and a test example are damaged; both by split."""
  builder = FewPhotographs(data_dir=tmp_path / "data")
  builder.download_and_prepare()
  bad = {}
  for split, example in (("train", 7), ("test", 3)):
    (path,) = builder.data_path.glob(f"*-{split}.tfrecord*")
    ((*offsets, _),) = open_index([str(path)], [20 if split == "train" else 11], None).offsets
    with open(path, "r+b") as file:
      file.seek(offsets[example] + 60)
      file.write(b"\0" * 8)
    bad[split] = (example, f"example {example} (offset {offsets[example]} of {path})")
  return str(tmp_path / "data"), bad


def train_on_photographs(data_dir, work_dir, **options):
  recipe = Recipe(
    dataset="few_photographs",
    image_size=8,
    augmentation="area_crop",
    network="resnet8",
    workers=2,
    per_worker_batch_size=5,
    epochs=2,
    warmup_epochs=1,
    decay_epochs=(),
  )
  options = RunOptions(
    data_dir=data_dir, work_dir=str(work_dir), evaluation_batch_size=4, **options
  )
  return trainer.train_and_evaluate(recipe, options)


def test_a_bad_example_ends_the_run_or_is_skipped(damaged, tmp_path):
  data_dir, bad = damaged
  with pytest.raises(UserError) as error:
    train_on_photographs(data_dir, tmp_path / "fails", index_dir=str(tmp_path / "index"))
  message = str(error.value)
  assert bad["train"][1] in message and "CRC" in message and "\n" not in message
  assert len(os.listdir(tmp_path / "index")) == 2  # Of train and of test.

  results = []
  for name, cache in (("skips", False), ("skips_cached", True)):
    directory = tmp_path / name
    results.append(train_on_photographs(data_dir, directory, bad_examples="skip", cache=cache))
    lines = (directory / "bad_examples.jsonl").read_text().splitlines()
    listed = {line["split"]: (line["example"], line["fault"]) for line in map(json.loads, lines)}
    assert len(lines) == 2 and listed.keys() == {"train", "test"}
    for split, (example, place) in bad.items():
      assert listed[split][0] == example and listed[split][1].startswith(place)
    evaluations = [r for r in read_metrics(str(directory)) if r["kind"] == "eval"]
    assert [record["bad_examples"] for record in evaluations] == [2, 2]
    # Errors are counted among the ten that can be read.
    assert all(r["error"] * 10 == pytest.approx(round(r["error"] * 10)) for r in evaluations)
  assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


def test_a_bad_validation_example_is_named(damaged, tmp_path):
  data_dir, bad = damaged
  source = sources.open_source("few_photographs", "test", data_dir)
  recipe = resolution.resolve(
    Recipe(dataset="few_photographs", image_size=8, augmentation="area_crop", workers=1),
    1,
    data_dir,
  )
  evaluate = make_evaluation(
    tf.distribute.get_strategy(), build_model(recipe, 5), recipe, source, 4
  )
  with pytest.raises(UserError) as error:
    evaluate()
  assert bad["test"][1] in str(error.value) and "--bad_examples=skip" in str(error.value)
