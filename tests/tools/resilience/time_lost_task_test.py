"""Tests of `time_lost_task`: what it judges, its network, and a real trial."""

import contextlib
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT, run_module
from tf_largebatch.errors import UserError
from tools.resilience import time_lost_task
from tools.resilience.network import isolated_network
from tools.resilience.time_lost_task import Survivor, Trial

_LINE = (
  "error: Lost {}, which ended or cannot be reached; the last finished step is {}. "
  "Run the same command on all tasks to resume from the newest checkpoint."
)
_ONE = "task 1 (b:2)"


@pytest.mark.parametrize(
  "line, expected",
  [
    (_LINE.format(_ONE, 20), ({1: "b:2"}, 20)),
    (_LINE.format("task 1 (b:2) and task 12 ([::1]:3)", 0), ({1: "b:2", 12: "[::1]:3"}, 0)),
    (_LINE.format("task x (b:2)", 20), None),
    (_LINE.format(_ONE, 20).removeprefix("error: "), None),
    (_LINE.format(_ONE, 20).partition(". Run")[0], None),
    ("error: Lost task 1 (b:2), which ended or cannot be reached; training had not begun.", None),
    ("", None),
  ],
)
def test_parses_the_report_of_a_survivor(line, expected):
  assert time_lost_task.parse_report(line) == expected


@pytest.mark.parametrize(
  "survivor, named, problems",
  [
    (Survivor(0, 1.0, 138, _LINE.format(_ONE, 20)), True, []),
    # Only the chief writes metrics.jsonl; other tasks may be one step ahead or behind.
    (Survivor(0, 1.0, 138, _LINE.format(_ONE, 21)), True, ["names step 21 as the last"]),
    (Survivor(2, 1.0, 138, _LINE.format(_ONE, 21)), True, []),
    (Survivor(2, 1.0, 138, _LINE.format(_ONE, 18)), True, ["names step 18 as the last"]),
    (Survivor(0, 1.0, 1, _LINE.format(_ONE, 20)), True, ["ended with status 1, not 138"]),
    (Survivor(0, 1.0, -6, "Aborted"), False, ["status -6", "did not name the lost"]),
    (Survivor(0, None, None, ""), False, ["did not end in 60 s", "did not name the lost"]),
    (
      Survivor(0, 1.0, 138, _LINE.format("task 2 (c:3)", 20)),
      False,
      ["did not name the lost"],
    ),
    (
      Survivor(0, 1.0, 138, _LINE.format("task 1 (c:3)", 20)),
      False,
      ["did not name the lost"],
    ),
    (
      Survivor(0, 1.0, 138, _LINE.format("task 1 (b:2) and task 2 (c:3)", 20)),
      False,
      ["did not name the lost"],
    ),
  ],
)
def test_judges_a_survivor(survivor, named, problems):
  time_lost_task.judge(survivor, {1: "b:2"}, 60.0, last_step=20)
  assert survivor.named == named
  assert len(survivor.problems) == len(problems)
  for found, expected in zip(survivor.problems, problems, strict=True):
    assert expected in found


def test_summarises_by_fault():
  ended = [Survivor(1, seconds, 138, "", named=True) for seconds in (1.0, 2.0, 9.0)]
  trials = [
    Trial("stop", 0, 5, ended[:1]),
    Trial("kill", 0, 5, ended[1:]),
    Trial("stop", 1, 5, []),
  ]
  stop, kill = time_lost_task.summarise(trials)
  assert stop == {
    "fault": "stop", "trials": 2, "survivors": 1, "median": 1.0, "worst": 1.0, "named": 1
  }  # fmt: skip
  assert (kill["trials"], kill["median"], kill["worst"], kill["named"]) == (1, 5.5, 9.0, 2)
  (hung,) = time_lost_task.summarise([Trial("cut", 0, 5, [*ended, Survivor(0, None, None, "")])])
  assert hung["worst"] == math.inf and hung["named"] == 3
  (none,) = time_lost_task.summarise([Trial("kill", 0, problems=["did not start"])])
  assert none["survivors"] == 0 and math.isnan(none["worst"])


_MODULE = "tools.resilience.time_lost_task"


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["--faults=fire"], "error: --faults=fire: expected one or more of kill, stop, cut"),
    (["--json=/nonexistent/a"], "error: --json=/nonexistent/a cannot be written; name a file"),
    (["extra"], "error: Unexpected argument 'extra'"),
  ],
)
def test_bad_input_is_one_line(arguments, line):
  finished = run_module(_MODULE, *arguments, timeout=30)
  assert (finished.returncode, finished.stdout) == (1, "")
  assert finished.stderr.startswith(line) and finished.stderr.count("\n") == 1


