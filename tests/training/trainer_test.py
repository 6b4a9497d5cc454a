"""A whole run of a small real network through the real loop, and what it leaves behind."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tf_largebatch.data import sources
from tf_largebatch.data.record_index import record_offsets
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.models.networks import build_model
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest
from tf_largebatch.training import environment, reporting, resolution, trainer, work_directory
from tf_largebatch.training.evaluation import make_evaluation
from tf_largebatch.training.loop import Loop
from tf_largebatch.training.metrics import MetricsWriter, read_metrics

RECIPE = Recipe(
  dataset="synthetic",
  train_split="train[:70]",
  validation_split="validation[:50]",
  image_size=8,
  augmentation="pad_crop",
  network="resnet8",
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
  stop = arguments.pop("stop", None)
  options = RunOptions(work_dir=str(work_dir), log_every_steps=2, **arguments)
  return trainer.train_and_evaluate(recipe, options, stop=stop)


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
  names = [f"step-{step:010d}.{kind}" for step in (3, 6, 9) for kind in ("json", "npz")]
  assert sorted(os.listdir(directory / "checkpoints")) == names
  noted = [json.loads((directory / "checkpoints" / name).read_text()) for name in names[::2]]
  evaluations = [r for r in read_metrics(str(directory)) if r["kind"] == "eval"]
  assert [n["validation_error"] for n in noted] == [r["error"] for r in evaluations]


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


def test_a_run_from_before_a_field_existed_is_continued(run, tmp_path):
  """Fields that are missing from recipe.json have their defaults; unknown ones are refused."""
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
  """With other numbers of examples a step would be of another epoch, at another rate."""
  directory, _ = run
  data = json.loads((directory / "recipe.json").read_text())["data"]
  assert data == sources.identify("synthetic", "train[:70]", "validation[:50]", "")
  cut_off = tmp_path / "cut_off"
  shutil.copytree(directory, cut_off)
  (cut_off / "result.json").unlink()
  for work_dir in (directory, cut_off):
    before = {p: p.read_bytes() for p in work_dir.rglob("*") if p.is_file()}
    with monkeypatch.context() as changed:
      changed.setattr(sources, "identify", lambda *_: {"name": "synthetic", "train_examples": 90})
      with pytest.raises(UserError, match=r"holds a run on other data .*90") as error:
        train(work_dir)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in work_dir.rglob("*") if p.is_file()} == before


def comparable(directory):
  """What does not depend on the clock."""
  return [(r["kind"], r["step"], r["loss"], r["error"]) for r in read_metrics(str(directory))]


def cut_off(method, number):
  """`method` of MetricsWriter, which then ends the run after step `number`."""
  original = getattr(MetricsWriter, method)

  def replacement(self, step, epoch, scalars):
    original(self, step, epoch, scalars)
    if step == number:
      raise KeyboardInterrupt

  return replacement


@pytest.mark.parametrize("method, number", [("train", 8), ("evaluation", 6)])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
  run, tmp_path, monkeypatch, method, number
):
  """Cut off in epoch 3; when epoch 2 was evaluated, before that was noted.

  A checkpoint every two steps is where a record ends anyway.
  """
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, method, cut_off(method, number))
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path, checkpoint_every_steps=2)
  assert not (tmp_path / "result.json").exists()
  again = train(tmp_path)
  directory, result = run
  assert again["weights_sha256"] == result["weights_sha256"]
  assert again["val_error"] == result["val_error"]
  assert comparable(tmp_path) == comparable(directory)


@pytest.mark.parametrize(
  "asked_at, stopped_at, evaluated", [(4, 5, 1), (6, 6, 1)]
)  # The last: between an epoch's last step and the second of its evaluation's three.
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
  run, tmp_path, monkeypatch, asked_at, stopped_at, evaluated
):
  stop = StopRequest()
  record = MetricsWriter.train

  def ask(self, step, epoch, scalars):
    record(self, step, epoch, scalars)
    if step == asked_at:
      stop.signal = signal.SIGINT

  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "train", ask)
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


class Nothing:
  """Stands for what keeps a run's records and checkpoints."""

  busy = False

  def __getattr__(self, name):
    return lambda *_: None


