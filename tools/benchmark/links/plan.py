"""Which settings are measured, how many calls a turn takes, and about how long all of it takes."""

import dataclasses
import itertools

from tf_largebatch.recipe import NETWORKS, Recipe
from tools.benchmark.links.cluster import Link
from tools.forecasting.allreduce import ring
from tools.forecasting.layers import network_layers

# (image size, n) by the block of a network. ImageNet's networks see small images, because several
# tasks share few cores.
_USUAL = {"basic": (32, 32), "bottleneck": (64, 8)}
_MOST_CALLS = 20
_UNTIMED_SECONDS = 1.0  # Calls that take longer get no untimed call before them.
# For the estimate alone, of a machine of two cores.
_FLOPS, _START_SECONDS, _LINK_SECONDS = 60e9, 25.0, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """What the same tasks measure.

  Attributes:
    network, image_size, per_worker_batch_size: as in the recipe.
    tasks: with one worker each.
    packs: values of --bytes_per_pack.
    links: that the tasks get in turn.
  """

  network: str
  image_size: int
  per_worker_batch_size: int
  tasks: int
  packs: list[int]
  links: list[Link]

  @property
  def recipe(self) -> Recipe:
    return Recipe(
      dataset="synthetic",
      network=self.network,
      image_size=self.image_size,
      per_worker_batch_size=self.per_worker_batch_size,
      workers=self.tasks,
      channel_mean=(123.675, 116.28, 103.53),
      channel_std=(58.395, 57.12, 57.375),
    )

  def setting(self, link: Link, pack: int) -> dict:
    """What distinguishes a setting from all others."""
    names = ("network", "image_size", "per_worker_batch_size", "tasks")
    found = {name: getattr(self, name) for name in names}
    return found | {"bytes_per_pack": pack, **dataclasses.asdict(link)}


def plan(
  networks: list[str],
  tasks: list[int],
  links: list[Link],
  packs: list[int],
  image_size: int | None = None,
  per_worker_batch_size: int | None = None,
) -> list[Group]:
  """The groups in their order; a task that is alone has neither packs nor links."""
  groups = []
  for network, count in itertools.product(networks, tasks):
    usual_size, usual_batch = _USUAL[NETWORKS[network].block]
    groups.append(
      Group(
        network=network,
        image_size=image_size or usual_size,
        per_worker_batch_size=per_worker_batch_size or usual_batch,
        tasks=count,
        packs=packs if count > 1 else [0],
        links=links if count > 1 else [Link()],
      )
    )
  return groups


def transfer_seconds(size: float, tasks: int, link: Link) -> float:
  """The least seconds of an all-reduce of so many bytes on the link, by a ring."""
  if link.gigabits is None:
    return 0.0
  return ring(size, tasks, link.delay_ms / 1000, link.gigabits * 1e9 / 8)


class Pace:
  """Chooses how many calls are timed at once, from how long such calls took the last time."""

  def __init__(self, seconds: float):
    """`seconds`: that the timed calls should take together."""
    self.seconds, self._last = seconds, {}

  def calls(self, key: tuple, guess: float) -> tuple[int, int]:
    """(untimed, timed) calls of a kind; `guess`: their seconds if the kind is new."""
    expected = self._last.get(key, guess)
    timed = min(max(1, int(self.seconds / max(expected, 1e-6))), _MOST_CALLS)
    return int(expected <= _UNTIMED_SECONDS), timed

  def learn(self, key: tuple, seconds: list[float]):
    self._last[key] = sum(seconds) / len(seconds)


def estimate_seconds(groups: list[Group], turns: int, seconds: float) -> float:
  """Roughly how long the measurement takes, from the work of the networks and the links' rates."""
  total = 0.0
  for group in groups:
    layers = network_layers(group.network, group.image_size)
    size = 4 * sum(parameters for parameters, _ in layers)
    # Two operations per multiplication, three products per layer; the tasks share the cores.
    work = 6 * sum(cost for _, cost in layers) * group.per_worker_batch_size * group.tasks
    compute, pace = work / _FLOPS, Pace(seconds)
    total += _START_SECONDS * group.tasks
    for link in group.links:
      transfer = transfer_seconds(size, group.tasks, link)
      step, reduce = (
        expected * sum(pace.calls((), expected)) for expected in (compute + transfer, transfer)
      )
      # Before and after; and each task goes on until all have ended.
      alone = 2 * compute * (1 + sum(pace.calls((), compute)))
      total += turns * (_LINK_SECONDS + alone + len(group.packs) * (step + reduce))
  return total
