"""The start-up benchmark on a small network."""

import json

from tests.launching import SMALL, run_module
from tools.benchmark.start_up_phases import ROWS


def test_the_phases_add_up_to_the_whole_start(tmp_path):
  path = tmp_path / "start_up.json"
  finished = run_module(
    "tools.benchmark.start_up", "--starts=1", f"--json={path}", "--", *SMALL, "--epochs=1"
  )
  assert finished.returncode == 0, finished.stderr
  (seconds,) = json.loads(path.read_text())["starts"]
  parts = {name: s for name, s in seconds.items() if name not in ("total", "processor")}
  assert set(parts) == set(ROWS) - {"total", "processor"}
  assert all(s >= 0 for s in parts.values())
  assert abs(sum(parts.values()) - seconds["total"]) < 1e-9
  # A phase whose function the trainer no longer calls would take no time.
  for name in ("interpreter", "imports", "network", "first step"):
    assert parts[name] > 0.05, name
  assert parts["other"] < 0.2 * seconds["total"]
  assert seconds["processor"] > parts["imports"] / 2
  rows = [line[:26].strip() for line in finished.stdout.splitlines()]
  assert rows == ["seconds", *ROWS]


def test_the_trainers_errors_are_the_benchmarks(tmp_path):
  finished = run_module("tools.benchmark.start_up", "--", "--dataset=synthetic", "--epochs=0")
  assert finished.returncode == 1
  assert finished.stderr.startswith("error: epochs=0 ")
  finished = run_module("tools.benchmark.start_up", "--starts=0")
  assert finished.returncode == 1
