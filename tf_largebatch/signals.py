"""SIGTERM and SIGINT as a request: save at the end of this step, then end; asked twice, at once."""

import contextlib
import math
import os
import signal
import sys
import threading
import time

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Slurm tells of one preemption by two SIGTERMs, a tenth of a second apart.
_SAME_REQUEST_SECONDS = 2.0
_POLL_SECONDS = 0.05


def next_signal(signals: tuple[int, ...], seconds: float) -> int | None:
  """The first of some blocked signals to come, or None where none does within so many seconds.

  `signal.sigtimedwait` with a time will not do: where a suspension (SIGSTOP) outlasts the time,
  CPython's returns whatever lay in its memory, as if it were a signal.
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
  """Whether this process was asked to end.

  A thread of its own takes the signals, for Python's handlers would wait until TensorFlow returns
  to the interpreter: a step's length, or for ever in a collective that misses a task.

  Attributes:
    signal: the number of the signal that asked; None while none has.
  """

  def __init__(self):
    self.signal: int | None = None
    self._saving_helps = False
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def watch_signals(self):
    """Takes SIGTERM and SIGINT while it is entered, in the main thread.

    Enter it before TensorFlow is imported: threads that exist already would get the signals first.
    Until `honoured` is entered, and again after it, nothing is lost by ending at once.
    """
    ended = threading.Event()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    thread = threading.Thread(target=self._take_signals, args=(ended,), daemon=True)
    thread.start()
    try:
      yield self
    finally:
      ended.set()
      thread.join()
      signal.pthread_sigmask(signal.SIG_SETMASK, before)

  @contextlib.contextmanager
  def honoured(self):
    """While it is entered, a first signal sets `signal`, and the program must look at it."""
    with self._lock:
      self._saving_helps = True
    try:
      yield
    finally:
      with self._lock:
        self._saving_helps = False

  def _take_signals(self, ended: threading.Event):
    asked = -math.inf
    while not ended.is_set():
      number = next_signal(_SIGNALS, 0.2)
      if number is None:
        continue
      name = signal.Signals(number).name
      with self._lock:
        if self._saving_helps and self.signal is None:
          self.signal, asked = number, time.monotonic()
          tell(f"{name}: saving at the end of this step; asked once more, the run ends at once.")
          continue
        repeated = self._saving_helps and self.signal == number == signal.SIGTERM
        if repeated and time.monotonic() - asked < _SAME_REQUEST_SECONDS:
          continue
      tell(f"error: Ended at once by {name}.")
      end_process(128 + number)


def end_process(status: int):
  """Ends the process without its clean-up, which may wait for tasks that are no longer there."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)


def tell(text: str, to_stdout: bool = False):
  """Prints a line, or does without where it cannot be: a closed terminal or pipe, a full disk."""
  stream = sys.stdout if to_stdout else sys.stderr
  try:
    print(text, file=stream, flush=True)
  except BrokenPipeError:
    # For good, and the interpreter would end with a status of its own for what was not written.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  except (OSError, ValueError):
    pass
