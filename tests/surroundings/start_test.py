"""How a run starts and is left alone: foreign settings, closed streams, noise, a lost terminal."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time

import pytest

from tests.launching import ROOT, SMALL, run_module

_RUN = (*SMALL, "--workers=2", "--epochs=1")
_HOSTILE = {
  "KERAS_BACKEND": "torch",
  "TF_USE_LEGACY_KERAS": "1",
  "TF2_BEHAVIOR": "0",
  "KERAS_MAX_EPOCHS": "x",
  "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": "1",
  "TF_FUNCTION_JIT_COMPILE_DEFAULT": "true",
  "TF_SET_ONEDNN_FPMATH_MODE": "BF16",
}
_OURS = re.compile(
  r"[IW]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ "
  r"(reporting|trainer|workers_per_pass|metrics|finishing)\.py:\d+\] "
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """An undisturbed run: its finished process and weights_sha256."""
  work_dir = tmp_path_factory.mktemp("plain") / "run"
  env = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "KERAS"))}
  finished = run_module("tf_largebatch.train", *_RUN, f"--work_dir={work_dir}", env=env)
  assert finished.returncode == 0, finished.stderr
  return finished, json.loads((work_dir / "result.json").read_text())["weights_sha256"]


def test_the_terminal_shows_only_the_runs_own_lines(plain):
  lines = plain[0].stderr.splitlines()
  assert len(lines) > 5
  assert [line for line in lines if not _OURS.match(line)] == []


def test_foreign_settings_do_not_change_what_is_computed(plain, tmp_path):
  (tmp_path / "keras.json").write_text(
    '{"image_data_format": "channels_first", "floatx": "float64", "epsilon": 0.5, "backend": "jax"}'
  )
  env = {**os.environ, **_HOSTILE, "KERAS_HOME": str(tmp_path)}
  finished = run_module("tf_largebatch.train", *_RUN, f"--work_dir={tmp_path / 'run'}", env=env)
  assert finished.returncode == 0, finished.stderr
  for name, value in _HOSTILE.items():
    assert f"{name}={value}" in finished.stderr
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["weights_sha256"] == plain[1]


def test_all_standard_streams_are_closed(plain, tmp_path):
  command = [sys.executable, "-m", "tf_largebatch.train", *_RUN, f"--work_dir={tmp_path / 'run'}"]
  closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
  assert subprocess.run(closed, cwd=ROOT, timeout=120, check=False).returncode == 0
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["weights_sha256"] == plain[1]


@contextlib.contextmanager
def _in_a_terminal(command):
  """Runs a command in a terminal of its own; yields (process id, the terminal's other end)."""
  master, slave = os.openpty()
  pid = os.fork()
  if pid == 0:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # So that it gets SIGHUP when the terminal closes.
    for number in range(3):
      os.dup2(slave, number)
    os.close(master)
    os.chdir(ROOT)
    os.execv(command[0], command)
  os.close(slave)
  try:
    yield pid, master
  finally:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)


def test_a_lost_terminal_saves_the_run(tmp_path):
  command = [sys.executable, "-m", "tf_largebatch.train", *SMALL, "--workers=2"]
  command += ["--epochs=100000", f"--work_dir={tmp_path}"]
  with _in_a_terminal(command) as (pid, terminal):
    shown, deadline = b"", time.monotonic() + 60
    while b"epoch 2:" not in shown and time.monotonic() < deadline:
      shown += os.read(terminal, 4096)
    os.close(terminal)
    status = None
    while status is None and time.monotonic() < deadline + 30:
      done, code = os.waitpid(pid, os.WNOHANG)
      status = os.waitstatus_to_exitcode(code) if done else None
      time.sleep(0.05)
  assert status == 128 + signal.SIGHUP
  last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
  assert (tmp_path / "checkpoints" / f"step-{last:010d}.json").exists()
