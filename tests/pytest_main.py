"""What Bazel runs for a pytest file: py_test needs a program."""

import sys

import pytest

if __name__ == "__main__":
  # No cache: it would be written beside the sources, which are read-only in Bazel's sandbox.
  sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
