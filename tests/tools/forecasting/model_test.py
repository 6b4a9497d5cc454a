"""The model against formulas in closed form."""

import math

import pytest

from tests.tools.forecasting.examples import (
  BANDWIDTH,
  CLOSE,
  CLUSTER,
  LATENCY,
  B,
  make_cluster,
  make_step,
)
from tools.forecasting.allreduce import ALGORITHMS
from tools.forecasting.model import expected_maximum, needed_gigabits


def test_servers_and_the_network_between_them():
  within = 2 * (7 * 4e-6 + B / 3e10)
  between = {name: cost(B, 44, LATENCY, BANDWIDTH) for name, cost in ALGORITHMS.items()}
  for name, seconds in between.items():
    assert make_cluster(algorithm=name).allreduce(B, 352) == CLOSE(within + seconds)
  assert make_cluster(algorithm="auto").allreduce(B, 352) == CLOSE(within + min(between.values()))
  assert CLUSTER.allreduce(B, 4) == CLOSE(6 * 4e-6 + 1.5 * B / 3e10)
  assert CLUSTER.allreduce(B, 1) == 0
  alone = make_cluster(gpus_per_server=1)
  assert alone.allreduce(B, 5) == CLOSE(8 * LATENCY + 1.6 * B / BANDWIDTH)


@pytest.mark.parametrize(
  "count, expected",
  [
    (1, 0),
    (2, 1 / math.sqrt(math.pi)),
    (3, 3 / (2 * math.sqrt(math.pi))),
    (4, 3 / (2 * math.sqrt(math.pi)) * (1 + 2 / math.pi * math.asin(1 / 3))),
    (5, 5 / (4 * math.sqrt(math.pi)) * (1 + 6 / math.pi * math.asin(1 / 3))),
  ],
)
def test_expected_maximum_of_normals(count, expected):
  """Closed forms exist up to 5 (David and Nagaraja 2003, §3.2)."""
  assert expected_maximum(count) == CLOSE(expected)


def test_expected_maximum_of_many():
  """E[max] = ∫ (1 - Φ(x)^p) over x > 0 minus ∫ Φ(x)^p over x < 0, as a sum."""
  for count in (44, 1250):
    xs = [i / 1000 for i in range(-10_000, 10_001)]
    tail = [(x > 0) - (0.5 * math.erfc(-x / math.sqrt(2))) ** count for x in xs]
    tail[10_000] += 0.5  # Both sides share the jump at 0.
    assert expected_maximum(count) == pytest.approx(sum(tail) / 1000, rel=1e-9)


def test_what_backprop_hides():
  """Four equal layers, one ready every 0.05 s; each takes c seconds to send."""
  gpus = 16
  quick, slow = make_cluster(network_bandwidth=1e10), make_cluster(network_bandwidth=1e7)
  c, late = (link.allreduce(B, gpus) for link in (quick, slow))
  assert c < 0.05 < late
  assert make_step().exposed(quick, gpus) == CLOSE(c)  # The first layer is ready last.
  assert make_step().exposed(slow, gpus) == CLOSE(0.05 + 4 * late - 0.2)
  # Three layers, then the remaining one.
  packs = quick.allreduce(B, gpus), slow.allreduce(3 * B, gpus) + slow.allreduce(B, gpus)
  assert make_step(bytes_per_pack=2.5 * B).exposed(quick, gpus) == CLOSE(packs[0])
  assert make_step(bytes_per_pack=2.5 * B).exposed(slow, gpus) == CLOSE(0.15 + packs[1] - 0.2)
  whole = quick.allreduce(4 * B, gpus)
  assert make_step(bytes_per_pack=0).exposed(quick, gpus) == CLOSE(whole)
  assert make_step(overlap=False).exposed(quick, gpus) == CLOSE(whole)
  # The last layer is ready first; unequal layers show the order.
  uneven = make_step(layers=[(1e3, 0.9), (B, 0.1)])
  assert uneven.exposed(quick, gpus) == CLOSE(quick.allreduce(1e3, gpus))


def test_an_iteration_waits_for_the_slowest_server():
  step = make_step(jitter=0.05)
  exposed = step.exposed(CLUSTER, 16)
  assert step.iteration(CLUSTER, 16) == CLOSE(0.3 * (1 + 0.05 / math.sqrt(math.pi)) + exposed)
  assert step.iteration(CLUSTER, 8) == CLOSE(0.3 + step.exposed(CLUSTER, 8))


def test_needed_bandwidth():
  """A ring of servers of one GPU with nothing hidden has a closed form."""
  step, alone = make_step(overlap=False), make_cluster(gpus_per_server=1)
  for gpus in (2, 20):
    left = 0.01 * 0.3 - 2 * (gpus - 1) * LATENCY
    expected = 2 * (gpus - 1) / gpus * 4 * B / left * 8 / 1e9 * 1.2
    assert needed_gigabits(step, alone, gpus, 1.2) == CLOSE(expected)
  # The latencies alone take 0.0030 s.
  assert needed_gigabits(step, alone, 23, 1.2) is None
