"""What the links between tasks really do: the rate of a TCP transfer, and a round trip's time."""

import socket
import statistics
import time

from tools.benchmark import harness
from tools.resilience.network import Network

_ROUND_TRIPS = 20
_CHUNK = 2**18
_REPORT_SECONDS = 120


def check(network: Network, seconds: float, scratch: str) -> dict[str, float]:
  """Sends from the first task's namespace to the second one's.

  Args:
    network: of two tasks at least.
    seconds: of the transfer.
    scratch: directory for logs.

  Returns:
    {"round_trip_seconds": median, "bits_per_second": of payload, after TCP's slow start}.
  """
  host = network.addresses[1].partition(":")[0]
  prefixes = network.prefixes
  with (
    harness.Process("the receiver of the link's check", receive, scratch, {}, prefixes[1]) as one,
    harness.Process("the sender of the link's check", send, scratch, {}, prefixes[0]) as other,
  ):
    one.send({})
    port = one.receive(_REPORT_SECONDS)["port"]
    other.send({"address": [host, port], "seconds": seconds})
    found = other.receive(_REPORT_SECONDS)
    return found | one.receive(_REPORT_SECONDS)


def receive():
  """The receiver's program: answers single bytes, then measures the rate of what follows."""
  next(harness.messages())
  with socket.create_server(("", 0)) as server:
    harness.report({"port": server.getsockname()[1]})
    connection, _ = server.accept()
  with connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(_ROUND_TRIPS):
      connection.sendall(connection.recv(1))
    buffer, count, arrivals = bytearray(_CHUNK), 0, []
    while size := connection.recv_into(buffer):
      count += size
      arrivals.append((time.monotonic(), count))
  harness.report({"bits_per_second": steady_rate(arrivals)})


def send():
  """The sender's program; its message is {"address": [host, port], "seconds": of the transfer}."""
  message = next(harness.messages())
  seconds = []
  with socket.create_connection(tuple(message["address"])) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(_ROUND_TRIPS):
      began = time.monotonic()
      connection.sendall(b".")
      connection.recv(1)
      seconds.append(time.monotonic() - began)
    deadline, chunk = time.monotonic() + message["seconds"], bytes(_CHUNK)
    while time.monotonic() < deadline:
      connection.sendall(chunk)
  harness.report({"round_trip_seconds": statistics.median(seconds)})


def steady_rate(arrivals: list[tuple[float, int]]) -> float:
  """Bits per second in the last half of the time, from (time, bytes so far)."""
  middle = (arrivals[0][0] + arrivals[-1][0]) / 2
  began, before = next(arrival for arrival in arrivals if arrival[0] >= middle)
  ended, after = arrivals[-1]
  return 8 * (after - before) / (ended - began)
