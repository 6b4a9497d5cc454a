"""Delays what travels between the tasks of a `tools.resilience.network`.

The kernel's own delay, netem, is not built into every kernel. Here the tasks' cables are taken off
the bridge, and a process reads each frame at the end of one cable, holds it, and writes it to the
end of another. Frames cross it as TCP hands them over, up to 64 KiB each, so that they are few.
"""

import collections
import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator

from tools.benchmark import harness
from tools.resilience.network import MAC_PREFIX, Network, port

_START_SECONDS = 60
_LARGEST_FRAME = 2**17
_BUFFER_BYTES = 2**28  # Must hold what arrives while the relay does something else.
_FRAMES_AT_ONCE = 32  # Read from one cable before frames that are due are written.
# From <linux/if_packet.h>, <asm-generic/socket.h> and <linux/virtio_net.h>.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_HEADER = 10  # Bytes before the frame: how the receiver is to cut it and sum it up.
_ETH_P_ALL = 3


@contextlib.contextmanager
def delayed(network: Network, seconds: float, scratch: str) -> Iterator[dict]:
  """Delays each frame by so many seconds, one way, while the context lasts.

  Args:
    network: of the tasks.
    seconds: 0: the frames cross the bridge, not the relay.
    scratch: directory for the relay's log.

  Yields:
    {"real_time": whether the scheduler prefers the relay to the tasks}; {} without a relay.
  """
  if not seconds:
    yield {}
    return
  ranks = range(len(network.prefixes))
  for rank in ranks:
    network.disconnect(rank)
  try:
    with harness.Process("the relay", relay, scratch, {}, network.bridge) as process:
      process.send({"ports": [port(rank) for rank in ranks], "seconds": seconds})
      yield process.receive(_START_SECONDS)
  finally:
    for rank in ranks:
      network.connect(rank)


def relay():
  """The relay's program; the only message is {"ports": names by rank, "seconds": delay}."""
  first = next(harness.messages())
  real_time = True
  try:  # It must not wait for a core until a task's share of time is used up.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
  except PermissionError:
    real_time = False
  ends = [_open(name) for name in first["ports"]]
  harness.report({"real_time": real_time})
  _forward(ends, first["seconds"])


def _open(name: str) -> socket.socket:
  """A socket that reads and writes whole frames at the end of a cable."""
  end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
  end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
  end.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
  end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
  end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
  end.bind((name, _ETH_P_ALL))  # Only now, when the header is on, does it receive.
  return end


def _forward(ends: list[socket.socket], seconds: float):
  """Forwards frames forever."""
  held = collections.deque()  # (when due, where to, frame); all wait equally long, so in order.
  while True:
    wait = max(0.0, held[0][0] - time.monotonic()) if held else None
    readable, _, _ = select.select(ends, [], [], wait)
    for end in readable:
      for _ in range(_FRAMES_AT_ONCE):
        try:
          frame = end.recv(_LARGEST_FRAME, socket.MSG_DONTWAIT)
        except BlockingIOError:
          break
        target = _target(frame, ends)
        if target:
          held.append((time.monotonic() + seconds, target, frame))
    now = time.monotonic()
    while held and held[0][0] <= now:
      _, target, frame = held.popleft()
      with contextlib.suppress(OSError):  # A frame that is lost is sent again.
        target.send(frame)


def _target(frame: bytes, ends: list[socket.socket]) -> socket.socket | None:
  """The end whose task the frame is for; None if it is for none, as IPv6's announcements."""
  address = frame[_HEADER : _HEADER + 6]
  known = address[:5] == MAC_PREFIX and 0 < address[5] <= len(ends)
  return ends[address[5] - 1] if known else None
