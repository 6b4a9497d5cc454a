"""Tests of `tools.replication` on made-up results."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from tests.launching import ROOT
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import replication
from tools.studies import claims, figures, post_hoc, verdicts
from tools.studies.results import read_groups

_KN = "fashion_mnist_kn"
_SCATTER = (0.0, 0.001, -0.001, 0.0005, -0.0005)
# Made-up groups: stem → (warmup, correction, mean error, seeds).
_GROUPS = {
  **{f"{_KN}{16 * 2**i}": ("gradual", True, 0.100, 5) for i in range(6)},
  **{f"{_KN}1024": ("gradual", True, 0.112, 3), f"{_KN}2048": ("gradual", True, 0.130, 3)},
  **{f"{_KN}4096": ("gradual", True, 0.160, 3), f"{_KN}512_none": ("none", True, 0.110, 5)},
  f"{_KN}512_constant": ("constant", True, 0.120, 5),
  f"{_KN}512_uncorrected": ("gradual", False, 0.100, 3),
  f"{_KN}512_constant_uncorrected": ("constant", False, 0.1215, 3),
}
_EPOCHS = 12


def _recipe(stem, warmup="gradual", correction=True, seed=0):
  if not stem.startswith(_KN):
    return Recipe(dataset="cifar10", network="resnet20", workers=4, seed=seed)
  return Recipe(
    dataset="fashion_mnist",
    network="resnet20",
    image_size=28,
    workers=int(stem.removeprefix(_KN).split("_")[0]) // 16,
    per_worker_batch_size=16,
    epochs=_EPOCHS,
    reference_batch_size=16,
    warmup=warmup,
    warmup_epochs=2,
    decay_epochs=(6.0, 9.0),
    momentum_correction=correction,
    seed=seed,
  )


def _write(root, run, stem, error, study="table1", name=None, **changes):
  """Writes a run's result file as tools.study does; changes replace top-level fields."""
  early = {False: 1.0, True: 1.0 + run.global_batch_size / 1000}[run.warmup == "none"]
  curve = {e: error + 0.4 * early / e**2 - 0.4 / _EPOCHS**2 for e in range(1, _EPOCHS + 1)}
  data = {
    "study": study,
    "flagfile": f"flags/{stem}.flags",
    "seed": run.seed,
    "status": "complete",
    "recipe": run.to_dict(),
    "derived": {"train_examples": 60000},
    "versions": {"python": "3.11.7", "tensorflow": "2.21.0", "keras": "3.15.1"},
    "hardware": {"cpu": "AMD EPYC", "cores": 1},
    "training_error": {str(e): min(1.0, value * 0.7) for e, value in curve.items()},
    "validation_error": {str(e): min(1.0, value) for e, value in curve.items()},
    "val_error": error,
    "val_error_median_last_5": error,
    "seconds": 100.0,
    "weights_sha256": "0123456789abcdef" * 4,
    **changes,
  }
  path = root / study / (name or f"{stem}_seed{run.seed}.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(data))
  return path


_DIVERGED = {
  "status": "diverged",
  "reason": "error: Training diverged at step 7.",
  **dict.fromkeys(("val_error", "val_error_median_last_5", "weights_sha256", "seconds")),
}


def _write_all(root, groups):
  for stem, (warmup, correction, error, seeds) in groups.items():
    for seed in range(seeds):
      _write(root, _recipe(stem, warmup, correction, seed), stem, error + _SCATTER[seed])
  _write(root, _recipe("cifar10_resnet20_he"), "cifar10_resnet20_he", 0.0901, study="known")
  return root


def _read(root):
  return claims.arrange(read_groups(str(root)))


def _verdicts(root):
  return {claim.key: claim.verdict for claim in claims.decide(_read(root))}


# What R's t.test(x, y) gives, by Rosetta Code's "Welch's t-test": p = 0.010751561149785.
_X, _Y = [3.0, 4.0, 1.0, 2.1], [490.2, 340.0, 433.9]


def _spread(difference, half, seeds=(5, 3)):
  """Returns two samples whose 90 % Welch interval is difference ± half, by Welch's formula."""
  first, second = ([float(i - (n - 1) / 2) for i in range(n)] for n in seeds)
  a, b = (sum(x * x for x in each) / (len(each) - 1) / len(each) for each in (first, second))
  degrees = (a + b) ** 2 / (a * a / (len(first) - 1) + b * b / (len(second) - 1))
  scale = half / (stats.t.ppf(0.95, degrees) * (a + b) ** 0.5)
  return [0.1 + difference + scale * x for x in first], [0.1 + scale * x for x in second]


def _test(difference, half):
  return verdicts.welch(*_spread(difference, half))


def test_welch_equals_a_published_example_and_scipy():
  test = verdicts.welch(_Y, _X)
  assert 2 * test.p_above() == pytest.approx(0.010751561149785, rel=1e-9)
  random = np.random.default_rng(0)
  for a, b in itertools.product((2, 3, 5), (2, 5, 7)):
    first, second = random.normal(0.1, 0.01, a), random.normal(0.1, 0.03, b)
    test = verdicts.welch(list(first), list(second))
    for margin, alternative in itertools.product((0.0, 0.005, -0.005), ("greater", "less")):
      known = stats.ttest_ind(first - margin, second, equal_var=False, alternative=alternative)
      p = {"greater": test.p_above, "less": test.p_below}[alternative](margin)
      assert p == pytest.approx(known.pvalue, rel=1e-6)
    known = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.9)
    assert test.interval == pytest.approx((known.low, known.high))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
  "difference, half, verdict",
  [
    (0.0, 0.0049, "reproduced"),
    (0.0, 0.0051, "not decidable at this scale"),
    (0.0039, 0.001, "reproduced"),
    (0.0041, 0.001, "not decidable at this scale"),
    (0.0059, 0.001, "not decidable at this scale"),
    (0.0061, 0.001, "not reproduced"),
  ],
)
def test_equal(sign, difference, half, verdict):
  assert verdicts.equal(_test(sign * difference, half)) == verdict


