"""The order of runs, their restarts and their progress."""

import json
import subprocess

import pytest

from tests.launching import SMALL
from tests.tools.studies.made_up_studies import make_study
from tf_largebatch.errors import UserError
from tf_largebatch.training.work_directory import locked
from tools.studies import scheduler
from tools.studies.plan import read_study
from tools.studies.scheduler import ActiveRun, Scheduler


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
  (run,) = read_study(make_study(tmp_path, "seeds = 1"))
  studies = Scheduler([run], str(tmp_path / "runs"), str(tmp_path), [])
  log = tmp_path / "runs" / f"{run.name}.log"
  log.parent.mkdir()
  with locked(str(tmp_path)), pytest.raises(UserError) as refused, locked(str(tmp_path)):
    pass
  log.write_text(f"error: {refused.value}\n")
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
    runs += read_study(make_study(tmp_path / folder, "seeds = 1", lines))
  with pytest.raises(UserError, match=r"one/small.flags and .*two/small.flags"):
    Scheduler(runs, str(tmp_path / "runs"), str(tmp_path), [])
  Scheduler([runs[0], runs[0]], str(tmp_path / "runs"), str(tmp_path), [])


def test_progress_is_printed_without_a_terminal(tmp_path, monkeypatch, capsys):
  (run,) = read_study(make_study(tmp_path, "seeds = 1"))
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
