"""The same recipe on 1, 2 and 4 tasks, as real processes on 127.0.0.1 with real collectives."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny_task
from tf_largebatch.input_pipeline import example_ids

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def launch(tasks, module, *arguments):
  command = [sys.executable, "-m", "tools.launch_local", f"--tasks={tasks}", f"--module={module}"]
  return subprocess.run(
    [*command, "--", *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=240,
    check=False,
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """dtype → tasks → what each task found."""
  directory = tmp_path_factory.mktemp("runs")
  found = {"float32": {}, "float64": {}}
  for tasks in (1, 2, 4):
    finished = launch(tasks, "tests.tiny_task", str(directory))
    assert finished.returncode == 0, finished.stdout
    for dtype, by_tasks in found.items():
      names = [directory / f"{dtype}_{tasks}_{task}.npz" for task in range(tasks)]
      by_tasks[tasks] = [dict(np.load(name)) for name in names]
  return found


def test_every_task_ends_with_the_same_bytes(runs):
  for by_tasks in runs.values():
    for tasks in (2, 4):
      states = {run["copies"].tobytes() for run in by_tasks[tasks]}
      losses = {run["losses"].tobytes() for run in by_tasks[tasks]}
      assert len(by_tasks[tasks]) == tasks and len(states) == len(losses) == 1


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("tasks", [2, 4])
def test_the_number_of_tasks_changes_rounding_alone(runs, tasks, dtype, limit):
  one, many = runs[dtype][1][0], runs[dtype][tasks][0]
  distance = np.linalg.norm(many["copies"] - one["copies"])
  assert distance <= limit * np.linalg.norm(one["copies"])
  np.testing.assert_allclose(many["losses"], one["losses"], rtol=limit)
  # The run has moved: the agreement is no accident.
  assert one["losses"].shape == (20,) and np.ptp(one["losses"]) > 1e-2


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_the_tasks_see_each_step_the_examples_of_their_workers(runs, tasks):
  recipe = tiny_task.make_recipe("float32")
  seen = np.concatenate([run["ids"] for run in runs["float32"][tasks]], axis=1)
  for step in range(20):
    for worker in range(4):
      expected = example_ids(recipe, tiny_task.EXAMPLES, step, worker)
      np.testing.assert_array_equal(seen[step, worker], expected)
  for epoch in (seen[:8], seen[8:16]):
    assert len(set(epoch.ravel())) == epoch.size == 192


FLAGS = (
  "--dataset=synthetic",
  "--train_split=train[:60]",
  "--validation_split=validation[:37]",
  "--image_size=8",
  "--network=resnet20",
  "--per_worker_batch_size=7",
  "--epochs=1",
  "--warmup_epochs=0",
  "--decay_epochs=",
  "--log_every_steps=1",
  "--evaluation_batch_size=10",
)


def test_the_binary_on_two_tasks(tmp_path):
  finished = launch(2, "tf_largebatch.train", *FLAGS, f"--work_dir={tmp_path}")
  assert finished.returncode == 0, finished.stdout
  result = json.loads((tmp_path / "result.json").read_text())
  # --workers left out means one a replica: 60 // (2 · 7) steps.
  assert result["steps"] == 4
  assert json.loads((tmp_path / "recipe.json").read_text())["cluster"]["communication"] == "ring"
  digests = re.findall(r"\[task (\d)\].*weights_sha256 (\w{64})", finished.stdout)
  assert sorted(digests) == [(task, result["weights_sha256"]) for task in ("0", "1")]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4 + 1
  assert len(os.listdir(tmp_path / "tensorboard")) == 1


def test_workers_that_the_tasks_do_not_divide_are_refused(tmp_path):
  arguments = [*FLAGS, "--workers=3", f"--work_dir={tmp_path / 'run'}"]
  finished = launch(2, "tf_largebatch.train", *arguments)
  assert finished.returncode == 1
  assert re.search(r"\] error: workers=3 .* 2 or 4 *", finished.stdout)
  assert "Traceback" not in finished.stdout
  assert not (tmp_path / "run").exists()


def test_tasks_with_different_recipes_do_not_train_together(tmp_path):
  sockets = [socket.socket() for _ in range(2)]
  for one in sockets:
    one.bind(("127.0.0.1", 0))
  addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
  for one in sockets:
    one.close()
  tasks = []
  for index in range(2):
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    command = [sys.executable, "-m", "tf_largebatch.train", *FLAGS, f"--seed={index}"]
    tasks.append(
      subprocess.Popen(
        [*command, f"--work_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "TF_CONFIG": json.dumps(config)},
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
  for task, error in zip(tasks, errors, strict=True):
    assert task.returncode == 1, error
    assert "error: The tasks do not agree: " in error and "Traceback" not in error
  assert not (tmp_path / "run").exists()
