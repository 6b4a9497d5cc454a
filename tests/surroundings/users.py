"""Another user of this machine, for tests."""

import contextlib
import os

_NOBODY = 12345  # Without an entry in /etc/passwd.


@contextlib.contextmanager
def no_privileges():
  """Takes root's right to read and write every file away inside the context; others lack it."""
  before = os.geteuid()
  if before == 0:
    os.seteuid(_NOBODY)
  try:
    yield
  finally:
    os.seteuid(before)
