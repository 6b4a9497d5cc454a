"""Tests of `tools.study`, on runs of seconds and on made-up results."""

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
from tools import study

_STUDIES = pathlib.Path(ROOT) / "tools" / "studies"


@pytest.fixture(autouse=True)
def _flags_are_parsed():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["study_test"])


def _make_study(root, text='seeds = 2\nflags = ["--log_every_steps=2"]', flag_lines=SMALL, head=""):
  """The path of a study of one flagfile."""
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
  """Until the run has come so far; the study must be at work all the while."""
  deadline = time.monotonic() + 90
  while study._epochs(work_dir) < epoch:
    assert time.monotonic() < deadline and process.poll() is None, work_dir
    time.sleep(0.05)


def test_interrupted_twice_is_the_same(tmp_path):
  """Once by SIGTERM, once by SIGKILL to the study alone, after which the run saves, too."""
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
      assert ("goes on from epoch " if seen else "small_seed0 begins.") in output
      # A run that outlives the study saves, too; until it has, it holds the work directory.
      deadline = time.monotonic() + 60
      while log.read_text().count("Stopped (SIGTERM)") <= len(seen):
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
      suspend(untouched, 1.1)  # The study alone, for longer than its waits; its run goes on.
      seen.append(study._epochs(work_dir))
      assert not _results(cut)
    for process in (start(path, cut), untouched):
      status, output = _finish(process)
      assert status == 0, output
  finally:
    for process in started:
      process.kill()  # Which ends its run, too.
  assert 2 <= seen[0] < 10 <= seen[1] < epochs
  assert "Continuing from" in log.read_text()
  (ours,), (theirs,) = (list(_results(root).values()) for root in (cut, whole))
  assert ours["weights_sha256"] == theirs["weights_sha256"]
  assert len(ours["validation_error"]) == len(ours["training_error"]) == epochs
  for name in ("validation_error", "training_error", "recipe", "val_error", "derived"):
    assert ours[name] == theirs[name], name
  assert ours["recipe"]["seed"] == 0 and ours["status"] == "complete"
  assert ours["hardware"]["cores"] == len(os.sched_getaffinity(0)) and ours["hardware"]["cpu"]
  # What is there is not run again.
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
  assert "--workers_per_pass=0 is refused" in output


def test_order_and_shares(tmp_path):
  """All of a seed before the next, a run of two studies once, complete ones not again."""
  runs = [run for name in ("table1", "figure1", "correction") for run in study.read_study(name)]
  done = tmp_path / "another" / "fashion_mnist_kn16_seed0.json"
  done.parent.mkdir()
  done.write_text(json.dumps({"recipe": runs[0].recipe.to_dict()}))
  assert runs[0].name == "fashion_mnist_kn16_seed0"
  studies = study._Studies(runs, str(tmp_path / "runs"), str(tmp_path), [])
  waiting = studies._waiting
  seeds = [run.recipe.seed for run in waiting]
  assert seeds == sorted(seeds)
  # Table 1: 4 points of 5 seeds; 7 more minibatches and 2 without the correction, of 3 each.
  assert len(waiting) == 4 * 5 + (7 + 2) * 3 - 1 == len({run.name for run in waiting})
  owners = {run.name: run.study for run in waiting}
  assert owners["fashion_mnist_kn512_seed2"] == "table1"
  assert owners["fashion_mnist_kn32_seed2"] == "figure1"


def test_what_is_left(tmp_path):
  """18 epochs a run: kn16 takes 36 s, another 18 s; one of unknown length counts as their mean."""
  runs = study.read_study("table1")
  for run, seconds in ((runs[0], 36.0), (runs[5], 18.0)):
    path = tmp_path / "table1" / f"{run.name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {"recipe": run.recipe.to_dict(), "flagfile": run.flagfile, "seconds": seconds}
    path.write_text(json.dumps(result))
  studies = study._Studies(runs, str(tmp_path / "runs"), str(tmp_path), [])
  # Four more of each of the two and ten of others: 4 * 36 + 4 * 18 + 10 * 27 s, by two at once.
  assert studies._estimate(jobs=2) == "about 04:03 left"
  assert (
    study._Studies(runs, str(tmp_path), str(tmp_path / "no"), [])._estimate(1).startswith("what")
  )


def test_a_run_that_a_killed_studys_trainer_still_holds_is_begun_again(tmp_path, capsys):
  (run,) = study.read_study(_make_study(tmp_path, "seeds = 1"))
  studies = study._Studies([run], str(tmp_path / "runs"), str(tmp_path), [])
  log = tmp_path / "runs" / f"{run.name}.log"
  log.parent.mkdir()
  # As `training._only_run_in` has it.
  log.write_text("error: work_dir=x is in use by a run (process 7 on y); end that one first\n")
  ended = subprocess.Popen(["false"])
  ended.wait()
  studies._waiting.clear()
  studies._starts[run.name] = 1
  studies._end(study.Working(run, ended, 0, 0, 0.0), 1, 1)
  assert studies._waiting == [run] and "is begun again" in capsys.readouterr().out
  studies._starts[run.name] = study._STARTS
  with pytest.raises(UserError, match="in use by a run"):
    studies._end(study.Working(run, ended, 0, 0, 0.0), 1, 1)


