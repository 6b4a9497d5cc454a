"""What studies plan, and which are refused."""

import dataclasses
import pathlib

import pytest

from tests.launching import ROOT
from tests.tools.studies.made_up_studies import make_study
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.studies.plan import read_study

STUDIES = pathlib.Path(ROOT) / "tools" / "studies"


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
    ('seeds = 1\nname = "x"', "", "give name and recipe together"),
    ('seeds = 1\nrecipe = ["--epochs=2"]', "", "give name and recipe together"),
    ('seeds = 1\nname = "a/b"\nrecipe = ["--epochs=2"]', "", "name = 'a/b'; use letters"),
    ('seeds = 1\nname = "x"\nrecipe = ["--cache"]', "", "must be flags of the recipe"),
    ('seeds = 1\nname = "x"\nrecipe = ["--seed=2"]', "", "not the seed"),
    ('seeds = 1\nname = "x"\nrecipe = ["--epochs=2", "y"]', "", "must be flags of the recipe"),
    ('seeds = 1\nflags = ["x"]', "", "x belongs in a flagfile"),
    ('seeds = 1\nflags = ["--unknown=2"]', "", "unknown"),
    ("seeds = 1", "=", "is not a study"),
  ],
)
def test_an_invalid_study_is_refused(tmp_path, text, head, message):
  with pytest.raises(UserError, match=message):
    read_study(make_study(tmp_path, text, head=head))


def test_seeds_from_the_first_on(tmp_path):
  runs = read_study(make_study(tmp_path, "seeds = 2\nfirst_seed = 5"))
  assert [run.recipe.seed for run in runs] == [5, 6]
  assert [run.name for run in runs] == ["small_seed5", "small_seed6"]


def test_a_changed_recipe_has_a_name_of_its_own(tmp_path):
  text = 'seeds = 1\nname = "n4"\nrecipe = ["--workers=8", "--per_worker_batch_size=4"]'
  (run,) = read_study(make_study(tmp_path, text))
  assert (run.name, run.changes) == ("n4_seed0", ("--workers=8", "--per_worker_batch_size=4"))
  (plain,) = read_study(make_study(tmp_path, "seeds = 1"))
  assert (plain.name, plain.changes) == ("small_seed0", ())
  changes = {"workers": 8, "per_worker_batch_size": 4}
  assert run.recipe == dataclasses.replace(plain.recipe, **changes) != plain.recipe


def test_unknown_names_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"no study nothing; give one of correction, .*or a \.toml"):
    read_study("nothing")
  path = tmp_path / "lost.toml"
  path.write_text('[[runs]]\nflagfile = "lost.flags"\nseeds = 1\n')
  with pytest.raises(UserError, match=r"lost.flags"):
    read_study(str(path))


def test_the_studies_plan_what_their_names_say():
  """Each flagfile differs from the baseline's in what its name says and in nothing else."""
  runs = {}
  for path in STUDIES.glob("*.toml"):
    runs |= {run.group: run for run in read_study(str(path))}
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
