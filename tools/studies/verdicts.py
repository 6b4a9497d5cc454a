"""Welch's t-test and the verdicts that follow from it; `claims` states the rules."""

import dataclasses
import statistics
import warnings

from scipy.stats import ttest_ind

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_DECIDABLE, PENDING = "not decidable at this scale", "pending"
ALPHA = 0.05
DELTA = 0.005


@dataclasses.dataclass(frozen=True)
class Welch:
  """Welch's t-test of the difference of two means, the first minus the second (Welch 1947)."""

  first: list[float]
  second: list[float]

  @property
  def difference(self) -> float:
    return statistics.fmean(self.first) - statistics.fmean(self.second)

  @property
  def interval(self) -> tuple[float, float]:
    """The 90 % interval, whose ends are one-sided 95 % bounds."""
    return tuple(map(float, self._test().confidence_interval(1 - 2 * ALPHA)))

  def p_above(self, margin: float = 0.0) -> float:
    """Returns the one-sided p of the alternative that the difference is above the margin."""
    return float(self._test(margin, "greater").pvalue)

  def p_below(self, margin: float = 0.0) -> float:
    """Returns the one-sided p of the alternative that the difference is below the margin."""
    return float(self._test(margin, "less").pvalue)

  def _test(self, margin: float = 0.0, alternative: str = "two-sided"):
    shifted = [error - margin for error in self.first]
    with warnings.catch_warnings():
      # That one group has no scatter, as when all its runs diverged: SciPy warns that the variance
      # is imprecise, but it is negligible beside the other group's.
      warnings.simplefilter("ignore", RuntimeWarning)
      return ttest_ind(shifted, self.second, equal_var=False, alternative=alternative)


def welch(first: list[float], second: list[float]) -> Welch | None:
  """Returns the test, or None if neither group has any scatter, so that no test is possible."""
  return Welch(first, second) if len(set(first)) > 1 or len(set(second)) > 1 else None


def equal(test: Welch | None) -> str:
  """Returns the verdict of equal(A, B)."""
  if test is None:
    return NOT_DECIDABLE
  low, high = test.interval
  if low > -DELTA and high < DELTA:
    return REPRODUCED
  return NOT_REPRODUCED if low > DELTA or high < -DELTA else NOT_DECIDABLE


def worse(test: Welch | None) -> str:
  """Returns the verdict of worse(A, B)."""
  if test is None:
    return NOT_DECIDABLE
  if test.p_above() < ALPHA:
    return REPRODUCED
  no_effect = test.p_below() < ALPHA or equal(test) == REPRODUCED
  return NOT_REPRODUCED if no_effect else NOT_DECIDABLE


def worse_by_delta(test: Welch | None) -> bool:
  """Returns whether A is worse than B by more than delta."""
  return test is not None and test.interval[0] > DELTA


def holm(p: dict[str, float]) -> dict[str, float]:
  """Returns p-values by name, adjusted for their number (Holm 1979).

  The i-th smallest of m is multiplied by m - i + 1, and is no smaller than those before it.
  """
  adjusted, largest = {}, 0.0
  for index, key in enumerate(sorted(p, key=p.get)):
    largest = adjusted[key] = max(largest, min(1.0, (len(p) - index) * p[key]))
  return adjusted


def format_signed_points(fraction: float) -> str:
  return f"{100 * fraction:+.2f}"


def format_test(test: Welch | None, kind: str) -> str:
  """Returns the difference in points, its interval and the p of the test.

  Args:
    kind: "equal", "worse", or "beyond" for worse by more than delta.
  """
  if test is None:
    return "no test is possible: neither group has any scatter"
  p = {
    # Both one-sided tests must reject, so the larger p decides.
    "equal": max(test.p_above(-DELTA), test.p_below(DELTA)),
    "worse": test.p_above(),
    "beyond": test.p_above(DELTA),
  }[kind]
  low, high = (format_signed_points(end) for end in test.interval)
  shown = "< 0.001" if p < 1e-3 else f"= {p:.3g}"
  return f"{format_signed_points(test.difference)} [{low}, {high}], p {shown}"