@pytest.mark.parametrize(
  "difference, half, verdict",
  [
    (0.0101, 0.01, "reproduced"),  # The interval's lower end is where p = alpha.
    (0.0099, 0.01, "not decidable at this scale"),
    (0.0011, 0.001, "reproduced"),  # However small the effect.
    (0.0009, 0.001, "not reproduced"),  # Within ±delta.
    (0.0, 0.0049, "not reproduced"),
    (0.0, 0.0051, "not decidable at this scale"),
    (-0.0099, 0.01, "not decidable at this scale"),
    (-0.0101, 0.01, "not reproduced"),  # The opposite is so.
  ],
)
def test_worse(difference, half, verdict):
  assert verdicts.worse(_test(difference, half)) == verdict


def test_worse_by_more_than_delta():
  assert verdicts.worse_by_delta(_test(0.0151, 0.01))
  assert not verdicts.worse_by_delta(_test(0.0149, 0.01))


def test_without_scatter_no_test_is_possible():
  assert verdicts.welch([0.9] * 3, [0.1] * 5) is None
  assert verdicts.welch([0.9] * 3, [0.1, 0.1, 0.2]).p_above() < 0.01
  assert verdicts.equal(None) == verdicts.worse(None) == "not decidable at this scale"
  assert not verdicts.worse_by_delta(None)


def _sweep(root, means, seeds=3):
  """Writes a sweep with these mean errors, the baseline first; returns the verdicts."""
  for i, mean in enumerate(means):
    for seed in range(seeds):
      stem = f"{_KN}{16 * 2**i}"
      _write(root, _recipe(stem, seed=seed), stem, mean + _SCATTER[seed])
  return _verdicts(root)