def make_steps(first_request, log_every_steps, saves):
  """A run of several tasks, whose steps only tell the sum of the tasks' requests to stop."""

  def train_step(batch, _):
    request = float(batch >= first_request)
    names = ("loss", "error", "learning_rate", "gradient_norm")
    return dict.fromkeys(names, 1.0) | {"stop": request}

  return Loop(
    recipe=RECIPE,
    options=types.SimpleNamespace(
      log_every_steps=log_every_steps,
      checkpoint_every_steps=Multiples(saves),  # As by the clock, which differs between tasks.
      checkpoint_every_minutes=0,
    ),
    steps_per_epoch=10,
    train_step=train_step,
    batches=itertools.count(1),
    evaluate=None,
    check_error=None,
    networks=None,
    checkpoints=Nothing(),
    metrics=Nothing(),
    bad=None,
    stop=StopRequest(),
    alone=False,
  )


class Multiples:
  """What `number % self` is 0 for: some steps."""

  def __init__(self, steps):
    self._steps = steps

  def __rmod__(self, number):
    return number not in self._steps


@pytest.mark.parametrize("log_every_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("saves", [(), (5,), (6,), (5, 6), (4, 5, 6, 7)])
@pytest.mark.parametrize("first_request", [5, 6])
def test_all_tasks_stop_after_the_same_step_whatever_each_looks_at(
  first_request, log_every_steps, saves
):
  """One step after the first whose sum told of a request: the next is under way by then."""
  steps = make_steps(first_request, log_every_steps, saves)
  assert not steps.train_to(40)
  assert steps.done == first_request + 1


def test_a_request_in_an_epochs_last_step_is_heard_in_the_next():
  for log_every_steps in (1, 3, 100):
    steps = make_steps(5, log_every_steps, ())
    assert steps.train_to(5)  # The epoch is over: it is evaluated.
    assert not steps.train_to(10) and steps.done == 6
    steps = make_steps(5, log_every_steps, ())
    ends = [steps.train_to(last) for last in range(1, 7)]  # Epochs of one step.
    assert ends == [True] * 5 + [False]


def test_k_left_out_is_that_of_the_run_that_is_continued(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "train", cut_off("train", 2))
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path)
  left_out = dataclasses.replace(RECIPE, workers=None)
  assert work_directory.with_stored_workers(left_out, str(tmp_path)) == RECIPE
  assert work_directory.with_stored_workers(left_out, str(tmp_path / "new")) == left_out


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
  with work_directory.locked(str(tmp_path)):
    with pytest.raises(UserError, match=rf"in use by a run \(process {os.getpid()} on "):
      train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
  with work_directory.locked(str(tmp_path)):
    pass


def test_a_disk_that_is_full_for_a_while_costs_no_record(run, tmp_path, monkeypatch):
  """Metrics and checkpoints fail from step 2 to step 6; the run ends as the others."""
  append = tf.io.gfile.GFile
  full = False

  def refuse(path, mode="r", *rest):
    if full and mode[0] in "wa":
      raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")
    return append(path, mode, *rest)

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
  assert len(named) == 7 * (1 + 4) + 2  # Convolutions, each with a BN of four; kernel and bias.
  digest = hashlib.sha256(b"".join(arrays[name].astype("<f4").tobytes() for name in named))
  assert digest.hexdigest() == result["weights_sha256"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  """The rate is sane until step 3, so the loss breaks at the step after the next."""
  wild = dataclasses.replace(
    RECIPE, decay_epochs=(1,), decay_factor=1e30, warmup="none", warmup_epochs=0
  )
  with pytest.raises(UserError) as error:
    train(tmp_path, wild, checkpoint_every_steps=1)
  message = str(error.value)
  assert "\n" not in message
  assert "Training diverged: the loss is nan (rate 2e+29) at step 5, epoch 1.67" in message
  assert "kn = 2 x 10 = 20" in message and "last good checkpoint is that of step 3" in message
  assert "--warmup_epochs" in message and "--reference_learning_rate" in message
  # That of step 4 was made by the rate that broke the run.
  assert sorted({name[5:15] for name in os.listdir(tmp_path / "checkpoints")})[-1] == f"{3:010d}"
  # What it saved is finite, and the same command ends the same way.
  for name in os.listdir(tmp_path / "checkpoints"):
    if name.endswith(".npz"):
      arrays = np.load(tmp_path / "checkpoints" / name)
      assert all(np.isfinite(arrays[key]).all() for key in arrays.files)
  with pytest.raises(UserError, match="diverged"):
    train(tmp_path, wild, checkpoint_every_steps=1)


def test_an_evaluation_that_is_not_finite_leaves_no_checkpoint(tmp_path):
  """The loss of the only step is that of the weights before it."""
  wild = dataclasses.replace(
    RECIPE, train_split="train[:20]", epochs=1, reference_learning_rate=1e30, warmup="none"
  )
  with pytest.raises(UserError, match=r"validation loss is .* last good checkpoint is none"):
    train(tmp_path, wild)
  assert os.listdir(tmp_path / "checkpoints") == [] and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
  "error, classes, examples, warned",
  [
    # σ = √(0.9 · 0.1 / 10 000) = 0.003, so 89.1 % is the edge.
    (0.9, 10, 10_000, True),
    (0.8911, 10, 10_000, True),
    (0.8909, 10, 10_000, False),
    (0.94, 10, 10_000, True),
    (0.1, 10, 10_000, False),
    # σ = √(0.5 · 0.5 / 100) = 0.05, so 35 % is.
    (0.351, 2, 100, True),
    (0.349, 2, 100, False),
  ],
)
def test_an_evaluation_no_better_than_guessing_is_told(caplog, error, classes, examples, warned):
  with caplog.at_level("WARNING", logger="absl"):
    reporting.warn_of_guessing(classes, examples, error, epoch=7)
  assert len(caplog.records) == warned
  if warned:
    message = caplog.records[0].getMessage()
    assert message.startswith(f"Epoch 7 ends with a validation error of {100 * error:.2f}%, ")
    by_chance = {10: "0.90", 2: "15.00"}[classes]  # 3 σ.
    guessing = f"({100 - 100 / classes:.2f}%, by chance up to {by_chance} points less)"
    assert f"guessing one of {classes} classes {guessing}" in message
    assert "--warmup_epochs" in message


