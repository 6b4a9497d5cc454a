"""Tests of `tools.study` on runs of seconds and on made-up results."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from tests.launching import ROOT, SMALL, suspend
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import program, study
from tools.studies import run_files, scheduler
from tools.studies.plan import read_study
from tools.studies.scheduler import ActiveRun, Scheduler

_STUDIES = pathlib.Path(ROOT) / "tools" / "studies"


@pytest.fixture(autouse=True)
def _flags_are_parsed():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["study_test"])


def _make_study(root, text='seeds = 2\nflags = ["--log_every_steps=2"]', flag_lines=SMALL, head=""):
  """Writes a study of one flagfile and returns its path."""
  recipe = [line for line in flag_lines if "every" not in line and "evaluation" not in line]
  (root / "small.flags").write_text("\n".join(["--epochs=3", *recipe]) + "\n")
  path = root / "tiny.toml"
  path.write_text(f'{head}\n[[runs]]\nflagfile = "{root}/small.flags"\n{text}\n')
  return str(path)


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


def test_interrupted_twice_is_the_same(tmp_path):
  """A SIGTERM, then a SIGKILL to the study alone, after which its run saves too."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  epochs = 24
  for root in (whole, cut):
    root.mkdir()
    longer = (*SMALL, "--train_split=train[:700]", f"--epochs={epochs}")
    path = _make_study(root, "seeds = 1", longer)
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
  path = _make_study(tmp_path, "seeds = 1", (*SMALL, "--reference_batch_size=7", *own))
  status, output = _finish(_start(path, tmp_path))
  assert status == 0 and "Training diverged" in output, output
  (result,) = _results(tmp_path).values()
  assert (result["status"], result["val_error"]) == ("diverged", None)
  assert "peak rate of 1e+30" in result["reason"]
  assert result["recipe"]["reference_learning_rate"] == 1e30


def test_a_mistake_ends_the_study(tmp_path):
  path = _make_study(tmp_path, 'seeds = 1\nflags = ["--workers_per_pass=0"]')
  status, output = _finish(_start(path, tmp_path))
  assert status == 1 and not _results(tmp_path)
  assert output.splitlines()[-1].startswith("error: small_seed0 ended with status 1: error: ")
  assert "workers_per_pass=0 is out of range" in output


def test_order_and_shares(tmp_path):
  """One seed after the other; a run of two studies once; complete runs not at all."""
  runs = [run for name in ("table1", "figure1", "correction") for run in read_study(name)]
  done = tmp_path / "another" / "fashion_mnist_kn16_seed0.json"
  done.parent.mkdir()
  done.write_text(json.dumps({"recipe": runs[0].recipe.to_dict()}))
  assert runs[0].name == "fashion_mnist_kn16_seed0"
  studies = Scheduler(runs, str(tmp_path / "runs"), str(tmp_path), [])
  waiting = studies._waiting
  seeds = [run.recipe.seed for run in waiting]
  assert seeds == sorted(seeds)
  # Table 1: 4 points of 5 seeds; 7 more minibatches and 2 without the correction, of 3 each.
  assert len(waiting) == 4 * 5 + (7 + 2) * 3 - 1 == len({run.name for run in waiting})
  owners = {run.name: run.study for run in waiting}
  assert owners["fashion_mnist_kn512_seed2"] == "table1"
  assert owners["fashion_mnist_kn32_seed2"] == "figure1"


def test_time_left(tmp_path):
  """Runs of 18 epochs: kn16 takes 36 s, another 18 s; a run of unknown length counts as 27 s."""
  runs = read_study("table1")
  for run, seconds in ((runs[0], 36.0), (runs[5], 18.0)):
    path = tmp_path / "table1" / f"{run.name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {"recipe": run.recipe.to_dict(), "flagfile": run.flagfile, "seconds": seconds}
    path.write_text(json.dumps(result))
  studies = Scheduler(runs, str(tmp_path / "runs"), str(tmp_path), [])
  # Four more of each of the two and ten of others: 4 * 36 + 4 * 18 + 10 * 27 s, by two at once.
  assert studies._estimate(jobs=2) == "about 04:03 left"
  assert (
    Scheduler(runs, str(tmp_path), str(tmp_path / "no"), [])._estimate(1) == "time left unknown"
  )


def test_a_run_that_the_trainer_of_a_killed_study_still_holds_is_restarted(tmp_path, capsys):
  (run,) = read_study(_make_study(tmp_path, "seeds = 1"))
  studies = Scheduler([run], str(tmp_path / "runs"), str(tmp_path), [])
  log = tmp_path / "runs" / f"{run.name}.log"
  log.parent.mkdir()
  # As `training._only_run_in` has it.
  log.write_text("error: work_dir=x is in use by a run (process 7 on y); end that one first\n")
  ended = subprocess.Popen(["false"])
  ended.wait()
  studies._waiting.clear()
  studies._starts[run.name] = 1
  studies._end(ActiveRun(run, ended, 0, 0, 0.0), 1, 1)
  assert studies._waiting == [run] and "is restarted" in capsys.readouterr().out
  studies._starts[run.name] = scheduler._STARTS
  with pytest.raises(UserError, match="in use by a run"):
    studies._end(ActiveRun(run, ended, 0, 0, 0.0), 1, 1)


