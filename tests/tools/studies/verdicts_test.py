"""Welch's test against a published example and SciPy, and the verdicts at their limits."""

import itertools

import numpy as np
import pytest
from scipy import stats

from tools.studies import verdicts

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


def test_holm():
  # 4 · 0.01, 3 · 0.02, then 2 · 0.025 and 1 · 0.04, which are less than the value before them.
  adjusted = verdicts.holm({"c": 0.025, "a": 0.01, "d": 0.04, "b": 0.02})
  assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
  assert verdicts.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
