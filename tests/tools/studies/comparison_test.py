"""The band of a comparison against hand-computed values."""

import pytest

from tools.studies import comparison


def test_the_band_is_two_standard_errors_of_the_difference():
  band = comparison.seeds_band
  # Variances 2e-4 and 8e-4: 2 (2e-4 / 2 + 8e-4 / 2)^½.
  assert band([0.20, 0.22], [0.30, 0.34]) == pytest.approx(0.04472136)
  # One seed borrows the other's variance, 0.01: 2 (0.01 / 3 + 0.01 / 1)^½.
  assert band([0.5], [0.1, 0.2, 0.3]) == pytest.approx(0.2309401)
  # Pooled (2 x 0.01 + 1 x 8e-4) / 3: 2 (0.00693333 (1/3 + 1/2))^½.
  assert band([0.1, 0.2, 0.3], [0.50, 0.54]) == pytest.approx(0.1520234)
  assert band([0.1], [0.2]) is None