def test_cut_without_the_programs_is_refused_at_once(tmp_path):
  finished = run_module(_MODULE, env={**os.environ, "PATH": str(tmp_path)}, timeout=30)
  assert (finished.returncode, finished.stdout) == (1, "")
  expected = "error: A network between tasks needs ip, unshare, nsenter (iproute2, util-linux)"
  assert finished.stderr.startswith(expected) and finished.stderr.count("\n") == 1


def _enter_network(num_tasks=2):
  """Enters an isolated network; skips the test where it cannot be created."""
  context = isolated_network(num_tasks)
  try:
    return context, context.__enter__()
  except UserError as error:
    pytest.skip(str(error))


def _namespaces(pids=None):
  """Returns the network namespaces of these processes, or of all."""
  found = set()
  for pid in pids or [path.name for path in pathlib.Path("/proc").glob("[0-9]*")]:
    with contextlib.suppress(OSError):  # The process ended meanwhile.
      found.add(os.readlink(f"/proc/{pid}/ns/net"))
  return found


# Exchanges bytes with the other side and prints how many arrive, and the carrier; or "silence".
_TALK = """
import socket, sys, time
mine, other = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
  if mine < other:
    with socket.create_server((mine, 2222)) as server:
      talk, _ = server.accept()
  else:
    for _ in range(100):
      try:
        talk = socket.create_connection((other, 2222))
        break
      except ConnectionRefusedError:
        time.sleep(0.05)
  talk.settimeout(0.1)
  while True:
    talk.sendall(b".")
    try:
      print(len(talk.recv(4096)), open("/sys/class/net/eth0/carrier").read(), end="", flush=True)
      time.sleep(0.05)
    except TimeoutError:
      print("silence", flush=True)
"""


def test_a_cut_is_silent():
  context, network = _enter_network()
  hosts = [address.partition(":")[0] for address in network.addresses]
  talkers = [
    subprocess.Popen(
      [*prefix, sys.executable, "-c", _TALK, *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for prefix, arguments in zip(network.prefixes, (hosts, hosts[::-1]), strict=True)
  ]
  try:
    for talker in talkers:
      lines = [talker.stdout.readline() for _ in range(10)]
      assert any(line == "1 1\n" for line in lines), lines
    # Only now: a talker enters its namespace when its prefix has run.
    made = _namespaces([talker.pid for talker in talkers]) - _namespaces(["self"])
    network.disconnect(1)
    time.sleep(1.0)
    for talker in talkers:
      talker.kill()  # It still sends, because neither side was notified.
      *_, last = talker.stdout.read().splitlines()
      assert last == "silence"
      assert talker.wait() == -signal.SIGKILL
  finally:
    for talker in talkers:
      talker.kill()
      talker.wait()
      talker.stdout.close()
    context.__exit__(None, None, None)
  assert len(made) == 2 and not made & _namespaces()


def _permitted_fault():
  """A cut, or where namespaces cannot be created a kill, which needs the processes alone."""
  try:
    with isolated_network(1):
      return "cut"
  except UserError:
    return "kill"


def test_a_real_trial():
  """A silent task is noticed after the heartbeat timeout; TensorFlow's own is 10 s."""
  fault = _permitted_fault()
  victim = 1 if fault == "cut" else 0
  options = ("--heartbeat_timeout_seconds=2",)
  trial = time_lost_task.time_trial(fault, victim, first_step=3, options=options)
  assert trial.problems == []
  assert [survivor.rank for survivor in trial.survivors] == ([0, 1] if fault == "cut" else [1])
  for survivor in trial.survivors:
    assert survivor.problems == []
    assert survivor.named and survivor.status == 138 and survivor.seconds < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_behind(number):
  faults = _permitted_fault()
  tool = subprocess.Popen(
    [sys.executable, "-m", _MODULE, f"--faults={faults}"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    children = pathlib.Path(f"/proc/{tool.pid}/task/{tool.pid}/children")
    deadline, tasks = time.monotonic() + 30, []
    while len(tasks) < 2 and time.monotonic() < deadline:
      time.sleep(0.1)
      tasks = [pid for pid in children.read_text().split() if "train" in _command(pid)]
    assert len(tasks) == 2
    made = _namespaces(children.read_text().split()) - _namespaces(["self"])
    assert len(made) == (3 if faults == "cut" else 0)
    tool.send_signal(number)
    status = tool.wait(timeout=10)
    assert status == (143 if number == signal.SIGTERM else -9)
  finally:
    tool.kill()
    tool.communicate()
  deadline = time.monotonic() + 10
  while made & _namespaces() or any("train" in _command(pid) for pid in tasks):
    assert time.monotonic() < deadline
    time.sleep(0.1)


def _command(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
  except OSError:
    return ""
