"""The binary on several tasks, as real processes on 127.0.0.1 with real collectives."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.launching import ROOT, SMALL, launch
from tools.launch_local import free_addresses, task_environment

FLAGS = (*SMALL, "--epochs=1")


def test_the_binary_on_two_tasks(tmp_path, monkeypatch):
  monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "ftp://refused")
  tmp_path = tmp_path / "run"
  # --verbosity=0 has every task log its INFO lines, not the chief alone.
  arguments = [*FLAGS, "--verbosity=0", "--checkpoint_every_steps=2", f"--work_dir={tmp_path}"]
  finished = launch(2, "tf_largebatch.train", *arguments)
  assert finished.returncode == 0, finished.stdout
  result = json.loads((tmp_path / "result.json").read_text())
  # Without --workers, each replica has one worker: 60 // (2 · 7) steps.
  assert result["steps"] == 4
  assert json.loads((tmp_path / "recipe.json").read_text())["cluster"]["communication"] == "ring"
  digests = re.findall(r"\[task (\d)\].*weights_sha256 (\w{64})", finished.stdout)
  assert sorted(digests) == [(task, result["weights_sha256"]) for task in ("0", "1")]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4 + 1
  assert len(os.listdir(tmp_path / "tensorboard")) == 1
  reporters = re.findall(r"\[task (\d)\].* Kubeflow did not take the status", finished.stdout)
  assert reporters == ["0"]  # The chief alone.
  check_that_tasks_agree_on_a_checkpoint(tmp_path, result)


def check_that_tasks_agree_on_a_checkpoint(work_dir, result):
  """Task 1 sees the newest checkpoint (step 4) torn, and both resume from step 2."""
  (work_dir / "result.json").unlink()
  view = work_dir.with_name("view")
  shutil.copytree(work_dir, view)
  (view / "checkpoints" / "step-0000000004.npz").write_bytes(b"torn")
  arguments = ([f"--work_dir={directory}", "--verbosity=0"] for directory in (work_dir, view))
  for status, error in run_tasks(*arguments):
    assert status == 0, error
    assert "Step 2 is the newest checkpoint that all tasks see whole; task 1 does not" in error
    assert "Continuing from step 2 of 4." in error
  again = json.loads((work_dir / "result.json").read_text())
  assert again["weights_sha256"] == result["weights_sha256"]
  assert not (view / "result.json").exists()


def test_workers_must_be_a_multiple_of_the_tasks(tmp_path):
  arguments = [*FLAGS, "--workers=3", f"--work_dir={tmp_path / 'run'}"]
  finished = launch(2, "tf_largebatch.train", *arguments)
  assert finished.returncode == 1
  assert re.search(r"\] error: workers=3 .* 2 or 4 *", finished.stdout)
  assert "Traceback" not in finished.stdout
  assert not (tmp_path / "run").exists()


def run_tasks(*arguments):
  """Runs two tasks, each with its own arguments; returns their statuses and standard errors."""
  addresses = free_addresses(2)
  tasks = []
  for index in range(2):
    tasks.append(
      subprocess.Popen(
        [sys.executable, "-m", "tf_largebatch.train", *FLAGS, *arguments[index]],
        cwd=ROOT,
        env=task_environment(addresses, index),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  try:
    errors = [task.communicate(timeout=120)[1] for task in tasks]
  finally:
    for task in tasks:
      task.kill()
      task.wait()
  return [(task.returncode, error) for task, error in zip(tasks, errors, strict=True)]


@pytest.mark.parametrize(
  "name, values", [("seed", (0, 1)), ("allreduce_dtype", ("float32", "bfloat16"))]
)
def test_tasks_with_different_flags_do_not_train_together(tmp_path, name, values):
  work_dir = f"--work_dir={tmp_path / 'run'}"
  for status, error in run_tasks(*([f"--{name}={value}", work_dir] for value in values)):
    assert status == 1, error
    assert "error: The tasks do not agree: " in error and "Traceback" not in error
  assert not (tmp_path / "run").exists()


def test_a_task_whose_peer_never_starts_gives_up(tmp_path):
  addresses = free_addresses(2)
  config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
  finished = subprocess.run(
    [
      *(sys.executable, "-m", "tf_largebatch.train", *FLAGS),
      "--cluster_timeout_minutes=0.1",
      f"--work_dir={tmp_path / 'run'}",
    ],
    cwd=ROOT,
    env={**os.environ, "TF_CONFIG": json.dumps(config)},
    stderr=subprocess.PIPE,
    text=True,
    timeout=60,
    check=False,
  )
  assert finished.returncode == 138
  last = finished.stderr.splitlines()[-1]
  assert last.startswith(f"error: task 1 ({addresses[1]}) did not come up within 0.1 minutes")
