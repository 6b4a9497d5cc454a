"""The checkpoint benchmark on a small network."""

import json

from tests.launching import run_module


def test_figures():
  small = ("--network=resnet8", "--image_size=8", "--per_worker_batch_size=4", "--repeats=2")
  finished = run_module("tools.benchmark.checkpoint", *small)
  assert finished.returncode == 0, finished.stderr
  found = json.loads(finished.stdout)
  assert found["copy_seconds"] > 0 and found["whole_save_seconds"] > 0
  stall = found["copy_seconds"] + found["step_beside_the_writing_seconds"] - found["step_seconds"]
  assert abs(found["stall_seconds"] - stall) < 1e-12
  # Four bytes per value, except for a few counters of eight, and the archive's own overhead.
  assert 4 * found["values"] < found["bytes"] < 4 * found["values"] + 100_000


def test_refused_in_one_line():
  finished = run_module("tools.benchmark.checkpoint", "--per_worker_batch_size=0")
  assert finished.returncode == 1
  assert finished.stderr.startswith("error: per_worker_batch_size=0")
