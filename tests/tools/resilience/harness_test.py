"""Tests of the harness: what it reads of a run, and that it leaves no process behind."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from tests.launching import ROOT
from tf_largebatch.errors import UserError
from tools.resilience import harness


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
  assert harness.last_step(tmp_path) == 0
  lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "st')
  assert harness.last_step(tmp_path) == 2


def test_the_last_line_is_not_blank(tmp_path):
  log = tmp_path / "log"
  log.write_bytes(b"first\n\xff last\n\n")
  assert harness.last_line(log) == "\ufffd last"
  log.write_text("")
  assert harness.last_line(log) == ""


def test_a_run_that_ends_early_is_an_error(tmp_path):
  run = harness.LaunchedRun(tmp_path / "run", ["--network=no_such_network"])
  run.launch(1)
  try:
    with pytest.raises(UserError, match=r"No step 1: the run ended; see .*log\.txt"):
      run.wait_for(lambda: run.step() >= 1, "No step 1")
    assert run.wait(30) == 1
  finally:
    run.kill()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_program_leaves_nothing_behind(tmp_path, number, status):
  """The launcher and its tasks end with the program that started the run."""
  program = f"""
import pathlib
from tools.resilience import harness
harness.prepare()
run = harness.LaunchedRun(pathlib.Path({str(tmp_path / "run")!r}), ["--dataset=synthetic"])
run.launch(2)
try:
  run.wait_for(lambda: len(run.tasks()) == 2, "No tasks")
  print("started", flush=True)
  run.wait(60)
finally:
  run.kill()
"""
  process = subprocess.Popen(
    [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  with process:
    assert process.stdout.readline() == "started\n"
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 3
    process.send_signal(number)
    assert process.wait(timeout=10) == status
  _, left = psutil.wait_procs(started, timeout=10)
  left = [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
  for one in left:
    one.kill()
  assert not left
