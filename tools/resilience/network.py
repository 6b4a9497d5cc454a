"""A network between the tasks of one machine in which a task can be disconnected silently.

Each task has its own network namespace, an address in it and a virtual cable (veth) to a bridge in
one more namespace. To disconnect a task, the cable's end is removed from the bridge, which then
drops what arrives there. Setting the link down instead would take the carrier from the task; and
because ARP entries are permanent, no failed ARP request reports the loss to the others.
"""

import contextlib
import dataclasses
import shutil
import subprocess

from tf_largebatch.errors import UserError

_PORT = 2222


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
    _ip(self.bridge, f"link set port{rank} nomaster")


@contextlib.contextmanager
def isolated_network(num_tasks: int):
  """Creates the namespaces, yields the `Network`; the namespaces end with their last process.

  Raises:
    UserError: a program is missing, or this process is not root.
  """
  missing = [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]
  if missing:
    raise UserError(
      f"--faults=cut needs {', '.join(missing)} (iproute2, util-linux); install them or use other "
      "faults"
    )
  with contextlib.ExitStack() as stack:
    holders = [stack.enter_context(_namespace()) for _ in range(num_tasks + 1)]
    *prefixes, bridge = [["nsenter", f"--net=/proc/{pid}/ns/net"] for pid in holders]
    macs = [f"02:00:00:00:00:{rank + 1:02x}" for rank in range(num_tasks)]
    hosts = [f"10.0.0.{rank + 1}" for rank in range(num_tasks)]
    _ip(bridge, "link add bridge type bridge", "link set bridge up")
    for rank, prefix in enumerate(prefixes):
      _ip(
        bridge,
        f"link add port{rank} type veth peer name eth0 netns {holders[rank]}",
        f"link set port{rank} master bridge up",
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
def _namespace():
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
        "--faults=cut creates network namespaces, which needs root"
        f" ({holder.stderr.read().decode().strip()}); use other faults"
      )
    yield holder.pid
  finally:
    holder.communicate()  # Closes its input and waits.


def _ip(prefix: list[str], *commands: str):
  text = "".join(f"{command}\n" for command in commands)
  done = subprocess.run(
    [*prefix, "ip", "-batch", "-"], input=text, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise UserError(f"--faults=cut: ip failed ({' '.join(done.stderr.split())})")
