"""Tests of `tools.study` as a program, on runs of seconds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from tests.launching import ROOT, SMALL, run_program, suspend
from tests.tools.studies.made_up_studies import make_study
from tools import program, study
from tools.studies import run_files


def _start(path, root, *arguments):
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "tools.study", path, f"--runs_dir={root}/runs"),
      *(f"--results_dir={root}/results", *arguments),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(process):
  try:
    output, _ = process.communicate(timeout=120)
  finally:
    process.kill()
  return process.returncode, output


def _results(root):
  return {path.name: json.loads(path.read_text()) for path in root.glob("results/*/*.json")}


def _wait_for_epoch(work_dir, epoch, process):
  """Waits until the run has trained so far, while the study must keep running."""
  deadline = time.monotonic() + 90
  while run_files.finished_epochs(work_dir) < epoch:
    assert time.monotonic() < deadline and process.poll() is None, work_dir
    time.sleep(0.05)


def test_it_does_not_import_tensorflow():
  """A process with TensorFlow's threads must not fork."""
  loaded = run_program(
    "import json, sys; from tools import study; print(json.dumps(sorted(sys.modules)))"
  )
  assert "tools.studies.scheduler" in loaded and "tensorflow" not in loaded


def test_interrupted_twice_is_the_same(tmp_path):
  """A SIGTERM, then a SIGKILL to the study alone, after which its run saves too."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  epochs = 24
  for root in (whole, cut):
    root.mkdir()
    longer = (*SMALL, "--train_split=train[:700]", f"--epochs={epochs}")
    path = make_study(root, "seeds = 1", longer)
  work_dir, seen, started = cut / "runs" / "small_seed0", [], []
  log = pathlib.Path(f"{work_dir}.log")

  def start(path, root):
    started.append(_start(path, root))
    return started[-1]

  try:
    untouched = start(str(whole / "tiny.toml"), whole)
    for number, epoch in ((signal.SIGTERM, 2), (signal.SIGKILL, 10)):
      process = start(path, cut)
      _wait_for_epoch(work_dir, epoch, process)
      process.send_signal(number)
      status, output = _finish(process)
      assert status == (143 if number == signal.SIGTERM else -9), output
      assert ("continues from epoch " if seen else "small_seed0 begins.") in output
      # A run that outlives the study saves too; until then it holds the work directory.
      deadline = time.monotonic() + 60
      while log.read_text().count("Stopped (SIGTERM)") <= len(seen):
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
      suspend(untouched, 1.1)  # The study alone, for longer than its waits; its run continues.
      seen.append(run_files.finished_epochs(work_dir))
      assert not _results(cut)
    for process in (start(path, cut), untouched):
      status, output = _finish(process)
      assert status == 0, output
  finally:
    for process in started:
      process.kill()  # This ends its run too.
  assert 2 <= seen[0] < 10 <= seen[1] < epochs
  assert "Continuing from" in log.read_text()
  (ours,), (theirs,) = (list(_results(root).values()) for root in (cut, whole))
  assert ours["weights_sha256"] == theirs["weights_sha256"]
  assert len(ours["validation_error"]) == len(ours["training_error"]) == epochs
  for name in ("validation_error", "training_error", "recipe", "val_error", "derived"):
    assert ours[name] == theirs[name], name
  assert ours["recipe"]["seed"] == 0 and ours["status"] == "complete"
  assert ours["hardware"]["cores"] == len(os.sched_getaffinity(0)) and ours["hardware"]["cpu"]
  # A run with a result is not repeated.
  before = (work_dir.stat().st_mtime_ns, log.stat().st_size)
  status, output = _finish(_start(path, cut))
  assert status == 0 and "1 of 1 runs are complete" in output
  assert (work_dir.stat().st_mtime_ns, log.stat().st_size) == before


def test_a_run_that_diverges_is_a_result(tmp_path):
  own = ("--reference_learning_rate=1e30", "--warmup=none")
  path = make_study(tmp_path, "seeds = 1", (*SMALL, "--reference_batch_size=7", *own))
  status, output = _finish(_start(path, tmp_path))
  assert status == 0 and "Training diverged" in output, output
  (result,) = _results(tmp_path).values()
  assert (result["status"], result["val_error"]) == ("diverged", None)
  assert "peak rate of 1e+30" in result["reason"]
  assert result["recipe"]["reference_learning_rate"] == 1e30


def test_a_mistake_ends_the_study(tmp_path):
  path = make_study(tmp_path, 'seeds = 1\nflags = ["--workers_per_pass=0"]')
  status, output = _finish(_start(path, tmp_path))
  assert status == 1 and not _results(tmp_path)
  assert output.splitlines()[-1].startswith("error: small_seed0 ended with status 1: error: ")
  assert "workers_per_pass=0 is out of range" in output


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "No study was given"),
    (["table1", "--epochs=2"], "--epochs is refused for studies"),
    (["table1", "--work_dir=here"], "--work_dir is refused for studies"),
    (["table1", "--jobs=10000"], "--jobs=10000 is more than"),
  ],
)
def test_bad_commands(tmp_path, arguments, message, capsys, monkeypatch):
  values = flags.FLAGS
  if "jobs" not in values:
    study.define_flags()
  values.unparse_flags()
  try:
    left = values(["study", f"--results_dir={tmp_path}", *arguments])
    assert program.call(study.main, left[1:], takes_arguments=True) == 1
  finally:
    values.unparse_flags()
    values(["study_test"])
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith("error: ") and message in line