def test_a_run_that_learns_nothing_says_so(tmp_path, caplog, monkeypatch):
  evaluations = iter((0.999, 0.5, 1.0))
  evaluate = lambda: {"loss": 6.9, "error": next(evaluations)}  # noqa: E731
  monkeypatch.setattr(trainer, "make_evaluation", lambda *_: evaluate)
  with caplog.at_level("WARNING", logger="absl"):
    train(tmp_path)
  messages = [record.getMessage() for record in caplog.records]
  told = [text.split(",")[0] for text in messages if "better than guessing" in text]
  assert told == [
    "Epoch 1 ends with a validation error of 99.90%",
    "Epoch 3 ends with a validation error of 100.00%",
  ]


def test_cut_off_before_the_result_was_written(run, tmp_path):
  """All steps are done and saved: only model.keras and result.json are left to write."""
  directory, result = run
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  (copy / "result.json").unlink()
  (copy / "model.keras").unlink()
  assert train(copy) == result
  assert (copy / "model.keras").exists()


@pytest.mark.parametrize(
  "workers, replicas, suggestion", [(3, 2, "2 or 4"), (1, 4, "such as 4"), (33, 8, "32 or 40")]
)
def test_workers_that_the_replicas_do_not_divide(workers, replicas, suggestion):
  with pytest.raises(UserError) as error:
    resolution.resolve(dataclasses.replace(RECIPE, workers=workers), replicas, "")
  assert f"workers={workers}" in str(error.value) and suggestion in str(error.value)


def test_resolve_chooses_what_was_left_out():
  left_out = Recipe(dataset="synthetic", epochs=2, warmup_epochs=1, decay_epochs=())
  resolved = resolution.resolve(left_out, 8, "")
  assert resolved.workers == 8
  assert resolved.validation_split == "validation"
  assert resolved.image_size == 224 and resolved.augmentation == "area_crop"
  with pytest.raises(UserError, match=r"1 values.*3 channels"):
    resolution.resolve(dataclasses.replace(left_out, channel_mean=(1.0,)), 8, "")


def test_a_minibatch_larger_than_the_data_is_refused(tmp_path):
  with pytest.raises(UserError, match="4000 images is more than the 70"):
    train(tmp_path, dataclasses.replace(RECIPE, workers=400))


@pytest.mark.parametrize(
  "dtype, flags, warned",
  [
    ("bfloat16", "fpu avx avx2", True),
    ("bfloat16", "avx2 avx512_bf16", False),
    ("bfloat16", "asimd bf16", False),
    ("float16", "avx2 avx512_bf16", True),
    ("float16", "avx512_fp16", False),
    ("float32", "fpu", False),
  ],
)
def test_a_cpu_that_must_emulate_16_bits_is_named(tmp_path, caplog, dtype, flags, warned):
  (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags} sse\n")
  with caplog.at_level("WARNING", logger="absl"):
    environment.warn_of_slow_dtype(dtype, str(tmp_path / "cpuinfo"))
    environment.warn_of_slow_dtype(dtype, str(tmp_path / "nothing"))
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
    network="resnet8",
    workers=2,
    per_worker_batch_size=5,
    epochs=2,
    warmup_epochs=1,
    decay_epochs=(),
  )
  options = RunOptions(
    data_dir=data_dir, work_dir=str(work_dir), evaluation_batch_size=4, **arguments
  )
  return trainer.train_and_evaluate(recipe, options)


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


