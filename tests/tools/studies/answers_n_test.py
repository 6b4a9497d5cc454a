"""The claims about n, on made-up results whose verdicts are worked out by hand."""

import json

import pytest

from tests.tools.studies.made_up_results import DIVERGED, write_group
from tf_largebatch.errors import UserError
from tools.studies import answers_n
from tools.studies.answers import Runs
from tools.studies.results import read_groups
from tools.studies.verdicts import NOT_DECIDABLE, NOT_REPRODUCED, REPRODUCED

# The made-up seeds scatter by 0.08 points, the margin is 0.5.
_U = {2: 0.12, 4: 0.104, 8: 0.1, 16: 0.101, 32: 0.102, 64: 0.104, 128: 0.11}
_FIXED_K = {
  "k8_n4": 0.1,
  "k8_n4_unscaled": 0.12,
  "k8_n64_unscaled": 0.14,
  "fashion_mnist_kn32": 0.1,
}
_SHA256 = "0123456789abcdef" * 4  # Of made-up results.


def _write(root, errors, kn=128):
  for n, error in errors.items():
    write_group(root, answers_n.stem(kn, n), error, kn=kn)


def _found(root, statistics=None):
  runs = Runs(read_groups(str(root)))
  path = root / "bn_statistics.json"
  if statistics is not None:
    path.write_text(json.dumps(statistics))
  return runs, answers_n.Statistics(runs, str(path))


def _verdicts(root, statistics=None):
  return {each.key: each.verdict for each in answers_n.decide(*_found(root, statistics))}


def _statistics(above, kns=(128, 512), sha256=_SHA256):
  """Of n = 2, where recomputed statistics err less in so many seeds."""
  return {
    f"kn{kn}_n2_seed{5 + i}": {
      "workers": kn // 2,
      "per_worker_batch_size": 2,
      "requested_images": 8192,
      "weights_sha256": sha256,
      "running": {"error": 0.12},
      "recomputed": {"error": 0.11 if i < above else 0.12},
      "minibatch": {"error": 0.15},
    }
    for kn in kns
    for i in range(5)
  }


@pytest.mark.parametrize(
  "changed, verdict, best",
  [
    ({}, REPRODUCED, 8),
    ({16: 0.099}, REPRODUCED, 16),
    ({2: 0.1}, NOT_REPRODUCED, 8),
    ({128: 0.105}, NOT_DECIDABLE, 8),  # Just the margin above the best.
    # The best is looked for between, even if n = 128 is better.
    ({128: 0.09}, NOT_REPRODUCED, 8),
  ],
)
def test_a_u(tmp_path, changed, verdict, best):
  _write(tmp_path, _U | changed)
  assert _verdicts(tmp_path)["n.1"] == verdict
  assert answers_n.best_size(_found(tmp_path)[0], 128) == best


def test_runs_that_are_missing(tmp_path):
  _write(tmp_path, {n: error for n, error in _U.items() if n != 64})
  verdicts = _verdicts(tmp_path)
  assert verdicts["n.1"] == "pending (30 of 35 runs)"
  assert verdicts["n.2"] == "pending (0 of 10 runs)"
  assert verdicts["n.3"] == "pending (0 of 30 runs)"
  assert "At kn = 128, runs are missing." in answers_n.describe(*_found(tmp_path))


@pytest.mark.parametrize(
  "above, verdict", [(5, REPRODUCED), (4, NOT_DECIDABLE), (1, NOT_DECIDABLE), (0, NOT_REPRODUCED)]
)
def test_recomputed_statistics(tmp_path, above, verdict):
  for kn in (128, 512):
    _write(tmp_path, {2: 0.12}, kn)
  both = _statistics(above)
  assert _verdicts(tmp_path, both)["n.2"] == verdict
  # Each kn is needed.
  assert _verdicts(tmp_path, both | _statistics(5, kns=(512,)))["n.2"] == verdict
  assert _verdicts(tmp_path, _statistics(above, kns=(128,)))["n.2"] == "pending (5 of 10 runs)"


def test_a_diverged_run_errs_by_chance_with_all_statistics(tmp_path):
  for kn in (128, 512):
    _write(tmp_path, {2: 0.12}, kn)
  write_group(tmp_path, "kn128_n2", 0.9, seeds=[5], kn=128, **DIVERGED)
  both = _statistics(5)
  del both["kn128_n2_seed5"]
  assert _verdicts(tmp_path, both)["n.2"] == NOT_DECIDABLE


@pytest.mark.parametrize(
  "changed, verdict",
  [
    ({}, REPRODUCED),
    ({"k8_n4": 0.11}, NOT_REPRODUCED),
    ({"k8_n4": 0.105}, NOT_DECIDABLE),
    ({"k8_n4_unscaled": 0.1}, NOT_REPRODUCED),
    ({"k8_n64_unscaled": 0.125}, NOT_DECIDABLE),
    ({"fashion_mnist_kn32": 0.11}, NOT_REPRODUCED),
    ({"k8_n4": 0.105, "k8_n64_unscaled": 0.12}, NOT_REPRODUCED),
  ],
)
def test_a_fixed_k(tmp_path, changed, verdict):
  for group, error in (_FIXED_K | changed).items():
    write_group(tmp_path, group, error, kn=32)
  _write(tmp_path, {16: 0.12, 64: 0.12}, 512)
  assert _verdicts(tmp_path)["n.3"] == verdict


def test_the_table_and_the_answer(tmp_path):
  _write(tmp_path, _U)
  _write(tmp_path, {2: 0.12}, 512)
  runs, found = _found(tmp_path, _statistics(5))
  rows = answers_n.rows(runs, found)
  assert rows[0] == ["128", "2", "64", "12.00", "12.00", "11.00", "15.00"]
  assert rows[6] == ["128", "128", "1", "11.00", "–", "–", "–"]
  assert [row[:2] for row in rows] == [["128", str(n)] for n in _U] + [["512", "2"]]
  text = answers_n.describe(runs, found)
  assert (
    "At kn = 128, the best n is 8 (10.00 %); equal to it: 4, 16, 32, 64; worse: 2, 128." in text
  )
  assert "err 12.00 % with running statistics, 11.00 % with recomputed ones" in text


@pytest.mark.parametrize(
  "content, message",
  [
    (
      _statistics(5, sha256="f" * 64),
      r"kn128_n2_seed5 has other weights than .*made/kn128_n2_seed5",
    ),
    ({"kn128_n2_seed5": {"workers": 2}}, r"does not hold what tools\.bn_statistics writes"),
  ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
  _write(tmp_path, {2: 0.12})
  with pytest.raises(UserError, match=message):
    _found(tmp_path, content)
