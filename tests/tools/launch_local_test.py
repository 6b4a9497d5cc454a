"""Tests of `tools.launch_local` with a tiny module in place of the trainer."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import ROOT, run_module, suspend
from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.machine import usable_cores


@contextlib.contextmanager
def _launch(tmp_path, program, *arguments, tasks=2, launcher_flags=(), **environ):
  """Starts `program`, which can read its `rank`, as tasks; yields the launcher's process."""
  (tmp_path / "tiny.py").write_text(
    "import json, os, signal, subprocess, sys, time\n"
    "rank = json.loads(os.environ['TF_CONFIG'])['task']['index']\n" + program
  )
  path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
  command = [sys.executable, "-m", "tools.launch_local", f"--tasks={tasks}", "--module=tiny"]
  inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
  launcher = subprocess.Popen(
    [*command, *launcher_flags, "--", *arguments],
    cwd=ROOT,
    env={**inherited, "PYTHONPATH": path, **environ},
    stdin=subprocess.PIPE,  # Stays open: a task that inherited it would wait for input.
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    yield launcher
  finally:
    launcher.kill()
    launcher.wait()
    launcher.stdin.close()
    launcher.stdout.close()
    launcher.stderr.close()


def _read_pids(launcher, count):
  """Reads `count` lines that end with a process id, while the processes run."""
  return [int(launcher.stdout.readline().split()[-1]) for _ in range(count)]


def _wait_until_gone(pids, seconds=10.0):
  """Waits until none of the processes runs; ignores zombies that init has not reaped yet."""

  def runs(pid):
    try:
      return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
      return False

  deadline = time.monotonic() + seconds
  while left := [pid for pid in pids if runs(pid)]:
    if time.monotonic() > deadline:
      for pid in left:
        os.kill(pid, signal.SIGKILL)
      pytest.fail(f"{len(left)} of {len(pids)} processes still ran")
    time.sleep(0.02)


def test_prefixes_every_line_whole_and_in_order(tmp_path):
  program = """
for i in range(100):
  for part in ("x" * 50, str(rank), f" {i}\\n"):
    (sys.stdout if i % 2 else sys.stderr).write(part)
sys.stdout.write("1%\\r2%\\rlast")
"""
  with _launch(tmp_path, program, tasks=3) as launcher:
    stdout, stderr = launcher.communicate(timeout=30)
  assert (launcher.returncode, stderr) == (0, "")
  lines = stdout.splitlines()
  assert len(lines) == 3 * 103
  for rank in range(3):
    own = [line for line in lines if line.startswith(f"[task {rank}] ")]
    expected = [f"{'x' * 50}{rank} {i}" for i in range(100)] + ["1%", "2%", "last"]
    assert own == [f"[task {rank}] {line}" for line in expected]


def test_each_task_gets_its_rank_its_flags_and_its_cores(tmp_path):
  program = """
names = ("TF_CONFIG", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
print(json.dumps([sys.argv[1:], *(os.environ[name] for name in names)]))
"""
  environ = {"TF_NUM_INTRAOP_THREADS": "7", "TF_CONFIG": "of another run"}
  with _launch(tmp_path, program, "--a=1", "--b", "c d", tasks=3, **environ) as launcher:
    stdout, stderr = launcher.communicate(timeout=30)
  assert (launcher.returncode, stderr) == (0, "")
  clusters = {}
  for line in stdout.splitlines():
    rank, text = re.fullmatch(r"\[task (\d)\] (.*)", line).groups()
    arguments, tf_config, intra, inter, openmp = json.loads(text)
    clusters[int(rank)] = read_cluster({"TF_CONFIG": tf_config})
    assert set(json.loads(tf_config)["cluster"]) == {"worker"}
    assert arguments == ["--a=1", "--b", "c d"]
    share = usable_cores() // 3
    assert (intra, inter, openmp) == ("7", str(max(2, share)), str(max(1, share)))
  assert sorted(clusters) == [0, 1, 2]
  for rank, cluster in clusters.items():
    assert cluster.task_index == rank
    assert cluster.tasks == clusters[0].tasks
  assert len(set(clusters[0].tasks)) == 3
  assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in clusters[0].tasks)


@pytest.mark.parametrize(
  "end, status, how",
  [
    ("sys.exit(3)", 3, "status 3"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "signal 9"),
  ],
)
def test_a_failed_task_ends_the_others(tmp_path, end, status, how):
  program = f"""
print(os.getpid())
if rank == 1:
  sys.stdin.read(1)  # Returns at once: the tasks' stdin is empty.
  time.sleep(0.5)
  {end}
time.sleep(60)
"""
  with _launch(tmp_path, program, tasks=3) as launcher:
    pids = _read_pids(launcher, 3)
    start = time.monotonic()
    launcher.wait(timeout=30)
    assert time.monotonic() - start < 4  # SIGTERM ended them before the grace period did.
    stderr = launcher.stderr.read()
  assert launcher.returncode == status
  assert stderr == f"error: task 1 ended with {how}; ending the others\n"
  _wait_until_gone(pids, seconds=0)


def test_a_task_that_ignores_sigterm_is_killed_and_so_are_its_children(tmp_path):
  program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "60"]).pid)
print(os.getpid())
if rank == 0:
  time.sleep(0.5)
  sys.exit(5)
