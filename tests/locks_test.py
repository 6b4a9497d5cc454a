"""Locks between real processes, with the kinds of lock that a file system may lack."""

import contextlib
import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.launching import ROOT
from tf_largebatch import locks

_KINDS = ("flock", "record", "lease")

# Holds the lock until its standard input ends.
_HOLDER = """
import sys
from tests import locks_test
from tf_largebatch import locks
locks_test.leave(sys.argv[2], setattr)
with locks.exclusive(sys.argv[1]):
  print("holds", flush=True)
  sys.stdin.read()
"""


def leave(kind, patch, number=errno.ENOSYS):
  """Leaves a file system's locks of one kind, by answering `number` to those before it."""

  def unsupported(*_):
    raise OSError(number, os.strerror(number))

  if kind != "flock":
    patch(fcntl, "flock", unsupported)
  if kind == "lease":
    patch(fcntl, "lockf", unsupported)
  patch(locks, "_REFRESH_SECONDS", 0.2)
  patch(locks, "_STALE_SECONDS", 2.0)


@contextlib.contextmanager
def holder(path, kind):
  """A process that holds the lock."""
  pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
  command = [sys.executable, "-c", _HOLDER, str(path), kind]
  with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
    try:
      assert process.stdout.readline() == "holds\n", process.stderr.read()
      yield process
    finally:
      process.kill()


@pytest.mark.parametrize("kind", _KINDS)
def test_a_live_owner_keeps_others_out_and_a_killed_one_does_not(kind, tmp_path, monkeypatch):
  leave(kind, monkeypatch.setattr)
  path = str(tmp_path / ".lock")
  with holder(path, kind) as process:
    begin = time.monotonic()
    with pytest.raises(locks.HeldError, match=f"^process {process.pid} on "), locks.exclusive(path):
      pass
    assert time.monotonic() - begin < locks._STALE_SECONDS
    process.kill()
    process.wait()
    with locks.exclusive(path):
      assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
  assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize("kind", _KINDS)
def test_it_waits_until_the_owner_ends(kind, tmp_path, monkeypatch):
  leave(kind, monkeypatch.setattr)
  with holder(tmp_path / ".lock", kind) as process:
    announced = []

    def on_wait():
      announced.append(process.poll())
      process.stdin.close()

    with locks.exclusive(str(tmp_path / ".lock"), on_wait):
      assert announced == [None]
      assert process.wait(timeout=10) == 0
  assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize("kind", _KINDS)
def test_the_same_process_is_kept_out_too_and_keeps_its_lock(kind, tmp_path, monkeypatch):
  """Closing a second descriptor of the file would drop a POSIX record lock."""
  leave(kind, monkeypatch.setattr)
  path = tmp_path / ".lock"
  (tmp_path / "link").symlink_to(tmp_path)
  with locks.exclusive(str(path)):
    for other in (path, tmp_path / "link" / ".lock"):
      with pytest.raises(locks.HeldError, match=str(os.getpid())), locks.exclusive(str(other)):
        pass
    refused = pytest.raises(AssertionError, match=f"HeldError: process {os.getpid()} on ")
    with refused, holder(path, kind):
      pass
  with holder(path, kind):
    pass


@pytest.mark.parametrize(("kind", "number"), [*itertools.product(_KINDS[1:], (38, 37, 95, 22))])
def test_one_line_says_what_is_used_instead_of_flock(kind, number, tmp_path, monkeypatch, caplog):
  leave(kind, monkeypatch.setattr, number)
  with caplog.at_level("WARNING", logger="absl"), locks.exclusive(str(tmp_path / ".lock")):
    pass
  (line,) = caplog.messages
  assert os.strerror(number) in line
  assert {"record": "Using a POSIX record lock", "lease": "using a lease"}[kind] in line


def test_an_object_store_has_no_locks_and_a_line_says_so(caplog):
  with caplog.at_level("INFO", logger="absl"), locks.exclusive("gs://bucket/run/.lock"):
    pass
  assert "gs://bucket/run/.lock: this file system has no locks" in caplog.text


def test_another_failure_of_the_lock_is_an_error(tmp_path, monkeypatch):
  leave("record", monkeypatch.setattr, errno.EIO)
  with pytest.raises(OSError, match="Input/output error"), locks.exclusive(str(tmp_path / ".lock")):
    pass


def test_an_owner_that_was_suspended_loses_its_lease_and_ends(tmp_path, monkeypatch):
  leave("lease", monkeypatch.setattr)
  with holder(tmp_path / ".lock", "lease") as process:
    process.send_signal(signal.SIGSTOP)
    with locks.exclusive(str(tmp_path / ".lock")):
      process.send_signal(signal.SIGCONT)
      assert process.wait(timeout=10) == 138
      assert "error: Another process has taken " in process.stderr.read()


def test_of_many_that_find_a_stale_lease_one_at_a_time_gets_it(tmp_path, monkeypatch):
  leave("lease", monkeypatch.setattr)
  monkeypatch.setattr(locks, "_STALE_SECONDS", 1.0)
  path = tmp_path / ".lock.lease"
  path.write_text("a process that was killed 000000000000\n")
  inside, most, held = [], [], []

  def hold(number):
    lease, wait = locks._Lease(str(path)), locks._Wait(lambda: None)
    with open(tmp_path / ".lock", "a+") as file, lease.held(file.fileno(), wait):
      inside.append(number)
      most.append(len(inside))
      time.sleep(0.3)
      inside.remove(number)
      held.append(number)

  threads = [threading.Thread(target=hold, args=(number,)) for number in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  assert sorted(held) == [*range(6)] and max(most) == 1
  assert os.listdir(tmp_path) == [".lock"]


def test_a_lease_that_was_renewed_in_the_last_moment_stays(tmp_path):
  path = tmp_path / ".lock.lease"
  path.write_text("renewed")
  locks._Lease(str(path))._remove(b"stale")
  assert path.read_text() == "renewed" and os.listdir(tmp_path) == [path.name]
  locks._Lease(str(path))._remove(b"renewed")
  assert not os.listdir(tmp_path)


def test_an_owner_survives_a_failed_refresh(tmp_path, monkeypatch, caplog):
  leave("lease", monkeypatch.setattr)
  with locks.exclusive(str(tmp_path / ".lock")):
    (tmp_path / ".lock.lease").rename(tmp_path / "elsewhere")
    (tmp_path / ".lock.lease").mkdir()  # Cannot be read as a file.
    time.sleep(0.5)
    (tmp_path / ".lock.lease").rmdir()
    time.sleep(0.5)
    assert (tmp_path / ".lock.lease").is_file()
  assert "cannot be refreshed" in caplog.text
