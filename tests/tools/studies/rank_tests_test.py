"""The exact rank tests against SciPy and counts by hand, and their verdicts at the limits."""

import numpy as np
import pytest
from scipy import stats

from tools.studies import rank_tests
from tools.studies.verdicts import NOT_DECIDABLE, NOT_REPRODUCED, REPRODUCED

_LOW, _HIGH = [0.100, 0.101, 0.102, 0.103, 0.104], [0.200, 0.201, 0.202, 0.203, 0.204]


@pytest.mark.parametrize("sizes", [(5, 5), (3, 6), (7, 4)])
def test_without_ties_p_is_that_of_scipys_exact_test(sizes):
  random = np.random.default_rng(0)
  for margin in (0.0, 0.005, -0.005):
    first, second = random.normal(0.1, 0.01, sizes[0]), random.normal(0.1, 0.01, sizes[1])
    for p, alternative in ((rank_tests.p_above, "greater"), (rank_tests.p_below, "less")):
      known = stats.mannwhitneyu(first - margin, second, alternative=alternative, method="exact")
      assert p(list(first), list(second), margin) == pytest.approx(known.pvalue, abs=1e-8)


def test_p_by_hand():
  # 10 choose 5 = 252 divisions; one is as extreme as a complete separation.
  assert rank_tests.p_above(_HIGH, _LOW) == 1 / 252
  assert rank_tests.p_below(_HIGH, _LOW) == 1
  # 1, 2 | 2, 3 have the ranks 1, 2.5 | 2.5, 4. Of the 6 pairs' sums of ranks 3.5, 3.5, 5, 5, 6.5
  # and 6.5, two are at most 3.5, and all are at least.
  assert rank_tests.p_below([0.1, 0.2], [0.2, 0.3]) == 2 / 6
  assert rank_tests.p_above([0.1, 0.2], [0.2, 0.3]) == 1


def test_the_margin_does_not_break_ties_by_rounding():
  # 0.105 − 0.005 is 0.1, although not in floats.
  assert 0.105 - 0.005 != 0.1
  assert rank_tests.p_above([0.105], [0.1], 0.005) == 1
  assert rank_tests.p_below([0.105], [0.1], 0.005) == 1


def test_an_outlier_has_no_more_weight_than_its_rank():
  slightly, wildly = [*_LOW[:4], 0.111], [*_LOW[:4], 0.9]
  # The outlier is above all 5 errors of the other group: U = 5. 19 of the 252 have U ≤ 5.
  assert rank_tests.p_equal(slightly, _LOW) == rank_tests.p_equal(wildly, _LOW) == 19 / 252


def _shifted(points: float) -> list[float]:
  return [error + points / 100 for error in _LOW]


@pytest.mark.parametrize(
  "points, equal, worse",
  [
    (0.0, REPRODUCED, NOT_REPRODUCED),
    (0.09, REPRODUCED, NOT_REPRODUCED),
    (0.5, NOT_DECIDABLE, NOT_DECIDABLE),
    (0.91, NOT_REPRODUCED, REPRODUCED),
    (-0.09, REPRODUCED, NOT_REPRODUCED),
    (-0.5, NOT_DECIDABLE, NOT_REPRODUCED),
    (-0.91, NOT_REPRODUCED, NOT_REPRODUCED),
  ],
)
def test_verdicts(points, equal, worse):
  # The groups' errors lie 0 to 0.4 points above their smallest.
  assert rank_tests.equal(_shifted(points), _LOW) == equal
  assert rank_tests.worse(_shifted(points), _LOW) == worse


def test_two_groups_of_two_decide_nothing():
  assert rank_tests.equal([0.1, 0.101], [0.1, 0.101]) == NOT_DECIDABLE
  assert rank_tests.worse([0.9, 0.91], [0.1, 0.101]) == NOT_DECIDABLE
