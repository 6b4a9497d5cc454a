"""A private loopback network and private file systems for this program and what it starts.

The kernel removes both when the last of these processes ends, even after SIGKILL. They replace
`network` where one link for all tasks is enough.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import shutil
import socket
import struct

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # From <linux/sockios.h> and <linux/if.h>.
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # From <linux/sched.h>.
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 1 << 14, 1 << 18, 2  # From <sys/mount.h>.
_LIBC = ctypes.CDLL(None, use_errno=True)


def isolate():
  """Moves the calling thread, and the processes that it starts from now on, into new namespaces.

  Nothing outside this machine can be reached from there.

  Raises:
    OSError: this process lacks the permission.
  """
  _check(_LIBC.unshare(_CLONE_NEWNET | _CLONE_NEWNS))
  set_link(up=True)
  # Otherwise mounts would also appear in the namespace that this process left.
  _check(_LIBC.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))


def set_link(up: bool):
  """Sets the loopback interface up or down; while it is down, it drops all packets silently."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    request = struct.pack("16sH14x", b"lo", _IFF_UP if up else 0)
    fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)


class SmallDisk:
  """A file system in memory with a fixed capacity, mounted on an empty directory."""

  def __init__(self, path: pathlib.Path, capacity: int):
    """
    Args:
      path: the mount point.
      capacity: in bytes.
    """
    self._ballast = path / ".ballast"
    options = f"size={capacity}".encode()
    _check(_LIBC.mount(b"tmpfs", bytes(path), b"tmpfs", 0, options))

  def fill(self):
    """Writes until no byte is left; call it again when something else has freed space."""
    with open(self._ballast, "ab", buffering=0) as file:
      try:
        while True:
          file.write(bytes(1 << 20))
      except OSError as error:
        if error.errno != errno.ENOSPC:
          raise

  def clear(self):
    """Frees the space again."""
    self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(path: pathlib.Path, capacity: int):
  """Yields a `SmallDisk`; afterwards the directory holds a copy of the files that were on it."""
  path.mkdir()
  copy = path.with_name(f"{path.name}.copy")
  disk = SmallDisk(path, capacity)
  try:
    yield disk
  finally:
    disk.clear()
    try:
      shutil.copytree(path, copy)
    finally:
      _check(_LIBC.umount2(bytes(path), _MNT_DETACH))
    os.replace(copy, path)


def _check(result: int):
  if result:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
