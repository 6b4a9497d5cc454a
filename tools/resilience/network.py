"""A network between the tasks of one machine whose links can be cut silently or made slow.

Each task has its own network namespace, an address in it and a virtual cable (veth) to a bridge in
one more namespace. To disconnect a task, the cable's end is removed from the bridge, which then
drops what arrives there. Setting the link down instead would take the carrier from the task; and
because ARP entries are permanent, no failed ARP request reports the loss to the others. A task's
rate is limited where its packets leave, by a token bucket (tc's `tbf`), as by a network card.
"""

import contextlib
import dataclasses
import shutil
import subprocess

from tf_largebatch.errors import UserError

# Of a task's address on the network; the sixth byte is its rank + 1.
MAC_PREFIX = bytes.fromhex("02 00 00 00 00")

_PORT = 2222
# A token bucket lets its size through at once. Below 64 KiB the kernel splits the packets that TCP
# hands over, which costs time at high rates; at low rates so many bytes would be a large share.
_BURST_SECONDS, _LEAST_BURST, _MOST_BURST = 1e-3, 16_000, 512_000
_QUEUE_BYTES = 2**26  # TCP keeps its own queue here short; nothing is dropped.


@dataclasses.dataclass(frozen=True)
class Network:
  """The tasks' network.

  Attributes:
    addresses: host:port of each task.
    prefixes: command that runs the command after it in each task's namespace.
    bridge: the same for the bridge's namespace.
  """

  addresses: list[str]
  prefixes: list[list[str]]
  bridge: list[str]

  def disconnect(self, rank: int):
    _ip(self.bridge, f"link set {port(rank)} nomaster")

  def connect(self, rank: int):
    _ip(self.bridge, f"link set {port(rank)} master bridge")

  def limit(self, gigabits: float):
    """Lets each task send so many Gbit/s at most, from now on.

    Raises:
      UserError: `tc` is missing or fails.
    """
    bits = gigabits * 1e9
    burst = min(max(_BURST_SECONDS * bits / 8, _LEAST_BURST), _MOST_BURST)
    limit = f"rate {bits:.0f}bit burst {burst:.0f} limit {_QUEUE_BYTES}"
    for prefix in self.prefixes:
      _batch("tc", prefix, f"qdisc replace dev eth0 root tbf {limit}")


def port(rank: int) -> str:
  """The name, in the bridge's namespace, of the end of a task's cable."""
  return f"port{rank}"


@contextlib.contextmanager
def isolated_network(num_tasks: int, instead: str = "--faults=kill,stop"):
  """Creates the namespaces, yields the `Network`; the namespaces end with their last process.

  Args:
    num_tasks: on the network.
    instead: what the user can do without one, for the errors.

  Raises:
    UserError: a program is missing, or this process is not root.
  """
  missing = [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]
  if missing:
    raise UserError(
      f"A network between tasks needs {', '.join(missing)} (iproute2, util-linux); install them or "
      f"use {instead}"
    )
  with contextlib.ExitStack() as stack:
    holders = [stack.enter_context(_namespace(instead)) for _ in range(num_tasks + 1)]
    *prefixes, bridge = [["nsenter", f"--net=/proc/{pid}/ns/net"] for pid in holders]
    macs = [f"{MAC_PREFIX.hex(':')}:{rank + 1:02x}" for rank in range(num_tasks)]
    hosts = [f"10.0.0.{rank + 1}" for rank in range(num_tasks)]
    _ip(bridge, "link add bridge type bridge", "link set bridge up")
    for rank, prefix in enumerate(prefixes):
      _ip(
        bridge,
        f"link add {port(rank)} type veth peer name eth0 netns {holders[rank]}",
        f"link set {port(rank)} master bridge up",
      )
      _ip(
        prefix,
        "link set lo up",
        f"link set eth0 address {macs[rank]} up",
        f"address add {hosts[rank]}/24 dev eth0",
        *(
          f"neighbour add {hosts[other]} lladdr {macs[other]} dev eth0 nud permanent"
          for other in range(num_tasks)
          if other != rank
        ),
      )
    yield Network([f"{host}:{_PORT}" for host in hosts], prefixes, bridge)


@contextlib.contextmanager
def _namespace(instead: str):
  """Creates a network namespace and yields the id of a process in it."""
  # `cat` ends when its input does, so also when this program is killed.
  holder = subprocess.Popen(
    ["unshare", "--net", "cat"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  try:
    with contextlib.suppress(BrokenPipeError):
      holder.stdin.write(b"\n")
      holder.stdin.flush()
    if not holder.stdout.readline():
      raise UserError(
        "A network between tasks needs root, to create network namespaces"
        f" ({holder.stderr.read().decode().strip()}); use {instead}"
      )
    yield holder.pid
  finally:
    holder.communicate()  # Closes its input and waits.


def _ip(prefix: list[str], *commands: str):
  _batch("ip", prefix, *commands)


def _batch(program: str, prefix: list[str], *commands: str):
  """Runs commands of `ip` or `tc` in a namespace."""
  text = "".join(f"{command}\n" for command in commands)
  done = subprocess.run(
    [*prefix, program, "-batch", "-"], input=text, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise UserError(f"A network between tasks: {program} failed ({' '.join(done.stderr.split())})")