@pytest.mark.parametrize(
  "above, verdicts, ends",
  [
    # Errors minus the baseline's, in points; "|" separates those from 64 times the minibatch on.
    ("0 0 0 0 0 | 1 2 3", "reproduced, reproduced, reproduced", (512, 1024)),
    ("0 0 0 0 0 | 0 0 0", "reproduced, not reproduced, not decidable", (4096, None)),
    ("0 0 0 0 0 | 0 0 3", "reproduced, reproduced, not decidable", (2048, 4096)),
    ("0 0 0 0 0 | .5 2 3", "reproduced, reproduced, reproduced", (512, 2048)),
    ("0 0 .5 0 0 | 0 0 .5", "not decidable, not decidable, not decidable", (64, None)),
    ("0 0 0 0 1 | 0 2 3", "not reproduced, reproduced, not reproduced", (256, 512)),
    ("0 0 0 0 1 | 0 0 0", "not reproduced, not decidable, not reproduced", (256, 512)),
    ("0 0 0 0 -1 | 1 2 3", "not reproduced, reproduced, reproduced", (256, 1024)),
    ("0 0 0 0 0 | 2 1 3", "reproduced, reproduced, not reproduced", (512, 1024)),
    ("0 0 0 0 0 | 0 2 2.05", "reproduced, reproduced, not reproduced", (1024, 2048)),
  ],
)
def test_the_sweep_and_its_break(tmp_path, above, verdicts, ends):
  means = [0.1, *(0.1 + float(each) / 100 for each in above.replace("|", "").split())]
  found = _sweep(tmp_path, means)
  expected = verdicts.replace("decidable", "decidable at this scale").split(", ")
  assert [found[key] for key in ("d1", "d2", "d3")] == expected
  groups = _read(tmp_path)
  largest, smallest = claims.find_break(list(groups.values()))
  assert (largest.kn, smallest and smallest.kn) == ends


def test_beyond_the_break_without_scatter_nothing_is_decided(tmp_path):
  ended = (f"{_KN}2048", f"{_KN}4096")
  _write_all(tmp_path, {stem: group for stem, group in _GROUPS.items() if stem not in ended})
  for stem, seed in itertools.product(ended, range(3)):
    _write(tmp_path, _recipe(stem, seed=seed), stem, 0.9)
  for seed in range(3):  # Equal to the baseline, so that the break comes after it.
    _write(tmp_path, _recipe(f"{_KN}1024", seed=seed), f"{_KN}1024", 0.1 + _SCATTER[seed])
  assert _verdicts(tmp_path)["d3"] == verdicts.NOT_DECIDABLE


def test_holm():
  # 4 · 0.01, 3 · 0.02, then 2 · 0.025 and 1 · 0.04, which are less than the value before them.
  adjusted = verdicts.holm({"c": 0.025, "a": 0.01, "d": 0.04, "b": 0.02})
  assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
  assert verdicts.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_post_hoc_analyses(tmp_path):
  results = _write_all(tmp_path, _GROUPS)
  text = post_hoc.to_markdown(_read(results))
  lines = text.splitlines()
  assert lines[0].startswith("**Post-hoc analyses**") and lines[1] == ""
  # All five of one group are above all five of the other, 1 of the 10! / (5! 5!) = 252 orders; Holm
  # multiplies it by 5.
  assert "a2 0.000 and 0.020 (0.004)" in lines[2]
  seeds = [0.1 + each for each in _SCATTER[1:]]
  test = stats.ttest_ind(seeds, seeds, equal_var=False).confidence_interval(0.9)
  interval = f"[{100 * test.low:+.2f}, {100 * test.high:+.2f}]"
  expected = f"- Without seed 0, which the pilot runs used, a1: +0.00 {interval}"
  assert lines[3].startswith(expected)
  assert "- No minibatch up to kn 512 (32 times the baseline's) is worse than the baseline" in text
  assert "The whole interval" not in text
  lower = {**_GROUPS, f"{_KN}64": ("gradual", True, 0.09, 3)}
  text = post_hoc.to_markdown(_read(_write_all(tmp_path / "2", lower)))
  assert text.endswith("- The whole interval of the difference is below 0 for kn 64.")


