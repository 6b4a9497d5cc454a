"""SIGTERM and SIGINT as a request: save at the end of this step, then end; asked twice, at once."""

import contextlib
import math
import os
import signal
import sys
import threading
import time

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SI_TKILL = -6  # Linux' code of a signal to one thread.
# Slurm tells of one preemption by two SIGTERMs, a tenth of a second apart.
_SAME_REQUEST_SECONDS = 2.0


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    thread = threading.Thread(target=self._take_signals, daemon=True)
    thread.start()
    try:
      yield self
    finally:
      signal.pthread_kill(thread.ident, signal.SIGTERM)
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

  def _take_signals(self):
    asked = -math.inf
    while True:
      # Not sigtimedwait: a SIGSTOP that outlasts its time has CPython's return what was in memory.
      found = signal.sigwaitinfo(_SIGNALS)
      if (found.si_code, found.si_pid) == (_SI_TKILL, os.getpid()):
        return  # From `watch_signals`, to this thread alone.
      number, name = found.si_signo, signal.Signals(found.si_signo).name
      with self._lock:
        if self._saving_helps and self.signal is None:
          self.signal, asked = number, time.monotonic()
          _tell(f"{name}: saving at the end of this step; asked once more, the run ends at once.")
          continue
        repeated = self._saving_helps and self.signal == number == signal.SIGTERM
        if repeated and time.monotonic() - asked < _SAME_REQUEST_SECONDS:
          continue
      _tell(f"error: Ended at once by {name}.")
      end_process(128 + number)


def end_process(status: int):
  """Ends the process without its clean-up, which may wait for tasks that are no longer there."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)


def _tell(line: str):
  print(line, file=sys.stderr, flush=True)
