"""Real links: their rate and their round trip, throttled and delayed."""

import contextlib

import pytest

from tf_largebatch.errors import UserError
from tools.benchmark.links import traffic
from tools.benchmark.links.relay import delayed
from tools.resilience.network import isolated_network


def test_the_steady_rate_is_that_of_the_last_half():
  # 1000 bytes in the first second; then 500 a second.
  arrivals = [(10.0, 1), (11.0, 1001), (12.0, 1501), (12.0, 1501), (14.0, 2501)]
  assert traffic.steady_rate(arrivals) == 8 * 500


@pytest.fixture
def network():
  with contextlib.ExitStack() as stack:
    try:
      made = stack.enter_context(isolated_network(3))
      made.limit(0.1)
    except UserError as error:
      pytest.skip(str(error))
    yield made


def test_a_throttled_link_and_a_delayed_one(network, tmp_path):
  for delay_ms in (0, 20, 0):  # At the end the cables are on the bridge again.
    with delayed(network, delay_ms / 1000, str(tmp_path)) as relay:
      found = traffic.check(network, 0.5, str(tmp_path))
    assert relay == {} or delay_ms
    # Headers take 5 %; the round trip is longer where the machine is busy.
    assert 0.07e9 < found["bits_per_second"] < 0.105e9
    assert 2 * delay_ms <= 1000 * found["round_trip_seconds"] < 2 * delay_ms + 20
  network.limit(1)
  assert traffic.check(network, 0.3, str(tmp_path))["bits_per_second"] > 0.2e9
