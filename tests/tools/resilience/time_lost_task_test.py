"""Tests of `tools.resilience.time_lost_task`: what it judges, and a real turn of two faults."""

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT
from tf_largebatch.errors import UserError
from tools.resilience import time_lost_task
from tools.resilience.time_lost_task import Survivor, Turn

_LINE = (
  "error: Lost {}, which ended or cannot be reached; the last finished step is {}. "
  "The same command on all tasks goes on from the newest checkpoint."
)
_ONE = "task 1 (b:2)"


@pytest.mark.parametrize(
  "line, expected",
  [
    (_LINE.format(_ONE, 20), ({1: "b:2"}, 20)),
    (_LINE.format("task 1 (b:2) and task 12 ([::1]:3)", 0), ({1: "b:2", 12: "[::1]:3"}, 0)),
    (_LINE.format("task x (b:2)", 20), None),
    (_LINE.format(_ONE, 20).removeprefix("error: "), None),
    (_LINE.format(_ONE, 20).partition(". The")[0], None),
    ("error: Lost task 1 (b:2), which ended or cannot be reached; training had not begun.", None),
    ("", None),
  ],
)
def test_reads_what_a_survivor_says(line, expected):
  assert time_lost_task.lost_in(line) == expected


@pytest.mark.parametrize(
  "survivor, named, problems",
  [
    (Survivor(0, 1.0, 138, _LINE.format(_ONE, 20)), True, []),
    # The chief alone writes metrics.jsonl; another may be a step ahead of it, or behind.
    (Survivor(0, 1.0, 138, _LINE.format(_ONE, 21)), True, ["says that step 21 was the last"]),
    (Survivor(2, 1.0, 138, _LINE.format(_ONE, 21)), True, []),
    (Survivor(2, 1.0, 138, _LINE.format(_ONE, 18)), True, ["says that step 18 was the last"]),
    (Survivor(0, 1.0, 1, _LINE.format(_ONE, 20)), True, ["ended with status 1, not 138"]),
    (Survivor(0, 1.0, -6, "Aborted"), False, ["status -6", "named no lost task"]),
    (Survivor(0, None, None, ""), False, ["did not end in 60 s", "named no lost task"]),
    (Survivor(0, 1.0, 138, _LINE.format("task 2 (c:3)", 20)), False, ["named no lost task"]),
    (Survivor(0, 1.0, 138, _LINE.format("task 1 (c:3)", 20)), False, ["named no lost task"]),
    (
      Survivor(0, 1.0, 138, _LINE.format("task 1 (b:2) and task 2 (c:3)", 20)),
      False,
      ["named no lost task"],
    ),
  ],
)
def test_judges_a_survivor(survivor, named, problems):
  time_lost_task.judge(survivor, {1: "b:2"}, 60.0, last_step=20)
  assert survivor.named == named
  assert len(survivor.problems) == len(problems)
  for told, problem in zip(survivor.problems, problems, strict=True):
    assert problem in told


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
  assert time_lost_task.last_step_in(tmp_path) == 0
  lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "st')
  assert time_lost_task.last_step_in(tmp_path) == 2


def test_summarises_by_fault():
  ended = [Survivor(1, seconds, 138, "", named=True) for seconds in (1.0, 2.0, 9.0)]
  turns = [Turn("stop", 0, 5, ended[:1]), Turn("kill", 0, 5, ended[1:]), Turn("stop", 1, 5, [])]
  stop, kill = time_lost_task.summarise(turns)
  assert stop == {
    "fault": "stop", "turns": 2, "survivors": 1, "median": 1.0, "worst": 1.0, "named": 1
  }  # fmt: skip
  assert (kill["turns"], kill["median"], kill["worst"], kill["named"]) == (1, 5.5, 9.0, 2)
  (hung,) = time_lost_task.summarise([Turn("cut", 0, 5, [*ended, Survivor(0, None, None, "")])])
  assert hung["worst"] == math.inf and hung["named"] == 3
  (none,) = time_lost_task.summarise([Turn("kill", 0, problems=["did not start"])])
  assert none["survivors"] == 0 and math.isnan(none["worst"])


def _tool(*arguments, path=None):
  return subprocess.Popen(
    [sys.executable, "-m", "tools.resilience.time_lost_task", *arguments],
    cwd=ROOT,
    env={**os.environ, **({"PATH": str(path)} if path else {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["--faults=fire"], "error: --faults=fire: expected one or more of kill, stop, cut"),
    (["--json=/nonexistent/a"], "error: --json=/nonexistent/a cannot be written (No such file or"),
    (["extra"], "error: Unexpected argument 'extra'"),
  ],
)
def test_bad_input_is_one_line(arguments, line):
  tool = _tool(*arguments)
  stdout, stderr = tool.communicate(timeout=30)
  assert (tool.returncode, stdout) == (1, "")
  assert stderr.startswith(line) and stderr.count("\n") == 1


def test_cut_without_the_programs_is_refused_at_once(tmp_path):
  (tmp_path / "setpriv").write_text("#!/bin/false\n")
  (tmp_path / "setpriv").chmod(0o755)
  tool = _tool(path=tmp_path)
  stdout, stderr = tool.communicate(timeout=30)
  assert (tool.returncode, stdout) == (1, "")
  assert stderr.startswith("error: --faults=cut needs ip, unshare, nsenter (iproute2, util-linux)")
  assert stderr.count("\n") == 1


def _cables(num_tasks=2):
  """Namespaces, or a skipped test where they cannot be made."""
  context = time_lost_task.cables(num_tasks)
  try:
    return context, context.__enter__()
  except UserError as error:
    pytest.skip(str(error))


def _namespaces(pids=None):
  """The network namespaces of these processes, or of all."""
  found = set()
  for pid in pids or [path.name for path in pathlib.Path("/proc").glob("[0-9]*")]:
    with contextlib.suppress(OSError):  # It ended meanwhile.
      found.add(os.readlink(f"/proc/{pid}/ns/net"))
  return found


# Sends a byte a moment each way until it is told to end; tells how many came, and any error.
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
  context, (addresses, inside, cut) = _cables()
  hosts = [address.partition(":")[0] for address in addresses]
  talkers = [
    subprocess.Popen(
      [*prefix, sys.executable, "-c", _TALK, *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for prefix, arguments in zip(inside, (hosts, hosts[::-1]), strict=True)
  ]
  try:
    for talker in talkers:
      lines = [talker.stdout.readline() for _ in range(10)]
      assert any(line == "1 1\n" for line in lines), lines
    # Not before: a talker is in its namespace only once its prefix has run.
    made = _namespaces([talker.pid for talker in talkers]) - _namespaces(["self"])
    cut(1)
    time.sleep(1.0)
    for talker in talkers:
      talker.kill()  # It still sends: neither end was told anything.
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


@pytest.mark.parametrize("fault, victim", [("kill", 0), ("cut", 1)])
def test_a_real_turn(fault, victim):
  if fault == "cut":
    _cables()[0].__exit__(None, None, None)
  turn = time_lost_task.time_turn(fault, victim, first_step=3)
  assert turn.problems == []
  assert [survivor.rank for survivor in turn.survivors] == ([0, 1] if fault == "cut" else [1])
  for survivor in turn.survivors:
    assert survivor.problems == []
    assert survivor.named and survivor.status == 138 and survivor.seconds < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_behind(number):
  faults = "cut"
  try:
    with time_lost_task.cables(1):
      pass
  except UserError:
    faults = "kill"  # No namespaces here, but processes.
  tool = _tool(f"--faults={faults}")
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