def test_what_is_missing_is_pending(tmp_path):
  found = _sweep(tmp_path, [0.1] * 6 + [0.12], seeds=3)
  assert found["a1"] == f"pending (runs: 3 of 5 of {_KN}512, 3 of 5 of {_KN}16)"
  assert found["a2"].startswith(f"pending (runs: 0 of 5 of {_KN}512_none, 3 of 5")
  assert found["d1"] == "reproduced"
  assert found["d2"] == f"pending (runs: 0 of 3 of {_KN}2048, 0 of 3 of {_KN}4096)"
  assert found["f1"] == f"pending (runs: 0 of 3 of {_KN}512_uncorrected)"
  assert found["e"] == "pending (runs: 0 of 1 of cifar10_resnet20_he)"


def test_a_diverged_run_counts_as_chance_and_has_no_matching_curve(tmp_path):
  _write_all(tmp_path, _GROUPS)
  assert _verdicts(tmp_path)["a5"] == "reproduced"
  stem = f"{_KN}512"
  _write(tmp_path, _recipe(stem, seed=4), stem, 0.1, **_DIVERGED)
  group = _read(tmp_path)[stem]
  assert group.errors[4] == 0.9
  assert group.summary == "26.01 ± 35.77 % (5 seeds, 1 diverged, counted as 90 %)"
  found = _verdicts(tmp_path)
  assert found["a5"] == "not reproduced"
  assert found["a1"] == found["a2"] == "not decidable at this scale"


@pytest.mark.parametrize("since, verdict", [(6, "reproduced"), (7, "not reproduced")])
def test_training_curves_must_match_from_the_first_half_on(tmp_path, since, verdict):
  for stem, seed in itertools.product((f"{_KN}16", f"{_KN}512"), range(5)):
    apart = 0.02 * stem.endswith("512")
    curve = {str(e): 0.2 + apart * (e < since) for e in range(1, _EPOCHS + 1)}
    _write(tmp_path, _recipe(stem, seed=seed), stem, 0.1 + _SCATTER[seed], training_error=curve)
  assert _verdicts(tmp_path)["a5"] == verdict


@pytest.mark.parametrize(
  "error, verdict",
  [(0.0826, "reproduced"), (0.0925, "reproduced"), (0.0926, "not reproduced"), (0.0824, "not rep")],
)
def test_the_known_number(tmp_path, error, verdict):
  stem = "cifar10_resnet20_he"
  _write(tmp_path, _recipe(stem), stem, error, val_error_median_last_5=0.5)
  assert _verdicts(tmp_path)["e"].startswith(verdict)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"seconds": None}, "seconds is None"),
    ({"seed": True}, "seed is True"),
    ({"seed": 1}, "seed is 1, the recipe's 0"),
    ({"val_error_median_last_5": 90.0}, "val_error_median_last_5 is 90.0"),
    ({"val_error": float("nan")}, "val_error is nan"),
    ({"training_error": {"1": "x"}}, "training_error.1 is 'x'"),
    ({"validation_error": {"one": 0.5}}, "validation_error has an epoch 'one'"),
    ({"validation_error": None}, "validation_error is None"),
    ({"recipe": None}, "recipe is None"),
    ({"recipe": {"epoch": 3}}, "recipe is invalid ("),
    ({"status": "cut off"}, "status is 'cut off'"),
    ({"status": "diverged"}, "reason is None"),
    ({"versions": {"python": "3"}}, "versions.tensorflow is None"),
    ({"hardware": "a CPU"}, "hardware.cpu is None"),
    ({"derived": {}}, "derived.train_examples is None"),
  ],
)
def test_a_wrong_field_is_named(tmp_path, changes, message):
  path = _write(tmp_path, _recipe(f"{_KN}16"), f"{_KN}16", 0.1, **changes)
  with pytest.raises(UserError) as error:
    _read(tmp_path)
  assert str(error.value).startswith(f"{path}: {message}")


