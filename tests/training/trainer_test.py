"""Whole runs of a small network: what they leave, and what resumed runs do."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.training.small_runs import RECIPE, STEPS, check_tensorboard, interrupting, train
from tf_largebatch.data import sources
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.signals import StopRequest
from tf_largebatch.training import trainer
from tf_largebatch.training.metrics import MetricsWriter, read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "whole"
  return directory, train(directory)


def test_what_a_run_leaves(run):
  directory, result = run
  assert json.loads((directory / "result.json").read_text()) == result
  assert result["status"] == "complete" and result["steps"] == STEPS
  flags = (directory / "flags.txt").read_text().splitlines()
  assert {"--log_every_steps=2", "--workers=2"} <= set(flags)
  # Defaults that depend on the data are written out, so that the flagfile works anywhere.
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
  names = [f"step-{step:010d}.{kind}" for step in (3, 6, 9) for kind in ("json", "npz")]
  assert sorted(os.listdir(directory / "checkpoints")) == names
  manifests = [json.loads((directory / "checkpoints" / name).read_text()) for name in names[::2]]
  evaluations = [r for r in read_metrics(str(directory)) if r["kind"] == "eval"]
  assert [n["validation_error"] for n in manifests] == [r["error"] for r in evaluations]


def test_the_curvature_is_recorded_and_changes_nothing(run, tmp_path):
  _, result = run
  work_dir = tmp_path / "run"
  assert train(work_dir, curvature_every_steps=4)["weights_sha256"] == result["weights_sha256"]
  names = {"batch_sharpness", "largest_eigenvalue", "eigenvalue_residual"}
  records = [record for record in read_metrics(str(work_dir)) if names & record.keys()]
  assert [record["step"] for record in records] == [4, 8]
  for record in records:
    assert names <= record.keys()
    assert record["eigenvalue_residual"] <= 0.01 * abs(record["largest_eigenvalue"])


def test_the_evaluations_dtype_changes_their_errors_and_losses_only(run, tmp_path):
  directory, result = run
  recipe = dataclasses.replace(RECIPE, evaluation_dtype="training")
  assert train(tmp_path / "run", recipe)["weights_sha256"] == result["weights_sha256"]
  precise, rounded = (
    np.array([r["loss"] for r in read_metrics(str(path)) if r["kind"] == "eval"])
    for path in (directory, tmp_path / "run")
  )
  assert not np.any(precise == rounded)
  np.testing.assert_allclose(rounded, precise, rtol=0.02)


def test_metrics(run):
  directory, result = run
  records = read_metrics(str(directory))
  trains = [record for record in records if record["kind"] == "train"]
  evaluations = [record for record in records if record["kind"] == "eval"]
  # Every second step and the last of each epoch.
  assert [record["step"] for record in trains] == [2, 3, 4, 6, 8, 9]
  assert [record["epoch"] for record in evaluations] == [1, 2, 3]
  errors = [record["error"] for record in evaluations]
  assert result["val_error"] == errors[-1]
  assert result["val_error_median_last_5"] == sorted(errors)[1]
  assert all(round(error * 50, 6) == round(error * 50) for error in errors)
  rates = {record["step"]: record["learning_rate"] for record in trains}
  # Records count finished steps, so record s holds the rate at s - 1 on the schedule: warmup from
  # 0.1 to 0.2 over round(1.5 · 3) = 4 steps, a tenth of it from step 6 on.
  for step, rate in ((2, 0.125), (3, 0.15), (4, 0.175), (6, 0.2), (8, 0.02), (9, 0.02)):
    np.testing.assert_allclose(rates[step], rate, rtol=1e-6)
  for record in trains:
    assert record["images_per_second"] > 0 and 0 <= record["input_wait_share"] <= 1
    assert record["gradient_norm"] > 0 and record["weight_norm"] > 0
    assert record["gradient_variance"] > 0 and 1 < record["adascale_gain"] <= 2
  np.testing.assert_allclose(trains[0]["momentum_correction_factor"], 0.125 / 0.1, rtol=1e-6)
  np.testing.assert_allclose(trains[4]["momentum_correction_factor"], 1, rtol=1e-6)


def test_the_same_command_again_returns_the_result(run):
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


def test_a_run_from_before_a_field_existed_is_resumed(run, tmp_path):
  """Fields missing from recipe.json get their defaults; unknown ones are refused."""
  directory, result = run
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  facts = json.loads((copy / "recipe.json").read_text())
  del facts["recipe"]["label_smoothing"]
  (copy / "recipe.json").write_text(json.dumps(facts))
  assert train(copy) == result
  with pytest.raises(UserError, match=r"label_smoothing is 0\.0 there and 0\.1 now"):
    train(copy, dataclasses.replace(RECIPE, label_smoothing=0.1))
  facts["recipe"]["shoe_size"] = 43
  (copy / "recipe.json").write_text(json.dumps(facts))
  with pytest.raises(UserError, match="shoe_size"):
    train(copy)


def test_other_data_are_refused_and_nothing_is_lost(run, tmp_path, monkeypatch):
  """With another number of examples, a step would fall into another epoch, at another rate."""
  directory, _ = run
  data = json.loads((directory / "recipe.json").read_text())["data"]
  assert data == sources.identify("synthetic", "train[:70]", "validation[:50]", "")
  incomplete = tmp_path / "incomplete"
  shutil.copytree(directory, incomplete)
  (incomplete / "result.json").unlink()
  for work_dir in (directory, incomplete):
    before = {p: p.read_bytes() for p in work_dir.rglob("*") if p.is_file()}
    with monkeypatch.context() as changed:
      changed.setattr(sources, "identify", lambda *_: {"name": "synthetic", "train_examples": 90})
      with pytest.raises(UserError, match=r"holds a run on other data .*90") as error:
        train(work_dir)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in work_dir.rglob("*") if p.is_file()} == before


def comparable(directory):
  """The records without the values that depend on the clock."""
  names = ("kind", "step", "loss", "error", "gradient_variance", "noise_scale", "adascale_gain")
  return [[record.get(name) for name in names] for record in read_metrics(str(directory))]


@pytest.mark.parametrize("method, number", [("train", 8), ("evaluation", 6)])
def test_a_resumed_run_ends_with_the_same_bytes(run, tmp_path, monkeypatch, method, number):
  """Interrupted in epoch 3, and after epoch 2 is evaluated but before its checkpoint says so.

  The checkpoints fall on steps where a record ends anyway.
  """
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, method, interrupting(method, number))
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path, checkpoint_every_steps=2)
  assert not (tmp_path / "result.json").exists()
  again = train(tmp_path)
  directory, result = run
  assert again["weights_sha256"] == result["weights_sha256"]
  assert again["val_error"] == result["val_error"]
  assert comparable(tmp_path) == comparable(directory)
  check_tensorboard(tmp_path, 6, 3)


def test_a_run_interrupted_before_its_result_is_completed(run, tmp_path):
  """All steps are done and saved; only model.keras and result.json are missing."""
  directory, result = run
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  (copy / "result.json").unlink()
  (copy / "model.keras").unlink()
  assert train(copy) == result
  assert (copy / "model.keras").exists()


@pytest.mark.parametrize("requested_at, stopped_at, evaluated", [(4, 5, 1), (6, 6, 1)])
def test_a_stopped_run_saves_and_resumes(
  run, tmp_path, monkeypatch, requested_at, stopped_at, evaluated
):
  """The second request comes with an epoch's last step and stops its evaluation."""
  stop = StopRequest()
  record = MetricsWriter.train

  def request_stop(self, step, epoch, scalars):
    record(self, step, epoch, scalars)
    if step == requested_at:
      stop.signal = signal.SIGINT

  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "train", request_stop)
    with pytest.raises(InterruptedRunError) as error:
      train(tmp_path, stop=stop, evaluation_batch_size=20)
  assert error.value.status == 128 + signal.SIGINT
  assert f"(SIGINT) after step {stopped_at} of {STEPS}, saved" in str(error.value)
  assert len([r for r in read_metrics(str(tmp_path)) if r["kind"] == "eval"]) == evaluated
  again = train(tmp_path)
  result = run[1]
  assert again["weights_sha256"] == result["weights_sha256"]
  assert again["val_error_median_last_5"] == result["val_error_median_last_5"]
  kinds = [(r["kind"], r["step"]) for r in read_metrics(str(tmp_path)) if r["kind"] == "eval"]
  assert kinds == [("eval", 3), ("eval", 6), ("eval", 9)]


