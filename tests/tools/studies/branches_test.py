"""Branches of a small run: with its own k, it goes on as before; with another, as that recipe."""

import dataclasses
import json
import math
import shutil
import types

import pytest

from tests.launching import SMALL, run_module
from tf_largebatch.errors import UserError
from tf_largebatch.training.metrics import read_metrics
from tools import critical_batch
from tools.benchmark import harness
from tools.studies import branches

# In one process of pytest-xdist, because the run that they share takes seconds.
pytestmark = pytest.mark.xdist_group("branches")

_STEPS = 4  # Of 2 · 7 images in an epoch of 60.


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
  work_dir = tmp_path_factory.mktemp("parent") / "run"
  flags = ("--workers=2", "--epochs=3", "--workers_per_pass=2", f"--work_dir={work_dir}")
  # The third epoch has a record of one step and one of three.
  done = run_module("tf_largebatch.train", *SMALL, "--log_every_steps=3", *flags)
  assert done.returncode == 0, done.stderr
  return work_dir


def _checkpoint(work_dir, step=2 * _STEPS):
  return str(work_dir / "checkpoints" / f"step-{step:010d}.json")


def test_branches_from_the_second_epoch(parent, tmp_path, monkeypatch, capsys):
  values = {"from_checkpoint": _checkpoint(parent), "workers": ["8"], "epochs": 1}
  values |= {"tolerance": 1e9, "output_dir": str(tmp_path)}
  flags = types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values))
  monkeypatch.setattr(critical_batch, "flags", flags)
  monkeypatch.setattr(harness, "exit_on_sigterm", lambda: None)  # Pytest's own handler stays.
  critical_batch.main([])
  printed = capsys.readouterr().out
  assert "The loss comes back up to kn = 56" in printed
  found = json.loads((tmp_path / "branches.json").read_text())
  assert (found["epoch"], found["largest_kn"]) == (2, 56)
  own, larger = found["branches"]
  assert [(each["workers"], each["kn"], each["steps"]) for each in (own, larger)] == [
    (2, 14, 4),
    (8, 56, 1),
  ]
  # The branch with the parent's k ends with the parent's bytes.
  expected = json.loads((parent / "result.json").read_text())
  result = json.loads((tmp_path / "k2/result.json").read_text())
  assert result["weights_sha256"] == expected["weights_sha256"]
  assert own["validation_error"] == expected["val_error"]
  last = [r for r in read_metrics(str(parent)) if r["kind"] == "train" and r["epoch"] > 2]
  assert [record["step"] for record in last] == [9, 12]
  expected = (last[0]["loss"] + 3 * last[1]["loss"]) / _STEPS
  assert own["loss"] == pytest.approx(expected, rel=1e-12)
  record, _ = read_metrics(str(tmp_path / "k8"))
  assert (record["kind"], record["step"], record["loss"]) == ("train", 3, larger["loss"])
  # The rate and, by the momentum correction, the buffer grow with k.
  assert record["learning_rate"] == pytest.approx(4 * last[0]["learning_rate"], rel=1e-6)
  assert record["momentum_correction_factor"] == pytest.approx(4, rel=1e-6)
  assert (tmp_path / "branches.png").read_bytes().startswith(b"\x89PNG")

  before = [(tmp_path / f"k{k}.log").stat().st_mtime_ns for k in (2, 8)]
  critical_batch.main([])
  assert capsys.readouterr().out == printed
  assert [(tmp_path / f"k{k}.log").stat().st_mtime_ns for k in (2, 8)] == before
  with pytest.raises(UserError, match="k8 holds a run of another recipe"):
    read = branches.read_parent(_checkpoint(parent))
    branches.begin(read, branches.branch_recipe(read, 8, 2), str(tmp_path / "k8"))