def test_two_flagfiles_of_one_name_are_refused(tmp_path):
  runs = []
  for folder, momentum in (("one", 0.3), ("two", 0.4)):
    (tmp_path / folder).mkdir()
    lines = (*SMALL, f"--momentum={momentum}")
    runs += read_study(_make_study(tmp_path / folder, "seeds = 1", lines))
  with pytest.raises(UserError, match=r"one/small.flags and .*two/small.flags"):
    Scheduler(runs, str(tmp_path / "runs"), str(tmp_path), [])
  Scheduler([runs[0], runs[0]], str(tmp_path / "runs"), str(tmp_path), [])


def test_progress_is_printed_without_a_terminal(tmp_path, monkeypatch, capsys):
  (run,) = read_study(_make_study(tmp_path, "seeds = 1"))
  work_dir = tmp_path / "runs" / run.name
  work_dir.mkdir(parents=True)
  studies = Scheduler([run], str(tmp_path / "runs"), str(tmp_path), [])
  studies._active.append(ActiveRun(run, None, 0, 0, 0.0))
  (work_dir / "metrics.jsonl").write_text('{"kind": "train", "epoch": 1.5}\n')
  studies._show_progress()
  assert capsys.readouterr().out == ""  # It is not due yet.
  monkeypatch.setattr(scheduler, "_PROGRESS_SECONDS", 0.0)
  studies._show_progress()
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(" 50%|") and "1.5/3 epochs [" in line


@pytest.mark.parametrize("field, value", [("workers", 7), ("epochs", 1)])
def test_a_result_of_another_recipe_is_refused(tmp_path, field, value):
  (run,) = read_study(_make_study(tmp_path, "seeds = 1"))
  path = tmp_path / "results" / "tiny" / f"{run.name}.json"
  path.parent.mkdir(parents=True)
  recipe = run.recipe.to_dict() | {"workers": 1}  # The cluster chooses k, which is not given.
  # k may have any value if the flagfile leaves it to the cluster; other fields may not differ.
  path.write_text(json.dumps({"recipe": recipe | {field: value}}))
  if field == "workers":
    assert run_files.find_result(run, tmp_path / "results")["recipe"]["workers"] == value
    return
  with pytest.raises(UserError, match=r"small_seed0.json has another recipe than .*small.flags"):
    run_files.find_result(run, tmp_path / "results")


def test_a_name_is_not_a_pattern(tmp_path):
  (run,) = read_study(_make_study(tmp_path, "seeds = 1"))
  run = dataclasses.replace(run, flagfile="tiny [a].flags")
  path = tmp_path / "results" / "tiny" / "tiny [a]_seed0.json"
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps({"recipe": run.recipe.to_dict()}))
  assert run_files.find_result(run, tmp_path / "results")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}', '{"recipe": {"wrong": 1}}'])
def test_a_damaged_result_is_refused(tmp_path, text):
  (run,) = read_study(_make_study(tmp_path, "seeds = 1"))
  path = tmp_path / "results" / "tiny" / f"{run.name}.json"
  path.parent.mkdir(parents=True)
  path.write_text(text)
  message = "has another recipe" if text == '{"recipe": {}}' else "is not the result of a run"
  with pytest.raises(UserError, match=message):
    run_files.find_result(run, tmp_path / "results")


@pytest.mark.parametrize(
  "text, head, message",
  [
    ('seeds = "2"', "", "seeds = '2' is not of type int"),
    ("seeds = true", "", "seeds = True is not of type int"),
    ("", "", "seeds = None is not of type int"),
    ("seeds = 0", "", "plans no run"),
    ("seeds = 1\nsteps = 2", "", "unknown field steps"),
    ("seeds = 1", 'name = "x"', "unknown field name"),
    ("seeds = 1", 'flags = "--cache"', "flags = '--cache' is not of type list"),
    ("seeds = 1\nflags = [1]", "", "each must be a string"),
    ('seeds = 1\nflags = ["--epochs=2"]', "", "epochs belongs in a flagfile"),
    ('seeds = 1\nflags = ["x"]', "", "x belongs in a flagfile"),
    ('seeds = 1\nflags = ["--unknown=2"]', "", "unknown"),
    ("seeds = 1", "=", "is not a study"),
  ],
)
def test_an_invalid_study_is_refused(tmp_path, text, head, message):
  with pytest.raises(UserError, match=message):
    read_study(_make_study(tmp_path, text, head=head))


def test_unknown_names_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"no study nothing; give one of correction, .*or a \.toml"):
    read_study("nothing")
  path = tmp_path / "lost.toml"
  path.write_text('[[runs]]\nflagfile = "lost.flags"\nseeds = 1\n')
  with pytest.raises(UserError, match=r"lost.flags"):
    read_study(str(path))


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


def test_the_studies_plan_what_their_names_say():
  """Each flagfile differs from the baseline's in what its name says and in nothing else."""
  runs = {}
  for path in _STUDIES.glob("*.toml"):
    runs |= {pathlib.Path(run.flagfile).stem: run for run in read_study(str(path))}
  base = runs["fashion_mnist_kn16"].recipe.to_dict()
  for stem, run in runs.items():
    if not stem.startswith("fashion_mnist_kn"):
      continue
    kn, *words = stem.removeprefix("fashion_mnist_kn").split("_")
    varied = {"workers": int(kn) // base["per_worker_batch_size"], "seed": run.recipe.seed}
    varied |= {"warmup": "constant"} if "constant" in words else {}
    varied |= {"warmup": "none"} if "none" in words else {}
    varied |= {"momentum_correction": False} if "uncorrected" in words else {}
    assert run.recipe == Recipe(**base | varied), stem
