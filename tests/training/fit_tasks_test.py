"""`fit` on two logical devices and on real tasks: the run of one device, and what goes wrong."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT, run_module
from tools.launch_local import free_addresses, task_environment

MODELS = ("mlp", "resnet", "vit")


def start(module, addresses, index, *arguments):
  return subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=task_environment(addresses, index),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run_tasks(count, module, *arguments):
  """Runs a program as so many tasks; returns their statuses and outputs."""
  addresses = free_addresses(count)
  tasks = [start(module, addresses, index, *arguments) for index in range(count)]
  try:
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
  finally:
    for task in tasks:
      task.kill()
      task.wait()
  return [(task.returncode, output) for task, output in zip(tasks, outputs, strict=True)]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """What one device computes: variables, history and evaluation by model."""
  directory = tmp_path_factory.mktemp("one")
  arguments = (f"--out={directory}", f"--models={','.join(MODELS)}")
  finished = run_module("tests.training.fit_scenarios", *arguments, timeout=200)
  assert finished.returncode == 0, finished.stderr
  found = {}
  for name in MODELS:
    arrays = np.load(directory / f"{name}.0.npz")
    logs = json.loads((directory / f"{name}.0.json").read_text())
    found[name] = [arrays[key] for key in arrays.files], logs
  return found


def check(directory, tasks, expected, names):
  """Checks that each task holds what one device does, and all of them the same bytes."""
  for name in names:
    for task in range(tasks):
      arrays = np.load(directory / f"{name}.{task}.npz")
      arrays = [arrays[key] for key in arrays.files]
      first = np.load(directory / f"{name}.0.npz")
      for a, b, c in zip(arrays, expected[name][0], first.values(), strict=True):
        assert a.tobytes() == c.tobytes()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.max(np.abs(b), initial=0)))
      logs = json.loads((directory / f"{name}.{task}.json").read_text())
      for part in ("history", "evaluate"):
        assert logs[part].keys() == expected[name][1][part].keys()
        for key, value in expected[name][1][part].items():
          np.testing.assert_allclose(logs[part][key], value, rtol=1e-12)
    files = {path.name for path in (directory / f"{name}.files").iterdir()}
    assert files == {"best.keras", "log.csv", "tensorboard"}  # The backup goes when the run ends.
    assert len((directory / f"{name}.files" / "log.csv").read_text().splitlines()) == 1 + 2


def test_two_devices(tmp_path, one_device):
  arguments = (f"--out={tmp_path}", "--devices=2", f"--models={','.join(MODELS)}")
  finished = run_module("tests.training.fit_scenarios", *arguments, timeout=200)
  assert finished.returncode == 0, finished.stderr
  check(tmp_path, 1, one_device, MODELS)


@pytest.mark.parametrize("tasks, names", [(2, ("mlp", "resnet")), (3, ("vit",))])
def test_tasks(tmp_path, one_device, tasks, names):
  arguments = (f"--out={tmp_path}", f"--models={','.join(names)}")
  for status, output in run_tasks(tasks, "tests.training.fit_scenarios", *arguments):
    assert status == 0, output
    assert output.count("collectives in a step: 1") == len(names)
  check(tmp_path, tasks, one_device, names)


def test_a_task_that_stops_and_tasks_whose_data_differ(tmp_path):
  for task, (status, output) in enumerate(
    run_tasks(2, "tests.training.fit_on_tasks", f"--out={tmp_path}", "stop", "differ")
  ):
    assert status == 0, output
    found = json.loads((tmp_path / f"{task}.json").read_text())
    # Task 1 asks after the third step of the second epoch, as one of five does.
    assert found["stop"] == {"steps": 5 + 3, "epochs": 2}
    assert "The tasks do not read the same examples" in found["order"]
    assert "The tasks do not read the same examples" in found["augmentation"]
    assert "The tasks do not read the same examples" in found["length"]
    assert "their calls of fit have other arguments" in found["arguments"]


def test_a_killed_task_and_a_restart_from_the_backup(tmp_path):
  """The epochs' data come from a function, so the restarted run sees what it would have seen."""
  for part in ("undisturbed", "disturbed"):
    (tmp_path / part).mkdir()
  program = ("tests.training.fit_on_tasks", "backup")
  for status, output in run_tasks(2, program[0], f"--out={tmp_path / 'undisturbed'}", program[1]):
    assert status == 0, output
  out = f"--out={tmp_path / 'disturbed'}"
  (first, lost), (second, _) = run_tasks(2, program[0], out, "--kill_at=8", program[1])
  assert second == -signal.SIGKILL
  assert first != 0 and "Lost task 1" in lost
  for status, output in run_tasks(2, program[0], out, program[1]):
    assert status == 0, output
    assert "first epoch 1" in output
  digests = [
    (tmp_path / part / f"{task}.npz").read_bytes()
    for part in ("undisturbed", "disturbed")
    for task in range(2)
  ]
  assert len(set(digests)) == 1
