"""Processes that measure: what they exchange with the benchmark, and that none outlives it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.launching import ROOT
from tf_largebatch.errors import UserError
from tools.benchmark import harness


def echo():
  for message in harness.messages():
    if "error" in message:
      print("not a report", flush=True)
    harness.report({**message, "variable": os.environ["VARIABLE"], "tmpdir": os.environ["TMPDIR"]})


def leave_a_child():
  """Fails, and leaves a child that holds the pipe to the benchmark open."""
  next(harness.messages())
  subprocess.Popen(["sleep", "100"])
  print("\n".join(f"line {number}" for number in range(100)), file=sys.stderr, flush=True)
  os._exit(3)


def never_report():
  subprocess.Popen(["sleep", "100"])
  for _ in harness.messages():
    pass


def children():
  return psutil.Process().children(recursive=True)


def test_messages_and_reports(tmp_path):
  with harness.Process("echo", echo, str(tmp_path), {"VARIABLE": "a value"}) as process:
    for number in range(2):
      process.send({"number": number})
      expected = {"number": number, "variable": "a value", "tmpdir": str(tmp_path)}
      assert process.receive(60) == expected
    process.send({"error": "what is wrong"})
    with pytest.raises(UserError, match=r"^what is wrong$"):
      process.receive(60)
  assert children() == []


def test_a_failed_process(tmp_path, capfd):
  with harness.Process("the name", leave_a_child, str(tmp_path), {}) as process:
    process.send({})
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^the name failed with status 3\.$"):
      process.receive(60)
    assert time.monotonic() - began < 50
    process.send({})  # To a process that is gone.
  assert children() == []
  assert capfd.readouterr().err.splitlines() == [f"line {number}" for number in range(60, 100)]


def test_a_process_that_does_not_report(tmp_path):
  with harness.Process("the name", never_report, str(tmp_path), {}) as process:
    with pytest.raises(UserError, match=r"^the name did not report within 1 s\.$"):
      process.receive(1)
    assert children() == []


def wait_for_a_report(scratch):
  harness.exit_on_sigterm()
  with harness.Process("the name", never_report, scratch, {}) as process:
    process.receive(100)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_benchmark(tmp_path, stop):
  code = f"from {__name__} import wait_for_a_report; wait_for_a_report({str(tmp_path)!r})"
  benchmark = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
  try:
    started = []
    deadline = time.monotonic() + 60
    while len(started) < 2:
      assert time.monotonic() < deadline and benchmark.poll() is None
      started = psutil.Process(benchmark.pid).children(recursive=True)
      time.sleep(0.05)
    benchmark.send_signal(stop)
    benchmark.wait(20)
  finally:
    benchmark.kill()
  psutil.wait_procs(started, timeout=10)
  left = [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
  assert left == []


def test_each_repeat_starts_one_item_later():
  found = list(harness.rotate("abc", 4))
  assert found == [
    (repeat, item) for repeat, each in enumerate(("abc", "bca", "cab", "abc")) for item in each
  ]
