"""Locks that keep two processes out of one directory, on local and on network file systems.

The lock is flock. Where the file system does not have it, POSIX record locks take its place, and
where it has neither, a lease: a file whose owner rewrites it every few seconds, and which another
process takes over only after it has seen it unchanged for longer. All of them end with the process.
"""

import contextlib
import errno
import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator

from absl import logging

from tf_largebatch import threads
from tf_largebatch.errors import LOST_TASK, summary
from tf_largebatch.signals import end_process, print_line

_REFRESH_SECONDS = 5.0
# A lease that has not changed for this long belongs to a process that no longer exists.
_STALE_SECONDS = 30.0
_POLL_SECONDS = 0.5

# What file systems without locks answer, beside those whose answer says that the lock is held.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_HELD = {errno.EAGAIN, errno.EACCES}

# Locks of this process. POSIX record locks do not keep out the process that holds them, which even
# loses them when it closes any descriptor of the file.
_own: set[str] = set()
_own_guard = threading.Lock()


class HeldError(Exception):
  """Another process, or another thread of this one, holds the lock; the message says which."""


@contextlib.contextmanager
def exclusive(path: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
  """Holds the lock of the file at `path` inside the context.

  The file is created if it is missing, names its last holder, and stays. On `gs://` and similar
  file systems, which have no locks, only logs that.

  Args:
    path: the lock file.
    on_wait: called once if the lock is held, before waiting for it. None: do not wait.

  Raises:
    HeldError: the lock is held and `on_wait` is None.
    OSError: the file cannot be opened, or not locked in any way.
  """
  if "://" in path:
    logging.info("%s: this file system has no locks; use the directory from one process.", path)
    yield
    return
  wait = _Wait(on_wait)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_claimed_in_this_process(os.path.realpath(path), wait))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, descriptor)
    unsupported = _lock(descriptor, wait)
    if unsupported:
      logging.warning("%s: no file locks (%s); using a lease.", path, unsupported)
      stack.enter_context(_Lease(f"{path}.lease").held(descriptor, wait))
    with contextlib.suppress(OSError):  # A full disk; the text only informs.
      os.ftruncate(descriptor, 0)
      os.pwrite(descriptor, f"{_this_process()}\n".encode(), 0)
    yield


class _Wait:
  """What to do while somebody else holds the lock."""

  def __init__(self, on_wait: Callable[[], None] | None):
    self._on_wait = on_wait
    self._announced = False

  def or_raise(self, descriptor: int | None = None) -> None:
    """Announces the wait, once; raises a HeldError if there is none."""
    if self._on_wait is None:
      raise HeldError(_this_process() if descriptor is None else _owner(descriptor))
    if not self._announced:
      self._announced = True
      self._on_wait()


def _this_process() -> str:
  return f"process {os.getpid()} on {platform.node()}"


def _owner(descriptor: int) -> str:
  """Returns what the last holder wrote into the lock file."""
  return os.pread(descriptor, 1000, 0).decode(errors="replace").strip()


@contextlib.contextmanager
def _claimed_in_this_process(key: str, wait: _Wait) -> Iterator[None]:
  while True:
    with _own_guard:
      if key not in _own:
        _own.add(key)
        break
    wait.or_raise()
    time.sleep(_POLL_SECONDS)
  try:
    yield
  finally:
    with _own_guard:
      _own.discard(key)


def _lock(descriptor: int, wait: _Wait) -> str:
  """Locks the open file with flock or a record lock; returns why neither works, or ""."""
  reasons = []
  for name, lock in (("flock", fcntl.flock), ("a POSIX record lock", fcntl.lockf)):
    try:
      _acquire(lock, descriptor, wait)
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      reasons.append(f"{name}: {error.strerror}")
    else:
      if reasons:
        logging.warning("Using %s, because the file system has no %s.", name, reasons[0])
      return ""
  return "; ".join(reasons)


def _acquire(lock: Callable[[int, int], None], descriptor: int, wait: _Wait) -> None:
  try:
    lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in _HELD:
      raise
    wait.or_raise(descriptor)
    lock(descriptor, fcntl.LOCK_EX)


class _Lease:
  """A file that names its owner and is rewritten every `_REFRESH_SECONDS` while the owner lives."""

  def __init__(self, path: str):
    self._path = path
    self._token = f"{platform.node()} {os.getpid()} {os.urandom(8).hex()}"
    self._count = 0

  @contextlib.contextmanager
  def held(self, descriptor: int, wait: _Wait) -> Iterator[None]:
    """Holds the lease inside the context; `descriptor` is the lock file that names the holder."""
    while not self._create():
      self._remove_if_stale(descriptor, wait)
    try:
      with threads.running(self._keep):
        yield
    finally:
      with contextlib.suppress(OSError):
        if self._is_own():
          os.unlink(self._path)

  def _text(self) -> bytes:
    # Of constant length, so that rewriting it needs no space on a full disk.
    return f"{self._token} {self._count:012d}\n".encode()

  def _create(self) -> bool:
    """Creates the file, unless it exists."""
    try:
      descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
      return False
    with os.fdopen(descriptor, "wb") as file:
      file.write(self._text())
    return True

  def _read(self) -> bytes | None:
    """Returns the file's contents, or None if it does not exist."""
    try:
      # Opened again each time: NFS then asks the server.
      with open(self._path, "rb") as file:
        return file.read()
    except FileNotFoundError:
      return None

  def _is_own(self) -> bool:
    return (self._read() or b"").startswith(self._token.encode())

  def _remove_if_stale(self, descriptor: int, wait: _Wait) -> None:
    """Returns once the file is gone: released by its owner, or unchanged for too long.

    Raises:
      HeldError: it changed, so its owner is running, and the caller does not wait.
    """
    seen, since = self._read(), time.monotonic()
    logging.info(
      "%s exists; waiting up to %.0f s to see whether its owner (%s) is still running.",
      *(self._path, _STALE_SECONDS, _owner(descriptor)),
    )
    while seen is not None:
      time.sleep(min(_POLL_SECONDS, _STALE_SECONDS / 10))
      now = self._read()
      if now != seen:
        if now is not None:
          wait.or_raise(descriptor)
        seen, since = now, time.monotonic()
      elif time.monotonic() - since > _STALE_SECONDS:
        self._remove(seen)
        return

  def _remove(self, stale: bytes) -> None:
    """Removes the file if it still has these contents."""
    # Renamed first: another process may have replaced the file since it was read.
    aside = f"{self._path}.{os.urandom(8).hex()}"
    with contextlib.suppress(FileNotFoundError):
      os.rename(self._path, aside)
      with open(aside, "rb") as file:
        if file.read() != stale:
          with contextlib.suppress(OSError):  # If it fails, the owner creates the file again.
            os.link(aside, self._path)
      os.unlink(aside)

  def _keep(self, ended: threading.Event) -> None:
    """Rewrites the file until `ended`; ends the process if another one has taken the lease."""
    while not ended.wait(_REFRESH_SECONDS):
      self._count += 1
      try:
        if self._is_own():
          with open(self._path, "r+b") as file:
            file.write(self._text())
        elif not self._create() and not self._is_own():
          break
      except OSError as error:  # Try again: the file system may be back before it is stale.
        logging.warning("%s cannot be refreshed (%s).", self._path, summary(error))
    else:
      return
    print_line(
      f"error: Another process has taken {self._path} from this one, which was suspended or could "
      f"not reach it for more than {_STALE_SECONDS:.0f} s; run again to continue."
    )
    end_process(LOST_TASK)
