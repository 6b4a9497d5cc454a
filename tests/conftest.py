"""What holds for all tests."""

import signal


def pytest_configure():
  # pytest-xdist's processes ignore SIGINT, and so would all that the tests start.
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
