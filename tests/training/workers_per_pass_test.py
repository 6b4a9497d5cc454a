"""g, the workers per pass: measured on a GPU, kept for the next start, and checked."""

import json
import os

import pytest
import tensorflow as tf

from tests.training.small_steps import make_model, make_recipe
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.training import workers_per_pass as passes


@pytest.mark.parametrize(
  "seconds, workers, expected",
  [
    ({1: 1.0, 2: 1.5, 4: 2.9, 8: 6.0}, 8, 4),  # Per worker: 1, 0.75, 0.725 and 0.75.
    ({1: 1.0, 2: 1.97}, 8, 1),  # Less than 2 % faster.
    ({1: 1.0, 2: 1.0, 4: None}, 8, 2),  # Out of memory with four.
    ({1: 1.0, 2: 1.0}, 6, 2),  # 4 does not divide 6.
  ],
)
def test_on_a_gpu_g_doubles_while_that_is_faster(monkeypatch, seconds, workers, expected):
  tried = []

  def make(model, recipe, options):
    tried.append(options.workers_per_pass)
    return lambda *_: (None, None, None, [0.0, 0.0])

  def measured(_):
    if seconds[tried[-1]] is None:
      raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
    return seconds[tried[-1]]

  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [kind])
  monkeypatch.setattr(passes, "make_paper_sums", make)
  monkeypatch.setattr(passes, "_seconds", measured)
  arguments = (make_model(5, "float32"), make_recipe(workers), RunOptions(), workers)
  assert passes.measure_workers_per_pass(*arguments) == expected
  assert tried == list(seconds)


@pytest.fixture
def choose(monkeypatch, tmp_path):
  """Chooses g for a run in tmp_path on a GPU of a name, where 4 would be measured.

  Returns g and how often it was measured.
  """
  measured = []
  monkeypatch.setattr(passes, "measure_workers_per_pass", lambda *_: measured.append(0) or 4)
  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [kind])

  def choose(workers=8, gpu="A", keep=True, dtype="float32", **options):
    measured.clear()
    details = {"device_name": gpu}
    monkeypatch.setattr(passes.tf.config.experimental, "get_device_details", lambda _: details)
    options = RunOptions(work_dir=str(tmp_path), **options)
    strategy, model = tf.distribute.get_strategy(), make_model(5, "float32")
    recipe = make_recipe(workers, dtype=dtype)
    found = passes.with_workers_per_pass(options, strategy, model, recipe, keep)
    return found.workers_per_pass, len(measured)

  return choose


def test_the_next_start_on_such_a_gpu_does_not_measure_again(choose):
  assert choose(keep=False) == (4, 1)  # Another task than the chief.
  assert choose() == (4, 1)
  assert choose() == choose(keep=False) == (4, 0)
  assert choose(workers_per_pass=2) == (2, 0)
  # Conditions that change which g is the fastest.
  assert choose(gpu="B") == (4, 1)
  assert choose(gpu="B", workers=16) == (4, 1)
  assert choose(gpu="B", workers=16, jit_compile=False) == (4, 1)
  assert choose(gpu="B", workers=16, jit_compile=False) == (4, 0)


@pytest.mark.parametrize("text", ["", "{}", "[4]", '{"workers_per_pass": 3}', "null"])
def test_a_damaged_file_is_measured_again(choose, tmp_path, text):
  (tmp_path / "workers_per_pass.json").write_text(text)
  assert choose() == (4, 1)
  assert choose() == (4, 0)


@pytest.mark.parametrize("kept", [3, 0, -2, 1.5, "4", None])
def test_a_g_that_cannot_be_is_measured_again(choose, tmp_path, kept):
  choose()
  path = tmp_path / "workers_per_pass.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"workers_per_pass": kept}))
  assert choose() == (4, 1)


def test_a_run_goes_on_if_g_cannot_be_kept(choose, tmp_path, caplog):
  os.mkdir(tmp_path / "workers_per_pass.json")
  assert choose() == (4, 1)
  (line,) = [record.message for record in caplog.records if "Cannot write" in record.message]
  assert "workers_per_pass.json" in line


def test_g_is_1_in_float16(choose, tmp_path):
  """Which steps overflow and are skipped must not depend on a device."""
  assert choose(dtype="float16") == (1, 0)
  assert not os.listdir(tmp_path)


def test_g_is_1_on_a_cpu(choose, monkeypatch, tmp_path):
  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [])
  assert choose() == (1, 0)
  assert not os.listdir(tmp_path)


def test_workers_per_pass_must_divide_the_replicas_workers():
  with pytest.raises(
    UserError, match=r"workers_per_pass=3 .* the 8 workers of a replica; use 1, 2, 4, 8 or auto"
  ):
    passes.check_workers_per_pass(3, 8)
  passes.check_workers_per_pass(4, 8)
