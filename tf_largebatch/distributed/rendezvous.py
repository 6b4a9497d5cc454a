"""The start of several tasks: each waits for all others before TensorFlow connects them.

TensorFlow would wait too, but for an hour, while it holds the interpreter's lock, so that neither
signals nor time limits reach the process; and it would take any service that listens on a task's
address for that task.
"""

import contextlib
import ctypes
import os
import shlex
import socket
import threading
import time
from collections.abc import Iterator

from tf_largebatch import threads
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.errors import LOST_TASK, InterruptedRunError, UserError, summary

_GREETING = b"tf_largebatch task "
# What a gRPC server, TensorFlow's, sends first: an HTTP/2 frame of type SETTINGS on stream 0.
_FRAME_BYTES, _SETTINGS = 9, b"\x04\x00\x00\x00\x00\x00"
# Makes most other servers answer.
_PROVOCATION = b"GET / HTTP/1.0\r\n\r\n"
_ANSWER_SECONDS = 2.0
_STRANGER_SECONDS = 20.0  # How long another program may answer on a task's address.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC reads these, in lower case only.
_NO_PROXY = "no_grpc_proxy"
_SIGEV_THREAD = 2  # From <signal.h>.
_CLOCK_MONOTONIC = 1  # From <time.h>.


def bypass_proxies(cluster: Cluster) -> None:
  """Keeps gRPC from connecting tasks through the user's HTTP proxy; nothing else is affected."""
  if not any(os.environ.get(name) for name in _PROXIES):
    return
  hosts = {task.rpartition(":")[0].strip("[]") for task in cluster.tasks}
  # gRPC reads no_proxy only where there is no no_grpc_proxy.
  exempt = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy") or ""
  os.environ[_NO_PROXY] = ",".join([*filter(None, exempt.split(",")), *sorted(hosts)])


def wait_for_all(cluster: Cluster, timeout_minutes: float) -> None:
  """Waits until every task answers on its address, from this function or from TensorFlow.

  Raises:
    UserError: this task's port is in use on this machine, or another program or another task
      answers on a task's address.
    InterruptedRunError: some tasks did not come up in time.
  """
  missing = set(cluster.tasks) - {cluster.tasks[cluster.task_index]}
  began = time.monotonic()
  last_without_stranger = dict.fromkeys(missing, began)  # Time by task.
  with listening(cluster):
    while True:
      now = time.monotonic()
      reasons = {task: _probe(cluster, task) for task in sorted(missing)}
      reasons = {task: reason for task, reason in reasons.items() if reason is not None}
      missing = set(reasons)
      if not missing:
        return
      for task, reason in reasons.items():
        if not isinstance(reason, _Stranger):
          last_without_stranger[task] = now
        elif now - last_without_stranger[task] >= min(_STRANGER_SECONDS, 60 * timeout_minutes):
          raise UserError(
            f"{reason} answers instead of {_name(cluster, task)}; end it or give the task another "
            f"address or port ({cluster.launcher}), the same on all tasks"
          )
      if now - began > 60 * timeout_minutes:
        names = ", ".join(_name(cluster, task) for task in reasons)
        raise InterruptedRunError(
          f"{names} did not come up within {timeout_minutes:g} minutes "
          f"({', '.join(sorted(set(reasons.values())))}); start all tasks again, or give them more "
          "time (--cluster_timeout_minutes).",
          LOST_TASK,
        )
      time.sleep(0.2)


def _name(cluster: Cluster, task: str) -> str:
  return f"task {cluster.tasks.index(task)} ({task})"


class _Stranger(str):
  """What answers on a task's address instead of the task."""


def _probe(cluster: Cluster, task: str) -> str | None:
  """Returns None if the task answers on its address, else the reason why it counts as missing."""
  host, _, port = task.rpartition(":")
  try:
    with socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS) as connection:
      connection.settimeout(_ANSWER_SECONDS / 2)
      answer = _receive(connection)
      if not answer:
        connection.sendall(_PROVOCATION)
        answer = _receive(connection)
  except OSError as error:
    return summary(error.strerror or error)
  index = cluster.tasks.index(task)
  if answer == _greeting(index, cluster.num_tasks):
    return None
  if answer.startswith(_GREETING):
    return _Stranger(answer.decode(errors="replace").strip())
  if answer[3:_FRAME_BYTES] == _SETTINGS:
    return None
  if not answer:
    return "no answer"  # A task that is suspended accepts connections too.
  first = answer[:40].decode(errors="replace").strip()
  return _Stranger(f"another program (it sent: {first})")