def test_a_branch_begins_with_the_parents_weights_and_momentum(parent, tmp_path):
  read = branches.read_parent(_checkpoint(parent))
  recipe = branches.branch_recipe(read, 4, 1)
  assert (recipe.workers, recipe.epochs) == (4, 3)
  branches.begin(read, recipe, str(tmp_path / "branch"))
  again = branches.read_parent(_checkpoint(tmp_path / "branch", 4))
  assert int(again.arrays.pop("optimizer/0000")) == again.manifest.step == 4
  assert again.manifest.validation_error == read.manifest.validation_error is not None
  assert len(again.arrays) == len(read.arrays) - 1
  for name, array in again.arrays.items():
    assert array.tobytes() == read.arrays[name].tobytes(), name


def _outcome(workers, loss):
  return branches.Outcome(workers, 8 * workers, 1, 0.1, loss, 0.1, {})


@pytest.mark.parametrize(
  "losses, largest",
  [
    ({1: 9.0, 2: 1.0, 4: 1.01, 8: 1.0, 16: 1.02}, 64),
    ({2: 1.0, 4: 1.011, 8: 1.0}, 16),  # A larger k does not make up for one that fails.
    ({2: 1.0, 4: 0.5, 8: math.inf}, 32),
    ({2: 1.0, 4: math.nan}, 16),
  ],
)
def test_the_largest_kn_that_comes_back(losses, largest):
  outcomes = [_outcome(k, loss) for k, loss in losses.items()]
  assert branches.largest_that_comes_back(outcomes[::-1], 2, 0.01) == largest


def _damage(work_dir):
  (work_dir / "checkpoints" / "step-0000000008.npz").write_bytes(b"")
  return _checkpoint(work_dir)


@pytest.mark.parametrize(
  "checkpoint, message",
  [
    (lambda work_dir: _checkpoint(work_dir, 7), "No such file"),
    (_damage, "0 bytes of state instead of"),
    (lambda work_dir: str(work_dir / "recipe.json"), "is not a directory|has no recipe.json"),
  ],
)
def test_a_checkpoint_that_cannot_be_used(parent, tmp_path, checkpoint, message):
  shutil.copytree(parent, tmp_path / "run")
  with pytest.raises(UserError, match=message):
    branches.read_parent(checkpoint(tmp_path / "run"))


def test_a_checkpoint_inside_an_epoch(parent, tmp_path):
  shutil.copytree(parent, tmp_path / "run")
  recipe = json.loads((tmp_path / "run/recipe.json").read_text())
  recipe["recipe"]["workers"] = 3  # Then an epoch has two steps, and step 5 is inside one.
  (tmp_path / "run/recipe.json").write_text(json.dumps(recipe))
  read = branches.read_parent(_checkpoint(parent))
  arrays = read.arrays | {"optimizer/0000": read.arrays["optimizer/0000"] - 3}
  branches.store(str(tmp_path / "run/checkpoints"), 5, 0.0, arrays)
  with pytest.raises(UserError, match=r"is inside epoch 3, .* a multiple of 2 steps"):
    branches.read_parent(_checkpoint(tmp_path / "run", 5))


@pytest.mark.parametrize(
  "workers, changes, message",
  [
    (9, {}, "A step of workers=9 x per_worker_batch_size=7 = 63 images is more"),
    (4, {"decay": "cosine"}, "depends on its number of epochs"),
  ],
)
def test_recipes_that_cannot_branch(parent, workers, changes, message):
  read = branches.read_parent(_checkpoint(parent))
  read = dataclasses.replace(read, recipe=dataclasses.replace(read.recipe, **changes))
  with pytest.raises(UserError, match=message):
    branches.branch_recipe(read, workers, 1)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "--workers='' is refused"),
    (("--workers=4,x",), "--workers='4,x' is refused"),
    (("--workers=4", "runs/a"), "Unexpected argument 'runs/a'"),
  ],
)
def test_a_users_mistake_gets_one_line(parent, tmp_path, arguments, message):
  flags = (f"--from_checkpoint={_checkpoint(parent)}", f"--output_dir={tmp_path / 'new'}")
  done = run_module("tools.critical_batch", *flags, *arguments)
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
  assert not (tmp_path / "new").exists()
