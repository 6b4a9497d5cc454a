"""SIGTERM, SIGINT, SIGHUP: the first saves at the end of the step, a second ends at once."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from tf_largebatch import threads

# Slurm sends two SIGTERMs for one preemption, 0.1 s apart; a lost terminal and its shell send two
# SIGHUPs.
_SENT_TWICE = (signal.SIGTERM, signal.SIGHUP)
_SAME_REQUEST_SECONDS = 2.0
_POLL_SECONDS = 0.05
_CLEAN_UP_SECONDS = 10.0

_clean_ups: list[Callable[[], object]] = []
_ending = threading.RLock()


def stop_signals() -> tuple[int, ...]:
  """Returns the signals that request a stop; SIGHUP (a lost terminal) only without `nohup`."""
  signals = (signal.SIGTERM, signal.SIGINT)
  # A blocked signal arrives even if it is ignored, as `nohup` wants it to be.
  ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  return signals if ignored else (*signals, signal.SIGHUP)


def next_signal(signals: tuple[int, ...], seconds: float) -> int | None:
  """Waits for one of `signals`, which must be blocked; returns None after `seconds` without one.

  It polls because CPython's `signal.sigtimedwait` returns uninitialised memory, as if it were a
  signal, when a suspension (SIGSTOP) outlasts its timeout.
  """
  deadline = time.monotonic() + seconds
  while True:
    found = signal.sigtimedwait(signals, 0)
    if found:
      return found.si_signo
    left = deadline - time.monotonic()
    if left <= 0:
      return None
    time.sleep(min(left, _POLL_SECONDS))


class StopRequest:
  """Whether a signal has requested this process to stop.

  A separate thread receives the signals: Python's own handlers run only when TensorFlow returns to
  the interpreter, which takes a step, or forever in a collective that waits for a lost task.

  Attributes:
    signal: number of the signal that requested the stop; None if there was none.
  """

  def __init__(self):
    self.signal: int | None = None
    self._deferring = False
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def watch_signals(self):
    """Receives `stop_signals()` inside the context; call it in the main thread.

    Enter it before importing TensorFlow: threads that already exist do not inherit the signal mask
    and would receive the signals. Outside `deferring_signals` a signal ends the process at once,
    which loses nothing.
    """
    signals = stop_signals()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
      with threads.running(self._take_signals, signals):
        yield self
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)

  @contextlib.contextmanager
  def deferring_signals(self):
    """Makes a first signal only set `signal` inside the context; the program must check it."""
    with self._lock:
      self._deferring = True
    try:
      yield
    finally:
      with self._lock:
        self._deferring = False

  def _take_signals(self, signals: tuple[int, ...], ended: threading.Event):
    requested = -math.inf
    while not ended.is_set():
      number = next_signal(signals, 0.2)
      if number is None:
        continue
      name = signal.Signals(number).name
      with self._lock:
        if self._deferring and self.signal is None:
          self.signal, requested = number, time.monotonic()
          print_line(f"{name}: saving at the end of this step; a second signal ends the run now.")
          continue
        repeated = self._deferring and self.signal == number in _SENT_TWICE
        if repeated and time.monotonic() - requested < _SAME_REQUEST_SECONDS:
          continue
      print_line(f"error: Ended at once by {name}.")
      end_process(128 + number)


@contextlib.contextmanager
def cleaning_up(clean_up: Callable[[], object]):
  """Has `end_process` call `clean_up`, for a few seconds at most, inside the context.

  Once the process is ending, the context is never left, so errors that the clean-up causes in the
  main thread are not reported.
  """
  _clean_ups.append(clean_up)
  try:
    yield
  finally:
    with _ending:
      _clean_ups.remove(clean_up)


def end_process(status: int):
  """Exits without the interpreter's clean-up, which may wait for tasks that no longer exist."""
  with _ending:
    for clean_up in _clean_ups:
      thread = threading.Thread(target=clean_up, daemon=True)
      thread.start()
      thread.join(_CLEAN_UP_SECONDS)
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(status)


def print_line(text: str, to_stdout: bool = False):
  """Prints a line; drops it if it cannot be written (a closed terminal or pipe, a full disk)."""
  stream = sys.stdout if to_stdout else sys.stderr
  try:
    with contextlib.suppress(AttributeError):  # Not a text file, as in some notebooks.
      stream.reconfigure(errors="backslashreplace")  # Its encoding may be ASCII.
    print(text, file=stream, flush=True)
  except BrokenPipeError:
    # Without this the interpreter fails to flush the stream at exit and changes the exit status.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  except (OSError, ValueError):
    pass