@pytest.mark.parametrize("batch_size", [4, 5, 11])
def test_an_evaluation_is_the_mean_over_the_examples_whatever_fills_its_last_batch(batch_size):
  """11 examples; what pads the last batch of 4 or 5 are copies of the last one, which is wrong."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(11, 3)).astype(np.float32)
  labels = np.argmax(logits, axis=1)
  labels[[2, 10]] = np.argmin(logits[[2, 10]], axis=1)
  logits[10] *= 9
  images = rng.integers(0, 256, (11, 1, 1, 1)).astype(np.uint8)
  images[:, 0, 0, 0] = np.arange(11)
  recipe = dataclasses.replace(RECIPE, image_size=1, augmentation="none", channel_mean=(0.0,))
  source = sources.ArraySource(images, labels, 3)
  inputs = keras.Input((1, 1, 1))
  table = keras.layers.Embedding(11, 3, embeddings_initializer=keras.initializers.Constant(logits))
  model = keras.Model(inputs, keras.layers.Reshape((3,))(table(inputs)))
  strategy = tf.distribute.get_strategy()
  found = make_evaluation(strategy, model, recipe, source, batch_size)()
  losses = np.log(np.exp(logits.astype(np.float64)).sum(1)) - logits[np.arange(11), labels]
  assert found["error"] == pytest.approx(2 / 11, rel=1e-6)
  assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_a_record_is_the_mean_over_its_steps():
  """The training curves of the paper's figures are of these."""
  records = []
  run = make_steps(99, 3, ())
  step = run.train_step
  run.train_step = lambda batch, asked: step(batch, asked) | {"loss": batch**2, "error": 1 / batch}
  run.metrics = Nothing()
  run.metrics.train = lambda number, epoch, record: records.append((number, epoch, record))
  assert run.train_to(7)
  assert [(number, epoch) for number, epoch, _ in records] == [(3, 0.3), (6, 0.6), (7, 0.7)]
  for (_, _, record), steps in zip(records, ([1, 2, 3], [4, 5, 6], [7]), strict=True):
    assert record["loss"] == pytest.approx(np.mean([s**2 for s in steps]))
    assert record["error"] == pytest.approx(np.mean([1 / s for s in steps]))


def test_the_result_is_the_median_of_the_last_five_epochs(tmp_path, monkeypatch):
  errors = iter((0.95, 0.9, 0.21, 0.25, 0.22, 0.24, 0.2))

  def evaluate():
    return {"loss": 1.0, "error": next(errors)}

  monkeypatch.setattr(trainer, "make_evaluation", lambda *_: evaluate)
  recipe = dataclasses.replace(RECIPE, train_split="train[:20]", epochs=7, dtype="float32")
  result = train(tmp_path, recipe)
  assert (result["val_error"], result["val_error_median_last_5"]) == (0.2, 0.22)


def test_the_network_is_the_recipes():
  """What `build_model` hands on; values that no default has."""
  values = {"batch_norm_momentum": 0.5, "batch_norm_epsilon": 0.01, "last_gamma": 0.25, "seed": 3}
  recipe = dataclasses.replace(resolution.resolve(RECIPE, 1, ""), **values)
  kernels = {}
  for purpose in ("training", "evaluation", "export"):
    model = build_model(recipe, 10, purpose)
    norms = [layer for layer in model.layers if hasattr(layer, "gamma")]
    assert {(layer.momentum, layer.epsilon) for layer in norms} == {(0.5, 0.01)}
    dtype = "bfloat16" if purpose == "training" else "float32"
    assert {layer.compute_dtype for layer in norms} == {dtype}
    gammas = {layer.name: float(layer.gamma.numpy()[0]) for layer in norms}
    assert gammas == {name: 0.25 if name.endswith("_2_bn") else 1.0 for name in gammas}
    assert list(gammas.values()).count(0.25) == 3
    kernels[purpose] = model.get_layer("stem_conv").kernel.numpy()
    np.testing.assert_array_equal(kernels[purpose], kernels["training"])
  other = build_model(dataclasses.replace(recipe, seed=4), 10)
  assert not np.any(other.get_layer("stem_conv").kernel.numpy() == kernels["training"])
