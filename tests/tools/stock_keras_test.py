"""`tools.stock_keras`: what stock Keras does on a cluster, and what ours does there."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from tests.launching import run_module
from tf_largebatch.errors import UserError
from tools import stock_keras


def test_bn_drifts_in_stock_keras_and_its_fit_fails_on_two_tasks(tmp_path):
  path = tmp_path / "table.json"
  finished = run_module("tools.stock_keras", "--programs=mlp_bn", f"--json={path}", timeout=240)
  assert finished.returncode == 0, finished.stderr
  found = {(r["by"], r["cluster"]): r for r in json.loads(path.read_text())["results"]}

  assert "PerReplica" in found["stock", "2 tasks"]["fit_error"]
  assert "PerReplica" in found["stock", "2 tasks"]["evaluate_error"]
  mirrored = found["stock", "2 CPUs"]
  assert mirrored["bn_drift"] > 1e-3 and mirrored["differing_copies"] == 2
  assert mirrored["weights_off"] > 1e-3 and mirrored["loss_off"] > 1e-4

  for cluster in ("2 CPUs", "2 tasks"):
    ours = found["ours", cluster]
    assert ours["fit_error"] is None and ours["evaluate_error"] is None
    assert ours["bn_drift"] == 0 and ours["differing_copies"] == 0
    assert ours["weights_off"] < 1e-12
  for by, cluster in set(found) - {("stock", "2 tasks")}:
    result = found[by, cluster]
    assert result["counted"] == result["validation_examples"] == 37
    assert by == "stock" or result["loss_off"] < 1e-12
  lines = finished.stdout.splitlines()
  assert [line.split()[4:7] for line in lines if " 2 tasks " in line and "stock" in line] == [
    ["stock", "error", "1"]
  ]
  assert lines[-1].startswith("error 1: ValueError: Attempt to convert a value (PerReplica:{…}")


def task(key, *copies, error=None):
  """What a task leaves, with one weight, one moving statistic and one other variable."""
  arrays = {
    f"{key}/{replica}/{i}": np.asarray(value)
    for replica, values in enumerate(copies)
    for i, value in enumerate(values)
  }
  observed = {"title": "", "fit_error": error, "evaluate_error": None, "weights": [0]}
  observed["evaluated"] = {"loss": 1.5, "examples": 3.0}
  observed["expected"] = {"loss": 1.0, "examples": 4}
  return {key: observed | {"moving": [1]}}, arrays


@pytest.mark.parametrize("tasks", [1, 3])
def test_compares_all_copies_with_one_cpu(tasks):
  alone = [task("m/ours", ([3.0, 4.0], [1.0], 7))]
  copies = ([3.0, 4.5], [2.0], 7), ([3.0, 4.5], [4.0], 7), ([3.0, 4.5], [4.0], 7)
  many = [task("m/ours", *copies)] if tasks == 1 else [task("m/ours", copy) for copy in copies]
  found = stock_keras._compare(many, alone, "m/ours")
  assert found["weights_off"] == pytest.approx(0.1)
  assert found["differing_copies"] == 1 and found["variables"] == 3
  assert found["bn_drift"] == pytest.approx(0.5)
  assert found["loss_off"] == pytest.approx(0.5)
  assert (found["counted"], found["validation_examples"]) == (3, 4)


def test_nothing_is_compared_without_training_or_other_copies():
  alone = [task("m/stock", ([3.0], [1.0]))]
  failed = [task("m/stock", ([3.0], [1.0]), ([2.0], [2.0]), error="ValueError")]
  for tasks in (alone, failed):
    found = stock_keras._compare(tasks, alone, "m/stock")
    assert [found[name] for name in ("weights_off", "differing_copies", "bn_drift")] == [None] * 3


def test_a_failed_task_is_reported_by_its_last_line(tmp_path):
  (tmp_path / "log").write_text("first\nMemoryError\n")
  process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
  process.wait()
  with pytest.raises(UserError, match="ended with status 3: MemoryError"):
    stock_keras._wait([process], [tmp_path / "log"], 5.0)


def test_tasks_that_do_not_finish_are_ended(monkeypatch):
  started = []

  def start(cluster, names, folder):
    folder.mkdir()
    started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
    pathlib.Path(folder, "0.log").write_text("")
    return started[-1:]

  monkeypatch.setattr(stock_keras, "_start", start)
  with pytest.raises(UserError, match=r"within 0\.2 s; raise --timeout_seconds"):
    stock_keras._measure(["mlp_bn"], 0.2)
  assert len(started) == 3 and all(process.returncode == -9 for process in started)


@pytest.mark.parametrize(
  "flags, message",
  [
    ({"programs": ["mlp", "vit"], "json": ""}, "--programs=mlp,vit: expected any of resnet, "),
    ({"programs": ["vit"], "json": "/nowhere/a.json"}, "--json=/nowhere/a.json cannot be written"),
  ],
)
def test_a_users_mistakes(flags, message, monkeypatch):
  given = types.SimpleNamespace(FLAGS=types.SimpleNamespace(timeout_seconds=1.0, **flags))
  monkeypatch.setattr(stock_keras, "flags", given)
  with pytest.raises(UserError, match=message):
    stock_keras.main()
