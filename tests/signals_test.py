"""`StopRequest` in real processes whose main thread is inside C code, as in a collective."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT, suspend
from tf_largebatch.signals import StopRequest

# The main thread never returns from the C library; ctypes releases the GIL meanwhile.
PROGRAM = """
import ctypes, sys
from tf_largebatch.signals import StopRequest
stop = StopRequest()
with stop.watch_signals():
  if sys.argv[1] == "deferring":
    with stop.deferring_signals():
      print("ready", flush=True)
      ctypes.CDLL(None).sigsuspend(ctypes.create_string_buffer(b"\\xff" * 128))
  elif sys.argv[1] == "polls":
    with stop.deferring_signals():
      print("ready", flush=True)
      while stop.signal is None:
        pass
    print("saved after", stop.signal, flush=True)
  with stop.deferring_signals():
    pass
  print("ready", flush=True)
  ctypes.CDLL(None).sigsuspend(ctypes.create_string_buffer(b"\\xff" * 128))
"""


@contextlib.contextmanager
def program(mode, source=PROGRAM):
  process = subprocess.Popen(
    [sys.executable, "-c", source, mode],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "ready\n"
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_outside_training_ends_the_process_at_once(number):
  with program("outside") as process:
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number
    assert process.stderr.read() == f"error: Ended at once by {number.name}.\n"


def test_a_second_signal_ends_the_process_although_the_main_thread_hangs():
  with program("deferring") as process:
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: saving at the end of this step")
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_two_signals_in_quick_succession_are_one_request(number):
  """Slurm sends two when it preempts a job; a lost terminal and its shell each send one."""
  with program("deferring") as process:
    process.send_signal(number)
    assert process.stderr.readline().startswith(f"{number.name}: saving at the end of this step")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=2.5)
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number


def test_under_nohup_sighup_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
  try:
    with program("polls") as process:
      process.send_signal(signal.SIGHUP)
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
      process.send_signal(signal.SIGTERM)
      assert process.stdout.readline() == "saved after 15\n"
  finally:
    signal.signal(signal.SIGHUP, before)


def test_the_program_can_poll_for_the_first_signal():
  with program("polls") as process:
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saved after 15\n"
    assert process.stdout.readline() == "ready\n" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_it_ends_although_its_output_is_closed():
  for mode, signals in (("outside", 1), ("deferring", 2)):
    with program(mode) as process:
      process.stderr.close()  # As tee does when Ctrl-C ends it first.
      for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
      assert process.wait(timeout=5) == 130


def test_a_suspension_neither_loses_nor_repeats_a_signal():
  with program("deferring") as process:
    suspend(process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving at the end of this step")
    time.sleep(2.1)  # A second SIGTERM would end it now.
    suspend(process)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


def test_the_signal_mask_is_restored():
  with StopRequest().watch_signals():
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGTERM, signal.SIGINT}
  assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
  with pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)


CLEAN_UP = """
import signal, sys, time
from tf_largebatch import signals
stop = signals.StopRequest()
with stop.watch_signals():
  gone = []
  def clean_up():
    gone.append(True)
    time.sleep(1)
    print("cleaned up", flush=True)
    time.sleep(30 if sys.argv[1] == "hangs" else 0)
  signals._CLEAN_UP_SECONDS = 2
  try:
    with signals.cleaning_up(clean_up):
      print("ready", flush=True)
      while not gone:
        time.sleep(0.01)
      raise OSError("the directory vanished")
  finally:
    print("left the context", flush=True)
"""


@pytest.mark.parametrize("mode", ["ends", "hangs"])
def test_a_clean_up_runs_first_and_the_errors_that_it_causes_are_not_reported(mode):
  with program(mode, CLEAN_UP) as process:
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stdout.read() == "cleaned up\n"
    assert process.stderr.read() == "error: Ended at once by SIGINT.\n"
