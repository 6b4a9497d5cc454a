"""Signals in real processes whose main thread is deep in C, as in a collective."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT, suspend
from tf_largebatch.signals import StopRequest

# The main thread is in the C library for good, but for the GIL that ctypes lets go.
PROGRAM = """
import ctypes, sys
from tf_largebatch.signals import StopRequest
stop = StopRequest()
with stop.watch_signals():
  if sys.argv[1] == "honoured":
    with stop.honoured():
      print("in", flush=True)
      ctypes.CDLL(None).sigsuspend(ctypes.create_string_buffer(b"\\xff" * 128))
  elif sys.argv[1] == "polls":
    with stop.honoured():
      print("in", flush=True)
      while stop.signal is None:
        pass
    print("saved after", stop.signal, flush=True)
  with stop.honoured():
    pass
  print("in", flush=True)
  ctypes.CDLL(None).sigsuspend(ctypes.create_string_buffer(b"\\xff" * 128))
"""


@contextlib.contextmanager
def program(mode):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, mode],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "in\n"
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_and_after_training_it_ends_at_once(number):
  with program("outside") as process:
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number
    assert process.stderr.read() == f"error: Ended at once by {number.name}.\n"


def test_asked_twice_it_ends_at_once_although_the_main_thread_hangs():
  with program("honoured") as process:
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: saving at the end of this step")
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_two_sigterms_at_once_are_one_request():
  """As Slurm sends them when a job is preempted."""
  with program("honoured") as process:
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving at the end of this step")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=2.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_asked_once_the_program_hears_of_it():
  with program("polls") as process:
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saved after 15\n"
    assert process.stdout.readline() == "in\n" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_nobody_left_to_read_what_it_says_it_still_ends():
  for mode, signals in (("outside", 1), ("honoured", 2)):
    with program(mode) as process:
      process.stderr.close()  # As tee does, which dies of Ctrl-C first.
      for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
      assert process.wait(timeout=5) == 130


def test_suspended_and_resumed_it_still_hears_and_hears_nothing_twice():
  with program("honoured") as process:
    suspend(process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving at the end of this step")
    time.sleep(2.1)  # A second SIGTERM would end it now.
    suspend(process)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_the_signals_are_given_back():
  with StopRequest().watch_signals():
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGTERM, signal.SIGINT}
  assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
  with pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
