"""Exact rank tests of two groups of runs, as docs/answers_claims.md states them.

equal(A, B): A − δ is below B and A + δ is above B, both with p < α. The opposite: worse(A, B) or
  worse(B, A).
worse(A, B): A − δ is above B with p < α. The opposite: A − δ is below B with p < α.

"Above" and "below" are one-sided Mann-Whitney tests. Their p is the share of all divisions of the
pooled errors into groups of these sizes whose U is at least as extreme, which is exact with ties
too. An error has no more weight than its rank, so a run that failed cannot hide the others.

Source: Mann and Whitney 1947; the permutation distribution, Fisher 1935.
"""

import itertools

import numpy as np
from scipy.stats import rankdata

from tools.studies.verdicts import ALPHA, DELTA, NOT_DECIDABLE, NOT_REPRODUCED, REPRODUCED

# Errors are counts over the number of images. Digits beyond these are rounding, which must not
# break the ties between them.
_DIGITS = 9


def p_above(first: list[float], second: list[float], margin: float = 0.0) -> float:
  """The one-sided p of the alternative that `first` − margin is above `second`."""
  return _p(first, second, margin, 1)


def p_below(first: list[float], second: list[float], margin: float = 0.0) -> float:
  """The one-sided p of the alternative that `first` − margin is below `second`."""
  return _p(first, second, margin, -1)


def _p(first: list[float], second: list[float], margin: float, sign: int) -> float:
  pooled = np.round([*(np.asarray(first) - margin), *second], _DIGITS)
  ranks = sign * rankdata(pooled)  # Half ranks where errors tie, so that sums are exact.
  seen = sum(ranks[: len(first)])
  sums = [sum(ranks[list(each)]) for each in itertools.combinations(range(len(pooled)), len(first))]
  return int(np.sum(np.asarray(sums) >= seen)) / len(sums)


def p_equal(first: list[float], second: list[float]) -> float:
  """The p of equal(A, B): the larger of its two tests'."""
  return max(p_below(first, second, DELTA), p_above(first, second, -DELTA))


def p_worse(first: list[float], second: list[float]) -> float:
  """The p of worse(A, B)."""
  return p_above(first, second, DELTA)


def equal(first: list[float], second: list[float]) -> str:
  """Returns the verdict of equal(A, B)."""
  if p_equal(first, second) < ALPHA:
    return REPRODUCED
  opposite = min(p_worse(first, second), p_worse(second, first))
  return NOT_REPRODUCED if opposite < ALPHA else NOT_DECIDABLE


def worse(first: list[float], second: list[float]) -> str:
  """Returns the verdict of worse(A, B)."""
  if p_worse(first, second) < ALPHA:
    return REPRODUCED
  return NOT_REPRODUCED if p_below(first, second, DELTA) < ALPHA else NOT_DECIDABLE