def _receive(connection: socket.socket) -> bytes:
  """Returns the first bytes that arrive, up to the end of a line or a frame; b"" if none do."""
  received = b""
  with contextlib.suppress(TimeoutError, ConnectionError):
    while len(received) < _FRAME_BYTES or (
      received.startswith(_GREETING[:_FRAME_BYTES]) and not received.endswith(b"\n")
    ):
      part = connection.recv(256)
      if not part:
        break
      received += part
  return received


def _greeting(index: int, num_tasks: int) -> bytes:
  return _GREETING + f"{index} of {num_tasks}\n".encode()


@contextlib.contextmanager
def listening(cluster: Cluster) -> Iterator[None]:
  """Listens on this task's port on all interfaces, as TensorFlow will, and says who answers.

  If the port were in use, TensorFlow would exit without saying so. SO_REUSEADDR lets a restarted
  run bind the port at once, while old connections are still in TIME_WAIT. SO_REUSEPORT would
  silently share a port that is in use.

  Raises:
    UserError: the port is in use on this machine.
  """
  address = cluster.tasks[cluster.task_index]
  try:
    listener = _listen(int(address.rpartition(":")[2]))
  except OSError as error:
    raise UserError(
      f"cannot listen on this task's address {address} ({os.strerror(error.errno)}): end the"
      f" process that uses the port or give the task another one ({cluster.launcher})"
    ) from error
  greeting = _greeting(cluster.task_index, cluster.num_tasks)
  with listener, threads.running(_greet, listener, greeting):
    yield


def _listen(port: int) -> socket.socket:
  """Returns a socket for IPv4 and IPv6, or for IPv4 alone where the machine has no IPv6."""
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):  # IPv6 may be compiled in and switched off.
      socket.create_server(("::1", 0), family=socket.AF_INET6).close()
      return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
      )
  return socket.create_server(("", port), backlog=1024)


def _greet(listener: socket.socket, greeting: bytes, ended: threading.Event) -> None:
  listener.settimeout(0.1)
  while not ended.is_set():
    with contextlib.suppress(OSError):  # A time-out, or a peer that has gone.
      connection, _ = listener.accept()
      with connection:
        connection.sendall(greeting)


class _SignalEvent(ctypes.Structure):  # struct sigevent of Linux on 64-bit machines.
  _fields_ = (
    ("value", ctypes.c_void_p),
    ("signal", ctypes.c_int),
    ("notify", ctypes.c_int),
    ("function", ctypes.c_void_p),
    ("attributes", ctypes.c_void_p),
    ("padding", ctypes.c_char * 32),
  )


class _TimerSpec(ctypes.Structure):  # struct itimerspec.
  _fields_ = tuple(
    (name, ctypes.c_long) for name in ("every", "every_ns", "seconds", "nanoseconds")
  )


@contextlib.contextmanager
def ended_after(minutes: float) -> Iterator[None]:
  """Ends the process with an error line and status 138 if the block takes longer.

  If a task is lost while TensorFlow connects, nothing else could: TensorFlow holds the
  interpreter's lock. The C library's timers call its functions `system` and `_exit` in new threads.
  """
  library = ctypes.CDLL(None)
  line = (
    "error: All tasks came up, but TensorFlow did not connect them within "
    f"{minutes:g} minutes: one may have ended, or something between them may block gRPC; start all "
    "tasks again."
  )
  command = ctypes.create_string_buffer(f"echo {shlex.quote(line)} >&2".encode())
  timers = (
    _start_timer(library, library.system, ctypes.addressof(command), 60 * minutes),
    _start_timer(library, library._exit, LOST_TASK, 60 * minutes + 1),
  )
  try:
    yield
  finally:
    for timer in timers:
      library.timer_delete(timer)


def _start_timer(library: ctypes.CDLL, function, value: int, seconds: float) -> ctypes.c_void_p:
  """Has the C library call `function(value)` after so many seconds."""
  address = ctypes.cast(function, ctypes.c_void_p).value
  event = _SignalEvent(value=value, notify=_SIGEV_THREAD, function=address)
  timer = ctypes.c_void_p()
  if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
    raise OSError("timer_create failed")
  spec = _TimerSpec(seconds=int(seconds), nanoseconds=int(seconds % 1 * 1e9))
  library.timer_settime(timer, 0, ctypes.byref(spec), None)
  return timer
