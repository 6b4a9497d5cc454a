r"""What a step, an epoch and 90 of them would take on 8 to 10 000 GPUs, from one measured step.

  python -m tools.forecast --step_seconds=0.18 --overlap=backprop
  python -m tools.forecast --measured=step.json --allreduce=two_tasks.json --gpus=8,64,512
  python -m tools.forecast --measured=step.json --allreduce=two_tasks.json --tasks=1,2,4 --cores=2
  python -m tools.forecast --paper

A step of p GPUs with n images each is one GPU's step, longer by the wait for the slowest server,
and by what of the all-reduce backprop does not hide. A cluster is described by flags, so a file of
them (--flagfile=cluster.flags) describes one. --tasks forecasts a fixed recipe of k workers on
tasks that share this machine's cores; nothing is hidden there. --paper compares the model with what
Goyal et al. 2017 (arXiv 1706.02677) report of their own cluster: first from the paper's inputs and
stated assumptions alone, then with a step jitter fitted to the growth of the iteration time, which
leaves the efficiency to be compared (a weak test: most of what grows by 12 % by 352 GPUs has grown
by about 11 % at 256). Nothing is measured here, and no TensorFlow is needed.

Left out: input, loading of a network that several jobs share, the rounding of an epoch to steps.
"""

import dataclasses
import json
import math
import statistics
import sys

from absl import app, flags

from tf_largebatch.errors import UserError

_GPUS = ["8", "16", "32", "64", "128", "256", "352", "512", "1024", "2048", "4096", "10000"]
# What counts as hidden: communication that adds less than this share to the step.
_HIDDEN = 0.01
_BOTTLENECKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
_BASIC_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}
_SHOWN, _NEEDED = "first_gpus_with_over_1_percent_exposed", "network_gigabits_needed_there"
_LINK = ("latency_seconds", "bandwidth_bytes_per_second")
_POSITIVE_FLAGS = (
  *("step_seconds", "backward_share", "image_size", "gradient_bytes", "images_per_gpu", "epochs"),
  *("gpus_per_server", "server_bandwidth", "network_gigabits", "network_overhead", "cores"),
  *("workers", "epoch_examples"),
)


def define_flags():
  flags.DEFINE_string("measured", None, "JSON of tools.benchmark.step: a replica's step.")
  flags.DEFINE_float("step_seconds", None, "A GPU's step without communication, seconds.")
  flags.DEFINE_float("backward_share", 2 / 3, "Backprop's share of a pass.")
  flags.DEFINE_float(
    "step_jitter", None, "Coefficient of variation of a server's step, or measured."
  )
  flags.DEFINE_enum("network", "resnet50", [*_BOTTLENECKS, *_BASIC_BLOCKS], "As in the recipe.")
  flags.DEFINE_integer("image_size", 224, "Height and width.")
  flags.DEFINE_float("gradient_bytes", None, "Of a step; left out: 4 a parameter.")
  flags.DEFINE_integer("images_per_gpu", 32, "n, without --measured.")
  # Nothing, as where XLA compiles the passes, or the last worker's backprop.
  flags.DEFINE_enum("overlap", "none", ["none", "backprop"], "What hides communication.")
  flags.DEFINE_float(
    "bytes_per_pack", 2**24, "Least bytes of gradients sent together, where hidden; 0: all in one."
  )
  flags.DEFINE_integer("gpus_per_server", 8, "GPUs that share a network card.")
  flags.DEFINE_float("server_bandwidth", 20e9, "Of a GPU within its server, bytes/s.")
  flags.DEFINE_float("server_latency", 1e-5, "Of a message within a server, seconds.")
  flags.DEFINE_float("network_gigabits", 50, "Of a server's network, Gbit/s.")
  flags.DEFINE_float("network_overhead", 15 / 12.8, "Bits sent for a bit of gradients (§4).")
  flags.DEFINE_float("network_latency", 5e-5, "Of a message between servers, seconds.")
  flags.DEFINE_enum("algorithm", "auto", [*ALGORITHMS, "auto"], "auto: the cheapest.")
  flags.DEFINE_list("allreduce", [], "JSON of tools.benchmark.allreduce: the network is fitted.")
  flags.DEFINE_list("gpus", _GPUS, "p, the first one is compared with.")
  flags.DEFINE_float("epochs", 90, "Of a run.")
  flags.DEFINE_integer("epoch_examples", 1_281_167, "Images of an epoch.")
  flags.DEFINE_list("tasks", [], "Forecast these numbers of tasks, of one core each, here.")
  flags.DEFINE_integer("cores", 1, "With --tasks, the machine's.")
  flags.DEFINE_integer("workers", None, "With --tasks, k of the recipe; left out: as measured.")
  flags.DEFINE_bool("json", False, "JSON instead of a table.")
  flags.DEFINE_bool("paper", False, "Compare with the paper's figures.")