def test_a_temporarily_full_disk_loses_no_record(run, tmp_path, monkeypatch):
  """Metrics and checkpoints cannot be written from step 2 to step 6; the run ends as usual."""
  open_file = tf.io.gfile.GFile
  full = False

  def refuse(path, mode="r", *rest):
    if full and mode[0] in "wa":
      raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")
    return open_file(path, mode, *rest)

  record = MetricsWriter.train

  def fill(self, step, epoch, scalars):
    nonlocal full
    full = 2 <= step < 6
    if full and self._lines is not None:
      self._lines.flush = lambda: refuse("metrics.jsonl", "a")
    record(self, step, epoch, scalars)

  monkeypatch.setattr(tf.io.gfile, "GFile", refuse)
  monkeypatch.setattr(MetricsWriter, "train", fill)
  result = train(tmp_path)
  assert result["weights_sha256"] == run[1]["weights_sha256"]
  assert comparable(tmp_path) == comparable(run[0])
  steps = sorted({name[5:15] for name in os.listdir(tmp_path / "checkpoints")})
  assert [int(step) for step in steps] == [6, 9]


def test_model_keras_loads_without_this_package_and_has_the_runs_error(run, tmp_path):
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


def test_weights_sha256_covers_all_weights_in_order(run):
  directory, result = run
  arrays = np.load(directory / "checkpoints" / f"step-{STEPS:010d}.npz")
  named = sorted(name for name in arrays.files if name.startswith("model/"))
  assert len(named) == 7 * (1 + 4) + 2  # Convolutions, each with a BN of four; kernel and bias.
  digest = hashlib.sha256(b"".join(arrays[name].astype("<f4").tobytes() for name in named))
  assert digest.hexdigest() == result["weights_sha256"]


def test_the_result_is_the_median_of_the_last_five_epochs(tmp_path, monkeypatch):
  errors = iter((0.95, 0.9, 0.21, 0.25, 0.22, 0.24, 0.2))

  def evaluate():
    return {"loss": 1.0, "error": next(errors)}

  monkeypatch.setattr(trainer, "make_evaluation", lambda *_: evaluate)
  recipe = dataclasses.replace(RECIPE, train_split="train[:20]", epochs=7, dtype="float32")
  result = train(tmp_path, recipe)
  assert (result["val_error"], result["val_error_median_last_5"]) == (0.2, 0.22)
