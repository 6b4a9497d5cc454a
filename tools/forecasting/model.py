"""The model: a step, a cluster, and how long they take together."""

import dataclasses
import math
import statistics

from tf_largebatch.errors import UserError
from tools.forecasting.allreduce import ALGORITHMS, ring

_HIDDEN = 0.01  # Communication counts as hidden if it adds at most this share to the step.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """Servers of GPUs.

  Bandwidths are in bytes of gradients per second, in each direction; latencies are in seconds.
  """

  gpus_per_server: int
  server_bandwidth: float
  server_latency: float
  network_bandwidth: float
  network_latency: float
  algorithm: str

  def servers(self, gpus: int) -> int:
    if gpus > self.gpus_per_server and gpus % self.gpus_per_server:
      raise UserError(f"gpus={gpus} must be a multiple of gpus_per_server={self.gpus_per_server}.")
    return max(1, gpus // self.gpus_per_server)

  def allreduce(self, size: float, gpus: int) -> float:
    """Returns seconds: sum within each server, all-reduce between servers, copy within (§4).

    Within a server, bytes travel along a pipelined ring: s - 1 messages, and every byte once, for
    the sum, and the same for the copy (nccl-tests, `doc/PERFORMANCE.md`). A single server
    all-reduces by a ring.
    """
    servers, local = self.servers(gpus), min(gpus, self.gpus_per_server)
    if servers == 1:
      return ring(size, local, self.server_latency, self.server_bandwidth)
    names = ALGORITHMS if self.algorithm == "auto" else [self.algorithm]
    link = (self.network_latency, self.network_bandwidth)
    between = min(ALGORITHMS[name](size, servers, *link) for name in names)
    if local == 1:
      return between
    return 2 * ((local - 1) * self.server_latency + size / self.server_bandwidth) + between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A replica's step without communication.

  Attributes:
    seconds: of the step.
    backward_seconds: of its last backprop.
    images: of the step.
    layers: bytes of gradients and share of backprop's time of each layer, in the order of the
      forward pass.
    jitter: coefficient of variation of a server's steps.
    overlap: whether backprop hides communication.
    bytes_per_pack: the fewest bytes that are sent together if backprop hides communication; 0: all.
  """

  seconds: float
  backward_seconds: float
  images: int
  layers: list[tuple[float, float]]
  jitter: float
  overlap: bool
  bytes_per_pack: float

  def exposed(self, cluster: Cluster, gpus: int) -> float:
    """Returns the seconds that the step waits for communication.

    A layer's gradients are ready when backprop has passed it, the last layer's first. Packs are
    all-reduced one after another in that order.
    """
    if not self.overlap:
      return cluster.allreduce(sum(size for size, _ in self.layers), gpus)
    clock = done = pack = 0.0
    for size, share in reversed(self.layers):
      clock += share * self.backward_seconds
      pack += size
      if self.bytes_per_pack and pack >= self.bytes_per_pack:
        done, pack = max(done, clock) + cluster.allreduce(pack, gpus), 0.0
    if pack:
      done = max(done, clock) + cluster.allreduce(pack, gpus)
    return done - clock

  def iteration(self, cluster: Cluster, gpus: int) -> float:
    """Returns the seconds of a synchronous step, which waits for the slowest server."""
    wait = self.jitter * expected_maximum(cluster.servers(gpus))
    return self.seconds * (1 + wait) + self.exposed(cluster, gpus)


def expected_maximum(count: int) -> float:
  """Returns E[max] of independent standard normals: ∫ x · count · φ(x) Φ(x)^(count - 1) dx.

  By the trapezoidal rule, whose error vanishes exponentially for so smooth an integrand.
  """
  if count == 1:
    return 0.0
  normal = statistics.NormalDist()
  grid = (i / 64 for i in range(-640, 641))
  return sum(x * count * normal.pdf(x) * normal.cdf(x) ** (count - 1) for x in grid) / 64


def needed_gigabits(step: Step, cluster: Cluster, gpus: int, overhead: float) -> float | None:
  """Returns the network, Gbit/s, that leaves 1 % of the step exposed; None if none does."""

  def hides(gigabits: float) -> bool:
    link = dataclasses.replace(cluster, network_bandwidth=gigabits * 1e9 / 8 / overhead)
    return step.exposed(link, gpus) <= _HIDDEN * step.seconds

  low, high = 1e-6, 1e6
  if not hides(high):
    return None
  if hides(low):
    return 0.0
  for _ in range(60):
    middle = math.sqrt(low * high)
    low, high = (low, middle) if hides(middle) else (middle, high)
  return high


def forecast_gpus(
  step: Step, cluster: Cluster, gpus: list[int], run_images: float, overhead: float
) -> list[dict]:
  """Returns a row for each number of GPUs; growth and efficiency are relative to the first row.

  Args:
    step: of a GPU.
    cluster: that the GPUs are in.
    gpus: numbers of GPUs.
    run_images: images of a whole run.
    overhead: bits sent for each bit of gradients.
  """
  rows = []
  for count in gpus:
    seconds = step.iteration(cluster, count)
    first = rows[0]["iteration_seconds"] if rows else seconds
    exposed = step.exposed(cluster, count)
    rows.append(
      {
        "gpus": count,
        "iteration_seconds": seconds,
        "growth": seconds / first - 1,
        "exposed_seconds": exposed,
        "hidden": exposed <= _HIDDEN * step.seconds,
        "efficiency": first / seconds,
        "images_per_second": count * step.images / seconds,
        "hours": run_images / count / step.images * seconds / 3600,
        "needed_gigabits": needed_gigabits(step, cluster, count, overhead),
      }
    )
  return rows


def forecast_tasks(
  step: Step, step_workers: int, workers: int, tasks: list[int], cores: int, fits: dict
) -> list[dict]:
  """Returns a row for each number of tasks, which share a machine and a recipe of k workers.

  Args:
    step: measured on one core; each task has one.
    step_workers: workers of the measured step.
    workers: k.
    tasks: numbers of tasks; speedup and efficiency are relative to the first.
    cores: that the tasks share.
    fits: `allreduce.fit` by the number of tasks, for each number above 1.
  """
  rows = []
  size = sum(size for size, _ in step.layers)
  for count in tasks:
    if workers % count:
      raise UserError(f"tasks={count} must divide workers={workers}.")
    compute = step.seconds / step_workers * workers / min(count, cores)
    wait = step.jitter * expected_maximum(count) * compute
    names = ("latency_seconds", "bandwidth_bytes_per_second")
    link = (fits[count][name] for name in names) if count in fits else (0, 1)
    seconds = compute + wait + ring(size, count, *link)
    first = rows[0] if rows else {"tasks": count, "iteration_seconds": seconds}
    speedup = first["iteration_seconds"] / seconds
    rows.append(
      {
        "tasks": count,
        "compute_seconds": compute,
        "wait_seconds": wait,
        "allreduce_seconds": seconds - compute - wait,
        "iteration_seconds": seconds,
        "images_per_second": workers / step_workers * step.images / seconds,
        "speedup": speedup,
        "efficiency": speedup * first["tasks"] / count,
      }
    )
  return rows