def test_groups_hold_runs_of_one_recipe_each_once(tmp_path):
  stem = f"{_KN}16"
  first = _write(tmp_path, _recipe(stem), stem, 0.1, study="a")
  again = _write(tmp_path, _recipe(stem), stem, 0.1, study="b")
  with pytest.raises(UserError, match=f"{first} and {again} are the same run"):
    _read(tmp_path)
  again = _write(tmp_path, _recipe(stem, "none", seed=1), stem, 0.1, study="b", name=again.name)
  with pytest.raises(
    UserError, match=f"{first} and {again} have the same flagfile, but their recipes differ"
  ):
    _read(tmp_path)
  _write(tmp_path, _recipe(stem, seed=1), stem, 0.1, study="b", name=again.name)
  assert [r.run.recipe.seed for r in _read(tmp_path)[stem].results] == [0, 1]
  other = _write(tmp_path, _recipe(f"{_KN}128"), f"{_KN}64", 0.1)
  with pytest.raises(UserError, match=f"{other}: kn is 128, not 4 times the baseline's"):
    _read(tmp_path)


def test_report_and_pictures(tmp_path, monkeypatch):
  results = str(_write_all(tmp_path / "results", _GROUPS))
  replication.replicate(results, str(tmp_path / "one/report.md"))
  # Drawing takes most of the time: the second report draws one picture again.
  drawn = {path.stem: path.read_bytes() for path in (tmp_path / "one/report").iterdir()}
  again = figures.draw_figure_1(_read(results))
  monkeypatch.setattr(figures, "draw", lambda _: {**drawn, "figure1": again})
  replication.replicate(results, str(tmp_path / "two/report.md"))
  report = (tmp_path / "one/report.md").read_text()
  rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| **")]
  verdicts = {row[0].split("**")[1]: row[-1].strip(" |*") for row in rows}
  assert verdicts == {
    **dict.fromkeys(("a1", "a2", "a3", "a4", "a5", "d1", "d2", "d3", "f2", "e"), "reproduced"),
    "f1": "not reproduced",
  }
  assert claims.__doc__[claims.__doc__.index("equal(A, B)") :].strip() in report
  assert "our break lies in (512, 1024], that is (32, 64] times the baseline's" in report
  assert "resnet20 on fashion_mnist (60000 training images of 28×28) with n = 16" in report
  assert "kn = 512, the peak rate is 3.2 (" in report
  assert "| table1/fashion_mnist_kn64_seed1.json | 10.10 % | 100 | `0123456789ab` |" in report
  pictures = ("correction", "figure1", "figure3", "known_number", "table1")
  names = sorted(["report.md", *(f"report/{name}.png" for name in pictures)])
  for folder in (tmp_path / "one", tmp_path / "two"):
    files = (path for path in folder.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder).as_posix() for path in files) == names
  for name in names:
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    if name.endswith(".png"):
      assert f"]({name})" in report
      picture = image.imread(tmp_path / "one" / name)
      assert picture.shape[1] >= 1200
      assert 0.02 < np.mean(picture[..., :3].min(axis=2) < 0.9) < 0.5  # Neither blank nor filled.


def test_a_damaged_file_gets_one_line_and_nothing_is_written(tmp_path):
  path = _write(tmp_path, _recipe(f"{_KN}16"), f"{_KN}16", 0.1)
  path.write_text(path.read_text()[:-9])
  done = subprocess.run(
    [sys.executable, "-m", "tools.replication", f"--results_dir={tmp_path}", "--output=new/r.md"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {path} cannot be read (")
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "new").exists()
  with pytest.raises(UserError, match="holds no STUDY/"):
    replication.replicate(str(tmp_path / "nothing"), str(tmp_path / "r.md"))
  with pytest.raises(UserError, match=r"ends in \.md"):
    replication.replicate(str(tmp_path), str(tmp_path / "r.html"))


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, "draw", lambda groups: {"figure1": b""})
  _write(tmp_path / "results", _recipe(f"{_KN}16"), f"{_KN}16", 0.1)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--output=.* cannot be written"):
    replication.replicate(str(tmp_path / "results"), str(tmp_path / "file" / "r.md"))