def ring(size: float, peers: int, latency: float, bandwidth: float) -> float:
  """Seconds to all-reduce `size` bytes; 2 (p - 1) messages of a p-th (Patarasuk and Yuan 2009)."""
  return 2 * (peers - 1) * (latency + size / peers / bandwidth)


def tree(size: float, peers: int, latency: float, bandwidth: float) -> float:
  """Up and down a double binary tree (Sanders, Speck, Träff 2009), pipelined.

  Each peer passes on every byte up and down. The latency is that of NCCL's own model of its tree
  (`src/graph/tuning.cc`: 2 ⌊log2 p⌋ messages); that of filling the pipeline is left out.
  """
  if peers == 1:
    return 0.0
  return 2 * (peers.bit_length() - 1) * latency + 2 * size / bandwidth


def halving_doubling(size: float, peers: int, latency: float, bandwidth: float) -> float:
  """Recursive halving, then doubling (Rabenseifner 2004; Thakur, Rabenseifner, Gropp 2005).

  2 log2 p messages for a power of two. Others are split into blocks of powers of two (44 = 32 + 8 +
  4; "binary blocks", as in Gloo's `docs/algorithms.md`): after its own halving, each process of a
  block of b sends what it holds, a b-th, in B/b messages to the next larger block, of B, and gets
  it back before its doubling. The larger block's own halving goes on meanwhile.
  """
  done, smaller = 0.0, 0
  for bit in range(peers.bit_length()):  # The smallest block first; the doubling mirrors it.
    block = 1 << bit
    if peers & block:
      own = bit * latency + (1 - 1 / block) * size / bandwidth
      sent = block / smaller * latency + size / smaller / bandwidth if smaller else 0.0
      done, smaller = max(own, done + sent), block
  return 2 * done


