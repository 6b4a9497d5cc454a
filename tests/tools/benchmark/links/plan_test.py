"""What is measured, and for how long."""

import pytest

from tools.benchmark.links.cluster import Link
from tools.benchmark.links.plan import Pace, estimate_seconds, plan, transfer_seconds

_LINKS = [Link(0.1, 0.0), Link(10.0, 10.0)]


def test_one_task_has_no_links_and_no_packs():
  one, two, large = plan(["resnet20", "resnet50"], [1, 2], _LINKS, [2**24, 0])[:3]
  assert (one.tasks, one.links, one.packs) == (1, [Link(None, 0.0)], [0])
  assert (two.tasks, two.links, two.packs) == (2, _LINKS, [2**24, 0])
  assert (two.image_size, two.per_worker_batch_size) == (32, 32)
  assert (large.network, large.image_size, large.per_worker_batch_size) == ("resnet50", 64, 8)
  assert two.recipe.workers == 2
  settings = [str(g.setting(link, p)) for g in (one, two) for link in g.links for p in g.packs]
  assert len(set(settings)) == 5


def test_seconds_of_a_transfer():
  # 4 tasks: 6 messages of 25 MB at 12.5 MB/s and 0.01 s each.
  assert transfer_seconds(100e6, 4, Link(0.1, 10.0)) == pytest.approx(6 * (0.01 + 25 / 12.5))
  assert transfer_seconds(100e6, 1, Link()) == 0


def test_the_calls_of_a_turn():
  pace = Pace(0.5)
  assert pace.calls("fast", 0.0) == (1, 20)
  assert pace.calls("slow", 1.5) == (0, 1)
  pace.learn("fast", [0.1, 0.3])
  assert pace.calls("fast", 0.0) == (1, 2)


def test_the_estimate_grows_with_what_takes_time():
  def estimate(network="resnet50", tasks=2, links=_LINKS, turns=5):
    return estimate_seconds(plan([network], [tasks], links, [0]), turns, 0.5)

  # A step and an all-reduce of 102 MB at 0.1 Gbit/s take 8 s each.
  slow, fast = estimate(links=[Link(0.1, 0.0)]), estimate(links=[Link(100.0, 0.0)])
  assert 5 * 14 < slow - fast < 5 * 18
  assert estimate(turns=10) > estimate() > estimate("resnet20")
  assert estimate(tasks=4) > estimate()
