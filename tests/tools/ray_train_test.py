"""`tools.ray_train`: refusals, and a real local Ray of two workers where Ray is installed."""

import importlib.util
import json

import pytest

from tests.launching import SMALL, run_module
from tools import ray_train

_HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(not _HAS_RAY, reason="Ray is not installed")
def test_two_workers_train_as_one_task_does(tmp_path):
  flags = (*SMALL, "--workers=2", "--epochs=1")
  alone = run_module("tf_largebatch.train", *flags, f"--work_dir={tmp_path / 'alone'}")
  assert alone.returncode == 0, alone.stderr
  finished = run_module("tools.ray_train", *flags, f"--work_dir={tmp_path / 'ray'}")
  assert finished.returncode == 0, finished.stderr
  result, expected = (
    json.loads((tmp_path / name / "result.json").read_text()) for name in ("ray", "alone")
  )
  assert result["status"] == "complete" and result["steps"] == expected["steps"]
  assert result["val_error"] == pytest.approx(expected["val_error"], rel=1e-5)
  facts = json.loads((tmp_path / "ray" / "recipe.json").read_text())
  assert facts["cluster"]["tasks"] == facts["cluster"]["replicas"] == 2
  assert result["weights_sha256"] in finished.stdout

  # The next command finds another recipe there, and Ray does not start the workers again.
  flags = (*flags, "--epochs=2", f"--work_dir={tmp_path / 'ray'}")
  refused = run_module("tools.ray_train", *flags)
  assert refused.returncode == 1
  message = f"error: work_dir={tmp_path / 'ray'} holds "  # Ray's workers log around it.
  assert any(line.startswith(message) for line in refused.stderr.splitlines())


@pytest.mark.parametrize(
  "flags, message",
  [
    ((), "No --work_dir was given; name a directory that all of Ray's nodes share."),
    (("--epochs=0",), "epochs=0 "),
    (("--ray_workers=0", "--work_dir=run"), "flag --ray_workers=0: "),
    pytest.param(
      ("--work_dir=run",),
      "Ray is not installed (No module named 'ray'); run pip install",
      marks=pytest.mark.skipif(_HAS_RAY, reason="Ray is installed"),
    ),
  ],
)
def test_a_users_mistake_gets_one_line(flags, message, tmp_path):
  finished = run_module("tools.ray_train", *flags)
  assert finished.returncode == 1
  assert finished.stderr.startswith(f"error: {message}") and finished.stderr.count("\n") == 1


def test_directories_are_named_for_workers_that_start_elsewhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert ray_train._absolute("runs/a") == str(tmp_path / "runs" / "a")
  for path in ("/runs/a", "gs://bucket/a", "~nobody/a"):
    assert ray_train._absolute(path) == path