ALGORITHMS = {"ring": ring, "tree": tree, "halving_doubling": halving_doubling}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """Servers of GPUs. Bandwidths in bytes/s of gradients and each way, latencies in seconds."""

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
    """Seconds: sum within each server, all-reduce between servers, copy within (§4).

    Within a server bytes go along a ring, pipelined: (s - 1) messages and every byte once for the
    sum, the same for the copy (nccl-tests, `doc/PERFORMANCE.md`). One server all-reduces by a ring.
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
    seconds, backward_seconds: of the step, and of its last backprop.
    images: of the step.
    layers: bytes of gradients and share of backprop's time, by layer, in the order of the forward
      pass.
    jitter: coefficient of variation of a server's steps.
    overlap: whether backprop hides communication.
    bytes_per_pack: the least bytes that are sent together where it does; 0: all.
  """

  seconds: float
  backward_seconds: float
  images: int
  layers: list[tuple[float, float]]
  jitter: float
  overlap: bool
  bytes_per_pack: float

  def exposed(self, cluster: Cluster, gpus: int) -> float:
    """Seconds of communication that the step waits for.

    A layer's gradients are ready once backprop has passed it, the last layer's first; packs are
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
    """Seconds of a synchronous step, which waits for the slowest server."""
    wait = self.jitter * expected_maximum(cluster.servers(gpus))
    return self.seconds * (1 + wait) + self.exposed(cluster, gpus)


def expected_maximum(count: int) -> float:
  """E[max] of `count` independent standard normals: ∫ x · count · φ(x) Φ(x)^(count - 1) dx.

  By the trapezoidal rule, whose error vanishes exponentially for so smooth an integrand.
  """
  if count == 1:
    return 0.0
  normal = statistics.NormalDist()
  grid = (i / 64 for i in range(-640, 641))
  return sum(x * count * normal.pdf(x) * normal.cdf(x) ** (count - 1) for x in grid) / 64


def usual_classes(network: str) -> int:
  """Of the data that the network was made for: ImageNet's, else CIFAR-10's."""
  return 1000 if network in _BOTTLENECKS else 10


def network_layers(network: str, image_size: int) -> list[tuple[int, int]]:
  """(trainable parameters, multiplications for an image) of each layer, first to last.

  A layer is a convolution with its BN, or the dense one. The networks of `models.resnet`,
  which Keras would take seconds to build, for their `usual_classes`.
  """
  found = []

  def convolution(channels: int, filters: int, kernel: int, side: int):
    weights = kernel**2 * channels * filters
    found.append((weights + 2 * filters, weights * side**2))

  basic = network in _BASIC_BLOCKS
  stages = (_BASIC_BLOCKS[network],) * 3 if basic else _BOTTLENECKS[network]
  first, side = (16, image_size) if basic else (64, -(-image_size // 2))
  classes = usual_classes(network)
  channels = first
  convolution(3, first, 3 if basic else 7, side)
  side = side if basic else -(-side // 2)  # The pooling's.
  for stage, block in ((stage, block) for stage, n in enumerate(stages) for block in range(n)):
    filters, before = first * 2**stage, side
    if stage and not block:
      side = -(-side // 2)
    units = [(filters, 1, before), (filters, 3, side), (4 * filters, 1, side)]
    if basic:
      units = [(filters, 3, side)] * 2
    elif not block:
      convolution(channels, 4 * filters, 1, side)
    for width, kernel, out in units:
      convolution(channels, width, kernel, out)
      channels = width
  return [*found, ((channels + 1) * classes, channels * classes)]


def gradient_layers(network: str, image_size: int, size: float | None) -> list[tuple[float, float]]:
  """`Step.layers`: bytes by parameters, `size` in all (None: float32), time by multiplications."""
  layers = network_layers(network, image_size)
  parameters, work = (sum(column) for column in zip(*layers, strict=True))
  scale = 4 if size is None else size / parameters
  return [(scale * mine, cost / work) for mine, cost in layers]


def fit(points: list[tuple[float, float, int]]) -> dict:
  """Latency and bandwidth of a ring from (bytes, seconds, peers); least squares of relative errors.

  Errors relative to the measured time, for the sizes span many orders of magnitude.
  """
  rows = [
    (ring(0, peers, 1, 1) / seconds, ring(size, peers, 0, 1) / seconds)
    for size, seconds, peers in points
  ]
  aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
  determinant = aa * bb - ab * ab
  if determinant <= 1e-9 * aa * bb:
    raise UserError("--allreduce=FILE must have points of at least two very different sizes.")
  a, b = (sum(column) for column in zip(*rows, strict=True))
  latency, per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
  if latency < 0:  # The nearest that a network can have.
    latency, per_byte = 0.0, b / bb
  if per_byte <= 0:
    raise UserError("An all-reduce's seconds do not grow with its bytes; measure larger ones.")
  errors = [abs(latency * x + per_byte * y - 1) for x, y in rows]
  return {
    **dict(zip(_LINK, (latency, 1 / per_byte), strict=True)),
    "median_relative_error": statistics.median(errors),
    "worst_relative_error": max(errors),
  }


def needed_gigabits(step: Step, cluster: Cluster, gpus: int, overhead: float) -> float | None:
  """The network, Gbit/s, that leaves 1 % of the step exposed; None if none is fast enough."""

  def enough(gigabits: float) -> bool:
    link = dataclasses.replace(cluster, network_bandwidth=gigabits * 1e9 / 8 / overhead)
    return step.exposed(link, gpus) <= _HIDDEN * step.seconds

  low, high = 1e-6, 1e6
  if not enough(high):
    return None
  if enough(low):
    return 0.0
  for _ in range(60):
    middle = math.sqrt(low * high)
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high


def forecast(step: Step, cluster: Cluster, gpus: list[int], run_images: float, overhead: float):
  """A row for each number of GPUs; growth and efficiency are relative to the first."""
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
  """A row for each number of tasks of one core, which share a machine and a recipe of k workers.

  Args:
    step: measured on one core.
    step_workers: those that it looped over.
    workers: k.
    tasks: numbers of them; speedup and efficiency are relative to the first.
    cores: that the tasks share.
    fits: `fit` of the ring by the number of tasks, where there are several.
  """
  rows = []
  size = sum(size for size, _ in step.layers)
  for count in tasks:
    if workers % count:
      raise UserError(f"tasks={count} must divide workers={workers}.")
    compute = step.seconds / step_workers * workers / min(count, cores)
    wait = step.jitter * expected_maximum(count) * compute
    link = (fits[count][name] for name in _LINK) if count in fits else (0, 1)
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


def compare_with_paper(cluster: Cluster, share: float) -> list[dict]:
  """The model against what the paper reports of its own cluster.

  The paper's inputs: 120 ms of backprop, 100 MB of gradients sent layer by layer, n = 32, 8 GPUs a
  server, halving/doubling between servers at 50 Gbit/s, 15 bits sent for 12.8. Assumptions: the
  latencies and the bandwidth within a server, of `cluster`; `share`, backprop's of a step; that
  a layer's share of backprop is that of its multiplications. For the last rows a jitter is
  fitted, unless communication alone grows by more than the paper's 12 %.
  """
  backward, size, images, overhead = 0.120, 100e6, 32, 15 / 12.8
  cluster = dataclasses.replace(
    cluster,
    gpus_per_server=8,
    network_bandwidth=50e9 / 8 / overhead,
    algorithm="halving_doubling",
  )
  step = Step(
    seconds=backward / share,
    backward_seconds=backward,
    images=images,
    layers=gradient_layers("resnet50", 224, size),
    jitter=0.0,
    overlap=True,
    bytes_per_pack=1,  # A layer's leave as soon as they are there.
  )
  rows = []

  def compare(what: str, predicted: float | None, paper: float):
    error = None if predicted is None else predicted / paper - 1
    rows.append({"what": what, "predicted": predicted, "paper": paper, "relative_error": error})

  def compare_scaling(step: Step, kind: str):
    base, at_256, at_352 = (step.iteration(cluster, gpus) for gpus in (8, 256, 352))
    compare(f"{kind}: growth from 8 to 352 GPUs, %", 100 * (at_352 / base - 1), 12)
    compare(f"{kind}: efficiency at 256 GPUs, %", 100 * base / at_256, 90)
    hours = 90 * 1_281_167 / 256 / images * at_256 / 3600
    compare(f"{kind}: hours of 90 epochs at 256 GPUs", hours, 1)

  compare("peak Gbit/s: all bytes twice in backprop's time", 2 * size * 8 / backward / 1e9, 12.8)
  needed = needed_gigabits(step, cluster, 256, overhead)
  compare("network Gbit/s at which the model hides 99 %, 256 GPUs", needed, 15)
  link = (32, cluster.network_latency, cluster.network_bandwidth)
  rings, halvings = (sum(f(b, *link) for b, _ in step.layers) for f in (ring, halving_doubling))
  compare("ring's seconds / halving/doubling's, 32 servers", rings / halvings, 3)
  compare_scaling(step, "nothing fitted")
  compare_scaling(dataclasses.replace(step, overlap=False), "nothing fitted, nothing hidden")
  # The growth is linear in the jitter, and one server has none to wait for.
  lacking = 1.12 * step.iteration(cluster, 8) - step.iteration(cluster, 352)
  if lacking > 0:
    jitter = lacking / step.seconds / expected_maximum(44)
    fitted = dataclasses.replace(step, jitter=jitter)
    compare_scaling(fitted, f"jitter of {jitter:.4f} fitted to the growth")
    rows[-3]["relative_error"] = "fitted"
  return rows


def positive(name: str, value, kinds: tuple[type, ...] = (int, float), zero: bool = False):
  """The value, if it is a sensible number: no overflow is to be feared."""
  if type(value) not in kinds or not (1e-30 <= value <= 1e30 or (zero and value == 0)):
    kind = "number" if float in kinds else "whole number"
    least = "0 or from 1e-30" if zero else "from 1e-30"
    raise UserError(f"{name}={value!r} is refused; it must be a {kind}, {least} to 1e30.")
  return value


def whole_numbers(name: str, words: list[str]) -> list[int]:
  if not words or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
    raise UserError(f"{name}={','.join(words)!r} is refused; it must be whole numbers, 1 to 1e9.")
  return [positive(name, int(word)) for word in words]


def read_json(path: str, whole: tuple[str, ...], numbers: tuple[str, ...], items: str) -> dict:
  """The object of a file, with these positive whole numbers, these numbers and this list.

  Of several "contenders" (`tools.benchmark.step`) it is the first.
  """
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}).") from error
  if isinstance(found, dict) and isinstance(found.get("contenders"), dict):
    found = next(iter(found["contenders"].values()), None)
  if not isinstance(found, dict) or not isinstance(found.get(items), list):
    raise UserError(f"{path} must hold a JSON object with a list {items!r}.")
  for name in (*whole, *numbers):
    positive(f"{path}: {name}", found.get(name), (int, float) if name in numbers else (int,))
  return found


def read_points(path: str) -> list[tuple[float, float, int]]:
  """(bytes, seconds, peers) of each all-reduce in a file of tools.benchmark.allreduce.

  Raises:
    UserError: it is none, or was measured on several replicas of a task: their ring goes within a
      machine, too, and says nothing of what is between machines alone.
  """
  found = read_json(path, ("replicas", "tasks"), (), "points")
  points = [point if isinstance(point, dict) else {} for point in found["points"]]
  numbers = [[positive(f"{path}: {n}", p.get(n)) for n in ("bytes", "seconds")] for p in points]
  if found["replicas"] == 1:
    raise UserError(f"{path} was measured with one replica, which sends nothing; take two or more.")
  if found["replicas"] != found["tasks"]:
    raise UserError(
      f"{path} was measured with {found['replicas']} replicas in {found['tasks']} tasks, so within "
      "machines, too; measure with one replica a task (CUDA_VISIBLE_DEVICES=0), a task a server."
    )
  return [(size, seconds, found["replicas"]) for size, seconds in numbers]


def step_of_flags(values) -> tuple[Step, int]:
  """The step, and the workers of its replica."""
  network, image_size, size = values.network, values.image_size, values.gradient_bytes
  workers, passes, jitter = 1, 1, 0.0
  images, seconds = values.images_per_gpu, values.step_seconds
  if values.measured:
    path = values.measured
    whole = ("image_size", "per_worker_batch_size", "workers", "passes", "tasks", "steps")
    found = read_json(path, whole, ("gradient_bytes", "step_seconds"), "step_seconds_each")
    network, image_size, size = (found.get(n) for n in ("network", "image_size", "gradient_bytes"))
    if network not in (*_BOTTLENECKS, *_BASIC_BLOCKS):
      raise UserError(f"{path}: network={network!r} is unknown.")
    if found["tasks"] > 1:
      raise UserError(
        f"{path} holds the step of {found['tasks']} tasks, their all-reduce included; measure one "
        "task's (the first contender's)."
      )
    workers, passes, seconds = found["workers"], found["passes"], found["step_seconds"]
    images = workers * found["per_worker_batch_size"]
    each = [positive(f"{path}: step_seconds_each", x) for x in found["step_seconds_each"]]
    if len(each) > 1:
      # By the width of the middle half, as of a normal: a first, slow step is no jitter.
      low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
      jitter = (high - low) / (2 * statistics.NormalDist().inv_cdf(0.75)) / middle
      # Each is the mean of so many steps, which are taken as independent.
      jitter *= math.sqrt(found["steps"])
  if seconds is None:
    raise UserError("Give --measured=FILE or --step_seconds=SECONDS (or --paper).")
  step = Step(
    seconds=seconds,
    backward_seconds=values.backward_share * seconds / passes,
    images=images,
    layers=gradient_layers(network, image_size, size),
    jitter=jitter if values.step_jitter is None else values.step_jitter,
    overlap=values.overlap == "backprop",
    bytes_per_pack=values.bytes_per_pack,
  )
  return step, workers


def report(values) -> dict:
  """What the flags ask for: the rows of a table, and what else there is to say, by name."""
  for name in _POSITIVE_FLAGS:
    if values[name].value is not None:
      positive(name, values[name].value)
  for name in ("server_latency", "network_latency", "bytes_per_pack", "step_jitter"):
    positive(name, values[name].value or 0, zero=True)
  if values.backward_share > 1:
    raise UserError(f"backward_share={values.backward_share} is refused; it is 1 at most.")
  cluster = Cluster(
    gpus_per_server=values.gpus_per_server,
    server_bandwidth=values.server_bandwidth,
    server_latency=values.server_latency,
    network_bandwidth=values.network_gigabits * 1e9 / 8 / values.network_overhead,
    network_latency=values.network_latency,
    algorithm=values.algorithm,
  )
  if values.paper:
    names = ("server_bandwidth", "server_latency", "network_latency", "backward_share")
    rows = compare_with_paper(cluster, values.backward_share)
    return {"assumed": {name: values[name].value for name in names}, "rows": rows}
  step, step_workers = step_of_flags(values)
  points = [point for path in values.allreduce for point in read_points(path)]
  found = {"step_jitter": step.jitter}
  if values.tasks:
    tasks = whole_numbers("tasks", values.tasks)
    # Tasks that share cores are slower at messages, too: those measured with as many are best.
    fits = {t: fit([p for p in points if p[2] == t] or points) for t in tasks if t > 1}
    rows = forecast_tasks(
      step, step_workers, values.workers or step_workers, tasks, values.cores, fits
    )
    return {**found, "fits": fits, "rows": rows}
  overhead = values.network_overhead
  if values.allreduce:
    found["fit"] = fit(points)
    overhead = 1.0  # The measured bandwidth is that of gradients.
    cluster = dataclasses.replace(
      cluster,
      network_latency=found["fit"]["latency_seconds"],
      network_bandwidth=found["fit"]["bandwidth_bytes_per_second"],
    )
  gpus = whole_numbers("gpus", values.gpus)
  rows = forecast(step, cluster, gpus, values.epochs * values.epoch_examples, overhead)
  shown = next((row for row in rows if not row["hidden"]), {})
  found[_SHOWN] = shown.get("gpus")
  found[_NEEDED] = shown.get("needed_gigabits")
  return {**found, "rows": rows}


def table(rows: list[dict]) -> str:
  """Aligned columns; numbers to five digits."""

  def text(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)

  lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines
  )


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  try:
    if len(argv) > 1:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
    found = report(values)
    if values.json:
      print(json.dumps(found, indent=2))
    else:
      print(table(found.pop("rows")))
      gpus, gigabits = found.pop(_SHOWN, None), found.pop(_NEEDED, None)
      print(*(f"{name}: {json.dumps(value)}" for name, value in found.items()), sep="\n")
      if gpus:
        how = f"a network of {gigabits:.4g} Gbit/s" if gigabits else "no network, however fast,"
        print(f"Over 1 % of a step is exposed at {gpus} GPUs first; {how} would hide it there.")
      elif not (values.paper or values.tasks):
        print("Nowhere is over 1 % of a step exposed.")
    return 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  define_flags()
  app.run(main)
