"""Costs of all-reduces against their formulas, and the fit of a link."""

import math

import pytest

from tests.tools.forecasting.examples import BANDWIDTH, CLOSE, LATENCY, B
from tools.forecasting.allreduce import ALGORITHMS, fit


@pytest.mark.parametrize(
  "algorithm, peers, messages, sizes",
  [
    ("ring", 2, 2, 1),
    ("ring", 10, 18, 1.8),
    ("tree", 2, 2, 2),
    ("tree", 44, 10, 2),  # 32 <= 44 < 64.
    ("halving_doubling", 2, 2, 1),
    ("halving_doubling", 64, 12, 2 * 63 / 64),
    # Each sum is for one direction; the larger block's own halving is shorter in all of these.
    ("halving_doubling", 3, 2 * (0 + 2), 2 * (0 + 1)),
    ("halving_doubling", 10, 2 * (1 + 4), 2 * (1 / 2 + 1 / 2)),
    ("halving_doubling", 44, 2 * (2 + 2 + 4), 2 * (3 / 4 + 1 / 4 + 1 / 8)),
    # 64 + 2: the block of 64 has finished after 6 messages, that of 2 after 33.
    ("halving_doubling", 66, 2 * (1 + 32), 2 * (1 / 2 + 1 / 2)),
  ],
)
def test_cost_of_an_allreduce(algorithm, peers, messages, sizes):
  seconds = ALGORITHMS[algorithm](B, peers, LATENCY, BANDWIDTH)
  assert seconds == CLOSE(messages * LATENCY + sizes * B / BANDWIDTH)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_allreduce_beats_the_bounds(algorithm):
  """Each peer sends 2 (p - 1)/p of the bytes, and needs log2 p messages to hear from all."""
  cost = ALGORITHMS[algorithm]
  assert cost(B, 1, LATENCY, BANDWIDTH) == 0
  for peers in range(2, 200):
    assert cost(B, peers, 0, BANDWIDTH) >= 2 * (peers - 1) / peers * B / BANDWIDTH * (1 - 1e-12)
    assert cost(0, peers, LATENCY, BANDWIDTH) >= 2 * math.floor(math.log2(peers)) * LATENCY


def test_fit():
  sizes, latency, bandwidth = (1e3, 1e5, 1e7), 3e-4, 5e8
  seconds = [2 * 3 * (latency + size / 4 / bandwidth) for size in sizes]
  found = fit([(b, t, 4) for b, t in zip(sizes, seconds, strict=True)])
  assert found["latency_seconds"] == pytest.approx(latency, rel=1e-9)
  assert found["bandwidth_bytes_per_second"] == pytest.approx(bandwidth, rel=1e-9)
  assert found["worst_relative_error"] < 1e-9
  # One latency for times t and 3t of the same tiny size: Σ (a/t - 1)² is least at a = 1.2 t.
  found = fit([(1e-20, 1.0, 2), (1e-20, 3.0, 2), (1e12, 1e9, 2)])
  assert found["latency_seconds"] == pytest.approx(0.6, rel=1e-6)
  assert found["worst_relative_error"] == pytest.approx(0.6, rel=1e-6)
  assert found["median_relative_error"] == pytest.approx(0.2, rel=1e-6)
  # Times that grow faster than the bytes give a latency of 0.
  assert fit([(1e3, 1e-7, 2), (1e6, 1e-3, 2)])["latency_seconds"] == 0
