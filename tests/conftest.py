"""Settings of all tests."""

import signal

import hypothesis

# Hypothesis' deadlines would fail tests on a busy machine.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


def pytest_configure():
  # pytest-xdist's processes ignore SIGINT, and those under nohup SIGHUP; processes started by tests
  # would inherit that.
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
