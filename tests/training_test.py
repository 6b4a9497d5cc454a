"""A whole run of a small real network through the real loop, and what it leaves behind."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tf_largebatch import sources, training
from tf_largebatch.errors import UserError
from tf_largebatch.metrics import MetricsWriter, read_metrics
from tf_largebatch.recipe import Recipe
from tf_largebatch.record_index import record_offsets

RECIPE = Recipe(
  dataset="synthetic",
  train_split="train[:70]",
  validation_split="validation[:50]",
  image_size=8,
  augmentation="pad_crop",
  network="resnet20",
  dtype="bfloat16",
  workers=2,
  per_worker_batch_size=10,
  reference_batch_size=10,
  epochs=3,
  warmup_epochs=1.5,
  decay_epochs=(2,),
)
STEPS = 9  # 70 // 20 = 3 an epoch.


def train(work_dir, recipe=RECIPE, **arguments):
  return training.train_and_evaluate(
    recipe, data_dir="", work_dir=str(work_dir), log_every_steps=2, **arguments
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "whole"
  return directory, train(directory, run_flags="--log_every_steps=2\n")


def test_what_a_run_leaves(run):
  directory, result = run
  assert json.loads((directory / "result.json").read_text()) == result
  assert result["status"] == "complete" and result["steps"] == STEPS
  flags = (directory / "flags.txt").read_text().splitlines()
  assert flags[-1] == "--log_every_steps=2" and "--workers=2" in flags
  # What the recipe left out is there as chosen, so that it is the same recipe anywhere.
  assert "--channel_std=58.395,57.12,57.375" in flags
  facts = json.loads((directory / "recipe.json").read_text())
  assert facts["recipe"]["workers"] == 2
  np.testing.assert_allclose(facts["recipe"]["channel_mean"], [123.675, 116.28, 103.53])
  assert facts["derived"] == {
    "train_examples": 70,
    "global_batch_size": 20,
    "peak_learning_rate": 0.2,
    "steps_per_epoch": 3,
    "total_steps": STEPS,
    "workers_per_replica": 2,
  }
  assert {"tensorflow", "keras", "python"} <= facts["versions"].keys()
  assert facts["cluster"]["replicas"] == 1
  assert any(name.startswith("events") for name in os.listdir(directory / "tensorboard"))
  names = ["step-0000000003.npz", "step-0000000006.npz", "step-0000000009.npz"]
  assert sorted(os.listdir(directory / "checkpoints")) == names


def test_metrics(run):
  directory, result = run
  records = read_metrics(str(directory))
  trains = [record for record in records if record["kind"] == "train"]
  evaluations = [record for record in records if record["kind"] == "eval"]
  # Every second step and each end of an epoch.
  assert [record["step"] for record in trains] == [2, 3, 4, 6, 8, 9]
  assert [record["epoch"] for record in evaluations] == [1, 2, 3]
  errors = [record["error"] for record in evaluations]
  assert result["val_error"] == errors[-1]
  assert result["val_error_median_last_5"] == sorted(errors)[1]
  assert all(round(error * 50, 6) == round(error * 50) for error in errors)
  rates = {record["step"]: record["learning_rate"] for record in trains}
  # Steps are counted after they are done: the record of step s tells the rate of step s - 1.
  # Warmup from 0.1 to 0.2 over round(1.5 · 3) = 4 steps, a tenth from step 6 on.
  for step, rate in ((2, 0.125), (3, 0.15), (4, 0.175), (6, 0.2), (8, 0.02), (9, 0.02)):
    np.testing.assert_allclose(rates[step], rate, rtol=1e-6)
  for record in trains:
    assert record["images_per_second"] > 0 and 0 <= record["input_wait_share"] <= 1
    assert record["gradient_norm"] > 0 and record["weight_norm"] > 0
  np.testing.assert_allclose(trains[0]["momentum_correction_factor"], 0.125 / 0.1, rtol=1e-6)
  np.testing.assert_allclose(trains[4]["momentum_correction_factor"], 1, rtol=1e-6)


def test_the_same_command_again_prints_the_result(run):
  directory, result = run
  before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
  assert train(directory) == result
  assert {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()} == before


def test_another_recipe_is_refused_and_nothing_is_lost(run):
  directory, result = run
  with pytest.raises(UserError) as error:
    train(directory, dataclasses.replace(RECIPE, workers=4, seed=7))
  message = str(error.value)
  assert "\n" not in message and "workers is 2 there and 4 now" in message and "seed" in message
  assert json.loads((directory / "result.json").read_text()) == result


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
  """Cut off after epoch 2 was evaluated, before its checkpoint: two epochs are left to do."""
  evaluation = MetricsWriter.evaluation

  def cut_off(self, step, epoch, scalars):
    evaluation(self, step, epoch, scalars)
    if epoch == 2:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "evaluation", cut_off)
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path)
  assert not (tmp_path / "result.json").exists()
  again = train(tmp_path)
  directory, result = run
  assert again["weights_sha256"] == result["weights_sha256"]
  assert again["val_error"] == result["val_error"]
  comparable = [
    [(r["kind"], r["step"], r["loss"], r["error"]) for r in read_metrics(str(path))]
    for path in (tmp_path, directory)
  ]
  assert comparable[0] == comparable[1]


def test_model_keras_needs_no_code_of_ours_and_has_the_runs_error(run, tmp_path):
  directory, result = run
  source = sources.open_source("synthetic", "validation[:50]", "", 8)
  pairs = [source.read(np.int64(index)) for index in range(50)]
  np.savez(
    tmp_path / "images.npz",
    images=np.stack([image for image, _ in pairs]),
    labels=np.array([label for _, label in pairs]),
  )
  program = f"""
