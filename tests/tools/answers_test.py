"""`tools.answers` on made-up results: verdicts, by formulas of the tests' own, and the files."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from tests.launching import ROOT
from tests.tools.studies.made_up_results import KN, make_recipe, write_group, write_result
from tools import answers as program
from tools.studies import answers
from tools.studies.results import read_groups
from tools.studies.verdicts import NOT_DECIDABLE, NOT_REPRODUCED, REPRODUCED

_SWEEP = {kn: 0.1 for kn in (16, 32, 64, 128, 256, 512)} | {1024: 0.15, 2048: 0.4}


def _noise(scale):
  """Noise in epochs 11 to 18, of which only those from 13 on have this noise scale."""

  def of_seed(seed):
    b = scale * 2 ** (0.1 * (seed - 7))
    return [
      {"epoch": e, "variance": b if e > 12 else 1e9, "squared_gradient": 1.0, "error": None}
      for e in range(11, 19)
    ]

  return of_seed


def _write_sweep(root, errors=_SWEEP, scale=700.0):
  for kn, error in errors.items():
    write_group(root, f"{KN}{kn}", error, kn=kn, noise=_noise(scale))
  return root


def _verdicts(root):
  runs = answers.Runs(read_groups(str(root)))
  return {each.key: each.verdict for each in answers.decide(runs)}


def test_what_the_sweep_decides(tmp_path):
  verdicts = _verdicts(_write_sweep(tmp_path))
  assert [verdicts[key] for key in ("d1.1", "d1.2", "why.1")] == [REPRODUCED] * 3
  others = {key: verdict for key, verdict in verdicts.items() if key not in ("d1.1", "d1.2")}
  assert others["why.3"] == "pending (0 of 10 runs)"
  assert others["why.6"] == "pending (10 of 20 runs)"
  runs = answers.Runs(read_groups(str(tmp_path)))
  assert (runs.find_break(), runs.largest_equal()) == (1024, 512)
  assert (runs.failed(f"{KN}512"), runs.failed(f"{KN}1024")) == (0, 5)


@pytest.mark.parametrize(
  "changed, verdicts, where, equal",
  [
    ({256: 0.106}, (NOT_REPRODUCED, REPRODUCED), 1024, 128),
    ({256: 0.105}, (NOT_DECIDABLE, REPRODUCED), 1024, 128),
    ({2048: 0.1}, (REPRODUCED, NOT_REPRODUCED), None, 512),
    ({1024: 0.1}, (REPRODUCED, REPRODUCED), 2048, 1024),
  ],
)
def test_other_sweeps(tmp_path, changed, verdicts, where, equal):
  found = _verdicts(_write_sweep(tmp_path, _SWEEP | changed))
  assert (found["d1.1"], found["d1.2"]) == verdicts
  runs = answers.Runs(read_groups(str(tmp_path)))
  assert (runs.find_break(), runs.largest_equal()) == (where, equal)


@pytest.mark.parametrize(
  "scale, verdict",
  [
    (2400.0, NOT_REPRODUCED),
    (2048.0, NOT_DECIDABLE),
    (1700.0, REPRODUCED),
    (440.0, NOT_REPRODUCED),
  ],
)
def test_the_noise_scale_and_the_break(tmp_path, scale, verdict):
  assert _verdicts(_write_sweep(tmp_path, scale=scale))["why.1"] == verdict
  logs = [math.log2(1024 / (scale * 2 ** (0.1 * i))) for i in (-2, -1, 0, 1, 2)]
  expected = stats.ttest_1samp(logs, 0).confidence_interval(0.9)
  result = answers.Runs(read_groups(str(tmp_path))).results(f"{KN}256")
  found = answers.ratio_interval(1024, [answers.late_noise_scale(each) for each in result])
  assert found == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_the_best_of_a_search_is_compared(tmp_path):
  _write_sweep(tmp_path)
  for index, stem in enumerate(answers.RATES):
    write_group(tmp_path, stem, 0.13 - 0.01 * min(index, 6 - index), seeds=(10, 11))
  assert _verdicts(tmp_path)["why.3"] == "pending (5 of 10 runs)"  # Those of the baseline.
  write_group(tmp_path, answers.RATES[3], 0.1)
  assert _verdicts(tmp_path)["why.3"] == REPRODUCED
  # The seeds of the search do not count in the verdict, nor the verdict's in the search.
  write_group(tmp_path, answers.RATES[2], 0.09)
  assert _verdicts(tmp_path)["why.3"] == REPRODUCED
  write_group(tmp_path, answers.RATES[3], 0.2)
  assert _verdicts(tmp_path)["why.3"] == NOT_REPRODUCED


@pytest.mark.parametrize(
  "without, breaks, verdict",
  [(0.11, 0.15, REPRODUCED), (0.2, 0.15, NOT_REPRODUCED), (0.11, 0.1, NOT_DECIDABLE)],
)
def test_momentum(tmp_path, without, breaks, verdict):
  _write_sweep(tmp_path, _SWEEP | {1024: breaks})
  write_group(tmp_path, answers.NO_MOMENTUM[1024], without)
  write_group(tmp_path, answers.NO_MOMENTUM[16], 0.11, kn=16)
  assert _verdicts(tmp_path)["why.6"] == verdict


@pytest.mark.parametrize(
  "large, small, verdict",
  [(1.01, 0.99, REPRODUCED), (0.99, 0.99, NOT_REPRODUCED), (1.01, 1.01, NOT_REPRODUCED)],
)
def test_the_eigenvalue_at_the_end_of_the_warmup(tmp_path, large, small, verdict):
  _write_sweep(tmp_path)
  for kn, ratio in ((2048, large), (128, small)):
    end = 2 * (60000 // kn)  # Of two epochs.
    bound = 3.8 / (0.5 * 2.8)  # (2 + 2 m) / (η (1 + 2 m)) with m = 0.9 and η = 0.5.
    point = {"learning_rate": 0.5, "largest_eigenvalue": ratio * bound}
    other = {"learning_rate": 0.5, "largest_eigenvalue": (2 - ratio) * bound}
    curvature = [{"step": end // 2, **other}, {"step": end, **point}, {"step": 2 * end, **other}]
    write_group(tmp_path, answers.STARTS[kn], 0.1, kn=kn, curvature=curvature)
  assert _verdicts(tmp_path)["why.7"] == verdict


def test_report_and_pictures(tmp_path):
  results = _write_sweep(tmp_path / "results")
  write_group(results, answers.SAME_STEPS, 0.1)
  for folder in ("one", "two"):
    program.answer(str(results), str(tmp_path / folder / "report.md"))
  report = (tmp_path / "one/report.md").read_text()
  assert "Up to kn = 512, 32 times the baseline's minibatch, every run ends within 0.04" in report
  assert "From kn = 1024 on it is worse (5 of 5 at kn = 1024, 5 of 5 at kn = 2048 failed)" in report
  assert "What mends kn = 1024: taking as many steps as kn = 128." in report
  medians = (
    "The median error of kn = 1024 is 15.00 %; it is 10.00 % with the steps of kn = 128, and"
  )
  assert f"{medians} that of the baseline is 10.00 %." in report
  for name in ("report.md", "report/d1.png", "report/why.png"):
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    if name.endswith(".png"):
      assert f"]({name})" in report
      picture = image.imread(tmp_path / "one" / name)
      assert 0.02 < np.mean(picture[..., :3].min(axis=2) < 0.9) < 0.5  # Neither blank nor filled.


def test_the_committed_results_give_the_committed_report(tmp_path):
  program.answer(str(ROOT / "docs/answers"), str(tmp_path / "answers.md"))
  assert (tmp_path / "answers.md").read_text() == (ROOT / "docs/answers.md").read_text()


@pytest.mark.parametrize("rows", [3, [1], [{"step": 1}], [{"epoch": 1, "variance": "x"}]])
def test_a_damaged_result_gets_one_line(tmp_path, rows):
  recipe = dataclasses.replace(make_recipe(f"{KN}16"), seed=5)
  write_result(tmp_path, recipe, f"{KN}16", 0.1, noise=rows)
  command = [sys.executable, "-m", "tools.answers", f"--results_dir={tmp_path}", "--output=x.md"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode == 1 and "noise" in done.stderr and "Traceback" not in done.stderr
  assert len(done.stderr.splitlines()) == 1