def test_two_flagfiles_of_one_name_are_refused(tmp_path):
  runs = []
  for folder, momentum in (("one", 0.3), ("two", 0.4)):
    (tmp_path / folder).mkdir()
    lines = (*SMALL, f"--momentum={momentum}")
    runs += study.read_study(_make_study(tmp_path / folder, "seeds = 1", lines))
  with pytest.raises(UserError, match=r"one/small.flags and .*two/small.flags"):
    study._Studies(runs, str(tmp_path / "runs"), str(tmp_path), [])
  study._Studies([runs[0], runs[0]], str(tmp_path / "runs"), str(tmp_path), [])


def test_progress_is_told_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
  (run,) = study.read_study(_make_study(tmp_path, "seeds = 1"))
  work_dir = tmp_path / "runs" / run.name
  work_dir.mkdir(parents=True)
  studies = study._Studies([run], str(tmp_path / "runs"), str(tmp_path), [])
  studies._working.append(study.Working(run, None, 0, 0, 0.0))
  (work_dir / "metrics.jsonl").write_text('{"kind": "train", "epoch": 1.5}\n')
  studies._show()
  assert capsys.readouterr().out == ""  # Not yet time for it.
  monkeypatch.setattr(study, "_TELL_SECONDS", 0.0)
  studies._show()
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(" 50%|") and "1.5/3 epochs [" in line


@pytest.mark.parametrize("field, value", [("workers", 7), ("epochs", 1)])
def test_a_result_of_another_recipe_is_told(tmp_path, field, value):
  (run,) = study.read_study(_make_study(tmp_path, "seeds = 1"))
  path = tmp_path / "results" / "tiny" / f"{run.name}.json"
  path.parent.mkdir(parents=True)
  there = run.recipe.to_dict() | {"workers": 1}  # Chosen by the cluster, where left out.
  path.write_text(json.dumps({"recipe": there}))
  # k that the flagfile leaves to the cluster may be any; what it does say may not differ.
  path.write_text(json.dumps({"recipe": there | {field: value}}))
  if field == "workers":
    assert study.find_result(run, tmp_path / "results")["recipe"]["workers"] == value
    return
  with pytest.raises(UserError, match=r"small_seed0.json is of another recipe than .*small.flags"):
    study.find_result(run, tmp_path / "results")


def test_a_name_is_no_pattern(tmp_path):
  (run,) = study.read_study(_make_study(tmp_path, "seeds = 1"))
  run = dataclasses.replace(run, flagfile="tiny [a].flags")
  path = tmp_path / "results" / "tiny" / "tiny [a]_seed0.json"
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps({"recipe": run.recipe.to_dict()}))
  assert study.find_result(run, tmp_path / "results")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}', '{"recipe": {"wrong": 1}}'])
def test_a_damaged_result_is_told(tmp_path, text):
  (run,) = study.read_study(_make_study(tmp_path, "seeds = 1"))
  path = tmp_path / "results" / "tiny" / f"{run.name}.json"
  path.parent.mkdir(parents=True)
  path.write_text(text)
  message = "is of another recipe" if text == '{"recipe": {}}' else "is no result of a run"
  with pytest.raises(UserError, match=message):
    study.find_result(run, tmp_path / "results")


@pytest.mark.parametrize(
  "text, head, message",
  [
    ('seeds = "2"', "", "seeds = '2' is no int"),
    ("seeds = true", "", "seeds = True is no int"),
    ("", "", "seeds = None is no int"),
    ("seeds = 0", "", "plans no run"),
    ("seeds = 1\nsteps = 2", "", "steps is none of"),
    ("seeds = 1", 'name = "x"', "name is none of"),
    ("seeds = 1", 'flags = "--cache"', "flags = '--cache' is no list"),
    ("seeds = 1\nflags = [1]", "", "each must be a string"),
    ('seeds = 1\nflags = ["--epochs=2"]', "", "epochs must stand in a flagfile"),
    ('seeds = 1\nflags = ["x"]', "", "x must stand in a flagfile"),
    ('seeds = 1\nflags = ["--unknown=2"]', "", "unknown"),
    ("seeds = 1", "=", "is no study"),
  ],
)
def test_a_study_that_will_not_do(tmp_path, text, head, message):
  with pytest.raises(UserError, match=message):
    study.read_study(_make_study(tmp_path, text, head=head))


def test_names_that_are_none(tmp_path):
  with pytest.raises(UserError, match=r"no study nothing; correction, .*table1, or the path"):
    study.read_study("nothing")
  path = tmp_path / "lost.toml"
  path.write_text('[[runs]]\nflagfile = "lost.flags"\nseeds = 1\n')
  with pytest.raises(UserError, match=r"lost.flags"):
    study.read_study(str(path))


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "No study was named"),
    (["table1", "--epochs=2"], "--epochs is not for studies"),
    (["table1", "--work_dir=here"], "--work_dir is not for studies"),
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
    assert study.main(left) == 1
  finally:
    values.unparse_flags()
    values(["study_test"])
  told = capsys.readouterr().err.splitlines()[-1]
  assert told.startswith("error: ") and message in told


def test_the_studies_plan_what_they_say():
  """Each flagfile differs from the baseline's in what its name says and in nothing else."""
  runs = {}
  for path in _STUDIES.glob("*.toml"):
    runs |= {pathlib.Path(run.flagfile).stem: run for run in study.read_study(str(path))}
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