time.sleep(60)
"""
  with _launch(tmp_path, program, launcher_flags=["--grace_seconds=2"]) as launcher:
    pids = _read_pids(launcher, 4)
    launcher.wait(timeout=30)
  assert launcher.returncode == 5
  _wait_until_gone(pids, seconds=1)


@pytest.mark.parametrize(
  "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_launcher_ends_the_tasks(tmp_path, number, status):
  # The launcher blocks the signals; the tasks must not inherit that.
  program = """
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
print(os.getpid())
time.sleep(60)
"""
  with _launch(tmp_path, program) as launcher:
    pids = _read_pids(launcher, 2)
    launcher.send_signal(number)
    start = time.monotonic()
    launcher.wait(timeout=30)
    assert time.monotonic() - start < 4
  assert launcher.returncode == status
  _wait_until_gone(pids, seconds=0)


_FAILS_TWICE = """
starts = pathlib.Path(sys.argv[1]) / "starts"
if rank == 1:
  with starts.open("a") as file:
    file.write("x")
  if starts.stat().st_size < 3:
    os.kill(os.getpid(), signal.SIGKILL)
# Only rank 1 counts the starts: the launcher may end rank 0 before it gets here.
while not starts.exists() or starts.stat().st_size < 3:
  time.sleep(0.05)
"""


@pytest.mark.parametrize("restarts, status, starts", [(2, 0, 3), (1, 137, 2), (0, 137, 1)])
def test_all_tasks_start_again_after_one_failed(tmp_path, restarts, status, starts):
  flags = [f"--max_restarts={restarts}"]
  program = "import pathlib" + _FAILS_TWICE
  with _launch(tmp_path, program, str(tmp_path), launcher_flags=flags) as launcher:
    begun = time.monotonic()
    _, stderr = launcher.communicate(timeout=30)
    assert time.monotonic() - begun > sum(2**i for i in range(starts - 1))  # The pauses double.
  assert launcher.returncode == status
  assert (tmp_path / "starts").read_text() == "x" * starts
  assert stderr.count("ended with signal 9") == min(2, restarts + 1)
  assert stderr.count("Restart ") == starts - 1


@pytest.mark.parametrize("status", [1, 2])
def test_an_error_that_the_user_must_fix_is_not_restarted(tmp_path, status):
  program = f"print(os.getpid())\nsys.exit({status})"
  with _launch(tmp_path, program, tasks=1, launcher_flags=["--max_restarts=3"]) as launcher:
    stdout, stderr = launcher.communicate(timeout=30)
  assert launcher.returncode == status
  assert len(stdout.splitlines()) == 1 and "Restart" not in stderr


def test_a_stopped_task_gets_the_signal_and_a_second_one_is_forwarded(tmp_path):
  program = """
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
print(os.getpid())
while len(received) < 2:
  time.sleep(0.05)
"""
  with _launch(tmp_path, program) as launcher:
    pids = _read_pids(launcher, 2)
    os.kill(pids[0], signal.SIGSTOP)
    begun = time.monotonic()
    for _ in range(2):
      launcher.send_signal(signal.SIGTERM)
      time.sleep(0.5)
    launcher.wait(timeout=30)
    assert time.monotonic() - begun < 10
  assert launcher.returncode == 143
  _wait_until_gone(pids, seconds=0)


def test_no_task_ends_because_the_launcher_cannot_write_its_output(tmp_path):
  (tmp_path / "tiny.py").write_text(
    "import pathlib, sys\nfor _ in range(20000):\n  print('x' * 99)\nsys.stdout.flush()\n"
    "pathlib.Path(sys.argv[1]).touch()\n"
  )
  command = [sys.executable, "-m", "tools.launch_local", "--tasks=1", "--module=tiny", "--"]
  with open("/dev/full", "w") as full:
    subprocess.run(
      [*command, str(tmp_path / "done")],
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(tmp_path)},
      stdout=full,
      stderr=subprocess.DEVNULL,
      timeout=60,
      check=False,
    )
  assert (tmp_path / "done").exists()


def test_a_suspended_launcher_resumes(tmp_path):
  with _launch(tmp_path, "print(os.getpid())\ntime.sleep(60)") as launcher:
    pids = _read_pids(launcher, 2)
    suspend(launcher)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 143
    assert "Traceback" not in launcher.stderr.read()
  _wait_until_gone(pids, seconds=0)


def test_no_task_outlives_a_killed_launcher(tmp_path):
  # Tasks that ignore SIGTERM and do not notice the closed pipe.
  program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid())
time.sleep(60)
"""
  with _launch(tmp_path, program) as launcher:
    pids = _read_pids(launcher, 2)
    launcher.kill()
    _wait_until_gone(pids)


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--tasks=0", "--tasks=0: "),
    ("--tasks=-2", "--tasks=-2: "),
    ("--tasks=two", "flag --tasks=two: "),
    ("--module=no_such_module", "--module=no_such_module: "),
    ("--module=", "--module=: "),
    ("--seed=1", "Unknown command line flag 'seed'; flags of the tasks go after `--`"),
  ],
)
def test_refuses_bad_flags_in_one_line(flag, message):
  result = run_module("tools.launch_local", "--module=json.tool", flag, timeout=30)
  assert result.returncode == 1
  assert result.stdout == ""
  assert result.stderr.startswith(f"error: {message}")
  assert result.stderr.count("\n") == 1