import hashlib, sys
import keras, numpy as np
model = keras.models.load_model({str(directory / "model.keras")!r})
data = np.load("images.npz")
wrong = np.argmax(model.predict(data["images"], verbose=0), 1) != data["labels"]
weights = b"".join(w.numpy().astype("<f4").tobytes() for w in model.weights)
assert not any(name.startswith("tf_largebatch") for name in sys.modules)
print(float(np.mean(wrong)), hashlib.sha256(weights).hexdigest())
"""
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  finished = subprocess.run(
    [sys.executable, "-c", program],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  error, digest = finished.stdout.split()
  assert float(error) == result["val_error"]
  assert digest == result["weights_sha256"]


def test_weights_sha256_is_of_all_weights_in_order(run):
  directory, result = run
  arrays = np.load(directory / "checkpoints" / f"step-{STEPS:010d}.npz")
  named = sorted(name for name in arrays.files if name.startswith("model/"))
  assert len(named) == 19 * (1 + 4) + 2  # Convolutions, each with a BN of four; kernel and bias.
  digest = hashlib.sha256(b"".join(arrays[name].astype("<f4").tobytes() for name in named))
  assert digest.hexdigest() == result["weights_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  wild = dataclasses.replace(RECIPE, reference_learning_rate=1e30, warmup="none")
  with pytest.raises(UserError, match="diverged"):
    train(tmp_path, wild)
  assert not (tmp_path / "checkpoints").exists()


def test_an_evaluation_that_is_not_finite_leaves_no_checkpoint(tmp_path):
  """The loss of the only step is that of the weights before it."""
  wild = dataclasses.replace(
    RECIPE, train_split="train[:20]", epochs=1, reference_learning_rate=1e30, warmup="none"
  )
  with pytest.raises(UserError, match="validation loss"):
    train(tmp_path, wild)
  assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "result.json").exists()


def test_cut_off_before_the_result_was_written(run, tmp_path):
  """All steps are done and saved: only model.keras and result.json are left to write."""
  directory, result = run
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  (copy / "result.json").unlink()
  (copy / "model.keras").unlink()
  assert train(copy) == result
  assert (copy / "model.keras").exists()


def test_damaged_results_are_told_in_one_line(run, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(run[0], copy)
  (copy / "result.json").write_text('{"status": "comp')
  with pytest.raises(UserError, match="is no result of a run"):
    train(copy)


@pytest.mark.parametrize(
  "workers, replicas, suggestion", [(3, 2, "2 or 4"), (1, 4, "such as 4"), (33, 8, "32 or 40")]
)
def test_workers_that_the_replicas_do_not_divide(workers, replicas, suggestion):
  with pytest.raises(UserError) as error:
    training.resolve(dataclasses.replace(RECIPE, workers=workers), replicas, "")
  assert f"workers={workers}" in str(error.value) and suggestion in str(error.value)


def test_resolve_chooses_what_was_left_out():
  left_out = Recipe(dataset="synthetic", epochs=2, warmup_epochs=1, decay_epochs=())
  resolved = training.resolve(left_out, 8, "")
  assert resolved.workers == 8
  assert resolved.validation_split == "validation"
  assert resolved.image_size == 224 and resolved.augmentation == "area_crop"
  with pytest.raises(UserError, match=r"1 values.*3 channels"):
    training.resolve(dataclasses.replace(left_out, channel_mean=(1.0,)), 8, "")


def test_a_minibatch_larger_than_the_data_is_refused(tmp_path):
  with pytest.raises(UserError, match="4000 images is more than the 70"):
    train(tmp_path, dataclasses.replace(RECIPE, workers=400))


@pytest.mark.parametrize(
  "flags, warned", [("fpu avx avx2", True), ("avx2 avx512_bf16", False), ("asimd bf16", False)]
)
def test_a_cpu_that_must_emulate_bfloat16_is_named(tmp_path, caplog, flags, warned):
  (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags} sse\n")
  with caplog.at_level("WARNING", logger="absl"):
    training._warn_of_slow_bfloat16(str(tmp_path / "cpuinfo"))
    training._warn_of_slow_bfloat16(str(tmp_path / "nothing"))
  assert len(caplog.records) == warned


class FewPhotographs(tfds.core.GeneratorBasedBuilder):
  """20 PNGs of several shapes, which stay encoded on disk."""

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
  """A data directory where a training and a validation example are damaged; their offsets."""
  builder = FewPhotographs(data_dir=tmp_path / "data")
  builder.download_and_prepare()
  bad = {}
  for split, example in (("train", 7), ("test", 3)):
    (path,) = builder.data_path.glob(f"*-{split}.tfrecord*")
    ((*offsets, _),) = record_offsets([str(path)], [20 if split == "train" else 11], None)
    with open(path, "r+b") as file:
      file.seek(offsets[example] + 60)
      file.write(b"\0" * 8)
    bad[split] = (example, f"example {example} (offset {offsets[example]} of {path})")
  return str(tmp_path / "data"), bad


def train_on_photographs(data_dir, work_dir, **arguments):
  recipe = Recipe(
    dataset="few_photographs",
    image_size=8,
    augmentation="area_crop",
    network="resnet20",
    workers=2,
    per_worker_batch_size=5,
    epochs=2,
    warmup_epochs=1,
    decay_epochs=(),
  )
  return training.train_and_evaluate(
    recipe, data_dir=data_dir, work_dir=str(work_dir), evaluation_batch_size=4, **arguments
  )


def test_a_bad_example_ends_the_run_or_is_left_out(damaged, tmp_path):
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


def test_a_validation_example_that_cannot_be_read(damaged, tmp_path):
  data_dir, bad = damaged
  source = sources.open_source("few_photographs", "test", data_dir)
  recipe = training.resolve(
    Recipe(dataset="few_photographs", image_size=8, augmentation="area_crop", workers=1),
    1,
    data_dir,
  )
  evaluate = training.make_evaluation(
    tf.distribute.get_strategy(), training.build_model(recipe, 5), recipe, source, 4
  )
  with pytest.raises(UserError) as error:
    evaluate()
  assert bad["test"][1] in str(error.value) and "--bad_examples=skip" in str(error.value)
