"""What holds for all tests."""

import signal

import hypothesis

# A busy machine is slow now and then: no test is a matter of time.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


def pytest_configure():
  # pytest-xdist's processes ignore SIGINT, and so would all that the tests start.
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
