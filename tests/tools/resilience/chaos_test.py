"""Faults in a real run of two tasks, and what `chaos` does without one."""

import errno
import json
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

from tests.launching import ROOT, run_module
from tf_largebatch.errors import UserError
from tools.resilience import chaos, faults, namespaces
from tools.resilience.harness import LaunchedRun

_RECIPE = (  # noqa: SIM905
  "--dataset=synthetic --train_split=train[:560] --validation_split=validation[:37]"
  " --image_size=8 --network=resnet8 --workers=2 --per_worker_batch_size=7 --epochs=5"
  " --warmup_epochs=0 --decay_epochs= --evaluation_batch_size=10 --checkpoint_every_steps=7"
  " --heartbeat_timeout_seconds=6"
).split()


def test_two_tasks_reproduce_the_run_without_faults(tmp_path):
  """A full disk and a cut link of 2 s do not end the tasks; a stopped task has all restarted."""
  isolated = "from tools.resilience import namespaces; namespaces.isolate()"
  permitted = (
    subprocess.run([sys.executable, "-c", isolated], cwd=ROOT, check=False).returncode == 0
  )
  kinds = ["disk", "cut", "stop"] if permitted else ["stop"]
  command = (
    "tools.resilience.chaos",
    f"--faults={len(kinds)}",
    "--faults_per_run=3",
    "--tasks=2",
    f"--kinds={','.join(kinds)}",
    "--seed=33306",  # Faults within a second after a step.
    f"--directory={tmp_path / 'campaign'}",
    f"--json={tmp_path / 'figures.json'}",
    "--",
    *_RECIPE,
  )
  finished = run_module(*command, timeout=280)
  assert finished.returncode == 0, finished.stdout + finished.stderr
  runs = json.loads((tmp_path / "figures.json").read_text())["runs"]
  assert all(run["equal"] and run["weights_sha256"] == run["expected_sha256"] for run in runs)
  found = {fault["kind"]: fault for run in runs for fault in run["faults"]}
  assert sorted(found) == sorted(kinds)
  # The other task may still end the step after the one that metrics.jsonl showed.
  assert found["stop"]["launches"] and found["stop"]["restored"] <= found["stop"]["step"] + 1
  for kind in set(kinds) - {"stop"}:
    assert found[kind]["lasted"] > 0 and found[kind]["launches"] == 0

  repeated = run_module(*command)
  assert (repeated.returncode, repeated.stdout) == (0, finished.stdout)


def test_bad_flags_are_refused_in_one_line():
  finished = run_module("tools.resilience.chaos", "--tasks=0")
  assert finished.returncode == 1
  assert finished.stderr == "error: '0' is not a number of tasks; use 1 or more.\n"
  with pytest.raises(UserError, match=r"--kinds=fire: expected some of kill, .*, disk"):
    chaos._permitted_kinds(["fire"])


def test_kinds_that_are_not_permitted_are_left_out_or_refused(monkeypatch, capsys):
  def refuse():
    raise PermissionError(errno.EPERM, "Operation not permitted")

  monkeypatch.setattr(namespaces, "isolate", refuse)
  assert chaos._permitted_kinds(["kill"]) == ["kill"]
  assert capsys.readouterr().err == ""
  assert chaos._permitted_kinds([]) == ["kill", "stop", "terminate", "corrupt", "launcher"]
  reason = "creating namespaces needs root (Operation not permitted)"
  assert capsys.readouterr().err == f"Leaving out cut and disk: {reason}.\n"
  with pytest.raises(UserError) as error:
    chaos._permitted_kinds(["disk", "kill"])
  assert str(error.value) == f"--kinds: cannot inject disk: {reason}; use other kinds"


def test_the_trainer_logs_the_lines_that_the_faults_wait_for():
  package = [path.read_text() for path in (ROOT / "tf_largebatch").rglob("*.py")]
  for text in faults._DISK_IS_FULL:
    assert any(text in source for source in package), text


def test_the_files_of_a_failed_run_are_kept():
  arguments = ("--faults=1", "--tasks=1", "--kinds=kill", "--", "--network=no_such_network")
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
  assert not faults._corrupt_newest(run, random.Random(0))
  directory = run.work_dir / "checkpoints"
  directory.mkdir(parents=True)
  ways = set()
  for seed in range(60):
    for step in (1, 2):
      (directory / f"step-{step:010d}.json").write_bytes(b"manifest")
      (directory / f"step-{step:010d}.npz").write_bytes(b"state" * 9)
    assert faults._corrupt_newest(run, random.Random(seed))
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
  (directory / "step-0000000002.npz").write_bytes(b"")
  assert faults._corrupt_newest(run, random.Random(0))
  assert (directory / "step-0000000002.npz").read_bytes() == b""
