"""One fault in a real run of two tasks, and what `chaos` does without one."""

import json
import pathlib
import random
import shutil

from tests.launching import run_module
from tools.resilience import chaos
from tools.resilience.harness import LaunchedRun


def test_two_tasks_reproduce_the_run_without_faults(tmp_path):
  figures = tmp_path / "figures.json"
  finished = run_module(
    "tools.resilience.chaos",
    "--faults=1",
    "--tasks=2",
    "--seed=8",  # Stops a task 0.7 s after the first step.
    f"--json={figures}",
    timeout=280,
  )
  assert finished.returncode == 0, finished.stdout + finished.stderr
  found = json.loads(figures.read_text())
  assert len(found["faults"]) == 1 and all(run["equal"] for run in found["runs"])
  assert len({run["weights_sha256"] for run in found["runs"]}) == 1
  for fault in found["faults"]:
    assert fault["seconds"] > 0 and fault["restored"] <= fault["step"]


def test_bad_flags_are_refused_in_one_line():
  finished = run_module("tools.resilience.chaos", "--tasks=0")
  assert finished.returncode == 1
  assert finished.stderr == "error: '0' is not a number of tasks; use 1 or more.\n"


def test_the_files_of_a_failed_run_are_kept():
  arguments = ("--faults=1", "--tasks=1", "--", "--network=no_such_network")
  finished = run_module("tools.resilience.chaos", *arguments)
  assert finished.returncode == 1
  kept, error = finished.stderr.splitlines()
  directory = pathlib.Path(kept.removeprefix("The files of the runs are in ").removesuffix("."))
  log = directory / "undisturbed_1" / "log.txt"
  try:
    assert error == f"error: The run without faults ended with status 1; see {log}"
    assert "no_such_network" in log.read_text()
  finally:
    shutil.rmtree(directory)


def test_the_newest_checkpoint_is_damaged_in_every_way(tmp_path):
  """No other file changes; without a checkpoint, nothing does."""
  run = LaunchedRun(tmp_path / "run", [])
  assert not chaos._corrupt_newest(run, random.Random(0))
  directory = run.work_dir / "checkpoints"
  directory.mkdir(parents=True)
  ways = set()
  for seed in range(60):
    for step in (1, 2):
      (directory / f"step-{step:010d}.json").write_bytes(b"manifest")
      (directory / f"step-{step:010d}.npz").write_bytes(b"state" * 9)
    assert chaos._corrupt_newest(run, random.Random(seed))
    contents = {p.name: p.read_bytes() for p in directory.iterdir()}
    assert contents["step-0000000001.json"] == b"manifest"
    assert contents["step-0000000001.npz"] == b"state" * 9
    harmed = []
    for name, whole in (
      ("step-0000000002.json", b"manifest"),
      ("step-0000000002.npz", b"state" * 9),
    ):
      if name not in contents:
        harmed.append((name, "gone"))
      elif contents[name] != whole:
        cut = "empty" if not contents[name] else "cut"
        harmed.append((name, "bit" if len(contents[name]) == len(whole) else cut))
    (harm,) = harmed
    ways.add(harm)
  assert len(ways) == 8
