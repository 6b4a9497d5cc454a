"""Runs what a benchmark measures in processes of its own, and takes turns between them.

A benchmark and each of its processes exchange JSON objects, one per line: messages go to the
process' stdin, reports come from its stdout.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tf_largebatch.errors import UserError

_Item = TypeVar("_Item")
_LOG_LINES = 40  # Printed of a process that failed; its threads may all have logged the error.


class Process:
  """A process that measures, in a process group of its own; used as a context manager.

  Nothing of the group is left when the context ends, or when this program does, even by SIGKILL.
  """

  def __init__(
    self,
    name: str,
    serve: Callable[[], None],
    scratch: str,
    environment: dict[str, str],
    prefix: Sequence[str] = (),
  ):
    """Starts the process.

    Args:
      name: of what it measures, for error messages.
      serve: what it runs, a function at the top level of a module; it iterates over `messages` and
        answers with `report`.
      scratch: directory for its log and its temporary files; several processes may share one.
      environment: variables that it gets in addition to this program's.
      prefix: a command that becomes the command after it, such as nsenter.
    """
    self._name, self._log = name, os.path.join(scratch, "log")
    program = f"from {serve.__module__} import {serve.__name__}; {serve.__name__}()"
    with open(self._log, "ab") as log:
      self._process = subprocess.Popen(
        [*prefix, sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "TMPDIR": scratch, **environment},
        start_new_session=True,
      )
    self._guard = threading.Thread(target=self._kill_orphans, daemon=True)
    self._guard.start()

  def __enter__(self) -> "Process":
    return self

  def __exit__(self, *_):
    self._end()
    self._process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # Of a message that was never read.
      self._process.stdin.close()

  def send(self, message: dict):
    with contextlib.suppress(BrokenPipeError):  # `receive` reports why.
      self._process.stdin.write(f"{json.dumps(message)}\n")
      self._process.stdin.flush()

  def receive(self, seconds: float) -> dict:
    """Waits for the process' next report.

    Raises:
      UserError: the process reported an error, failed, or did not report within `seconds`; in the
        last two cases the end of its log is printed.
    """
    expired = threading.Event()

    def expire():
      expired.set()
      self._kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
      for line in self._process.stdout:
        if line.startswith("{"):
          found = json.loads(line)
          if "error" in found:
            raise UserError(found["error"])
          return found
    finally:
      timer.cancel()
    status = self._end()
    with open(self._log, encoding="utf-8", errors="replace") as log:
      sys.stderr.writelines(log.readlines()[-_LOG_LINES:])
    if expired.is_set():
      raise UserError(f"{self._name} did not report within {seconds:.0f} s.")
    raise UserError(f"{self._name} failed with status {status}.")

  def _kill_orphans(self):
    """Kills what the process leaves behind when it ends, which also closes its end of the pipes."""
    # WNOWAIT keeps the process a zombie, so that its group's number is not reused before the kill.
    os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
    self._kill()

  def _kill(self):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)

  def _end(self) -> int:
    """Kills the group if it is still there; the process' exit status."""
    if self._process.returncode is None:
      self._kill()
      self._guard.join()
    return self._process.wait()


def messages() -> Iterator[dict]:
  """In a process that measures: iterates over the benchmark's messages, and ends with it."""
  received = queue.SimpleQueue()
  threading.Thread(target=_receive, args=(received,), daemon=True).start()
  while True:
    yield received.get()


def _receive(received: queue.SimpleQueue):
  # Not sys.stdin, which forked processes close and would wait for while this thread reads it.
  with open(0, "rb", closefd=False) as stream:
    for line in stream:
      received.put(json.loads(line))
  os.killpg(0, signal.SIGKILL)  # The benchmark ended, so this process and its children do too.


def report(found: dict):
  """In a process that measures: sends a report; the key "error" holds a message for the user."""
  print(f"\n{json.dumps(found)}", flush=True)


def rotate(items: Sequence[_Item], repeats: int) -> Iterator[tuple[int, _Item]]:
  """Iterates over (repeat, item); each repeat has every item once and starts one item later."""
  for repeat in range(repeats):
    first = repeat % len(items)
    for item in (*items[first:], *items[:first]):
      yield repeat, item


def exit_on_sigterm():
  """Makes SIGTERM raise SystemExit, so that contexts end and nothing is left behind."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
