"""Tests of the private network and disks, in processes of their own."""

import subprocess
import sys

import pytest

from tests.launching import ROOT

_ISOLATED = """
import errno, pathlib, socket, sys, time
from tools.resilience import namespaces
try:
  namespaces.isolate()
except OSError as error:
  sys.exit(f"not permitted: {error}")
path = pathlib.Path(sys.argv[1]) / "disk"
"""
_LINK = """
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
served, _ = server.accept()
served.settimeout(0.3)
namespaces.set_link(up=False)
client.sendall(b"late")
try:
  served.recv(4)
  raise AssertionError("the link is not cut")
except TimeoutError:
  namespaces.set_link(up=True)
served.settimeout(30)
assert served.recv(4) == b"late"
"""
_DISK = """
with namespaces.small_disk(path, 1 << 20) as disk:
  (path / "kept").write_text("before")
  for _ in range(2):
    disk.fill()
    try:
      (path / "new").write_bytes(b"x")
      raise AssertionError("the disk is not full")
    except OSError as error:
      assert error.errno == errno.ENOSPC
  disk.clear()
  (path / "kept").write_text("after")
  (path / "new").write_bytes(bytes(1 << 19))
assert not path.is_mount()
assert sorted(file.name for file in path.iterdir()) == ["kept", "new"]
assert (path / "kept").read_text() == "after"
"""


@pytest.mark.parametrize("program", [_LINK, _DISK], ids=["link", "disk"])
def test_in_a_process_of_its_own(program, tmp_path):
  """A cut link delays bytes but loses none; a full disk takes none, and its files outlast it."""
  finished = subprocess.run(
    [sys.executable, "-c", _ISOLATED + program, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  if finished.stderr.startswith("not permitted"):
    pytest.skip(finished.stderr)
  assert finished.returncode == 0, finished.stderr
