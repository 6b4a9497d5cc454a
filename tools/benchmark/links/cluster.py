"""The tasks of a measurement and the links between them, as the measuring program sees them."""

import contextlib
import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.benchmark import harness
from tools.benchmark.links import traffic
from tools.benchmark.links.relay import delayed
from tools.benchmark.links.task import serve
from tools.launch_local import task_environment
from tools.resilience.network import Network, isolated_network

_REPORT_SECONDS = 600  # Of compiling, and of the slowest calls.
_CHECK_SECONDS = 0.6
# Windows for 10 Gbit/s with a round trip of 20 ms, so that the link alone decides.
_TCP = {"tcp_rmem": "4096 131072 67108864", "tcp_wmem": "4096 65536 67108864"}
_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"


@dataclasses.dataclass(frozen=True)
class Link:
  """What the link of each task lets through.

  Attributes:
    gigabits: per second, that a task may send; None: the tasks have no links.
    delay_ms: of each packet, one way.
  """

  gigabits: float | None = None
  delay_ms: float = 0.0


class Cluster:
  """Tasks that are ready to be timed; used as a context manager."""

  def __init__(self, recipe: Recipe, packs: list[int]):
    """Starts the tasks and waits for them.

    Args:
      recipe: k is the number of tasks.
      packs: values of --bytes_per_pack.

    Raises:
      UserError: namespaces cannot be created, or a task failed.
    """
    with contextlib.ExitStack() as stack:
      self._scratch = stack.enter_context(tempfile.TemporaryDirectory())
      self._network = None
      self.facts = {}
      addresses, prefixes = [], [[]]
      if recipe.workers > 1:
        self._network = stack.enter_context(isolated_network(recipe.workers, "--tasks=1"))
        addresses, prefixes = self._network.addresses, self._network.prefixes
        self.facts["tcp_congestion_control"] = _set_up_tcp(self._network)
      self._tasks = []
      for rank, prefix in enumerate(prefixes):
        name, scratch = f"task {rank}", tempfile.mkdtemp(dir=self._scratch)
        environment = _environment(addresses, rank)
        task = harness.Process(name, serve, scratch, environment, prefix)
        self._tasks.append(stack.enter_context(task))
        task.send({"recipe": recipe.to_dict(), "packs": packs})
      self.facts |= self._reports()[0]
      self._stack = stack.pop_all()

  def __enter__(self) -> "Cluster":
    return self

  def __exit__(self, *_):
    self._stack.close()

  @contextlib.contextmanager
  def linked_by(self, link: Link) -> Iterator[dict]:
    """Makes the links so while the context lasts; yields what `delayed` does."""
    if link.gigabits is None:
      yield {}
      return
    self._network.limit(link.gigabits)
    with delayed(self._network, link.delay_ms / 1000, self._scratch) as facts:
      yield facts

  def check_link(self) -> dict[str, float]:
    """What `traffic.check` finds on the present links; {} without links."""
    return traffic.check(self._network, _CHECK_SECONDS, self._scratch) if self._network else {}

  def time_alone(self, untimed: int, timed: int) -> list[list[float]]:
    """Each task's seconds of steps without communication, while all others compute them too."""
    found = self._ask({"alone": True, "untimed": untimed, "timed": timed})
    self._ask({"stop": True})
    return [report["seconds"] for report in found]

  def time(self, what: str, pack: int, untimed: int, timed: int) -> list[float]:
    """The first task's seconds of calls that all tasks make together.

    Args:
      what: "step" or "reduce".
      pack: index among the cluster's packs.
      untimed: calls before them.
      timed: number of calls.
    """
    return self._ask({what: pack, "untimed": untimed, "timed": timed})[0]["seconds"]

  def _ask(self, message: dict) -> list[dict]:
    for task in self._tasks:
      task.send(message)
    return self._reports()

  def _reports(self) -> list[dict]:
    return [task.receive(_REPORT_SECONDS) for task in self._tasks]


def _environment(addresses: list[str], rank: int) -> dict[str, str]:
  """A task's variables: its share of the cores, and its place in the cluster if there is one."""
  environment = task_environment(addresses or ["alone"], rank)
  if not addresses:
    del environment["TF_CONFIG"]
  return environment | {"CUDA_VISIBLE_DEVICES": "-1"}


def _set_up_tcp(network: Network) -> str:
  """Sets the sizes of TCP's windows on all tasks; returns the kernel's congestion control."""
  commands = [f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in _TCP.items()]
  for prefix in network.prefixes:
    command = [*prefix, "sh", "-e", "-c", "; ".join([*commands, f"cat {_CONTROL}"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      raise UserError(f"TCP's windows cannot be set ({done.stderr.strip()}); use --tasks=1")
  return done.stdout.strip()
