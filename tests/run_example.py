"""Runs an example of docs/examples and prints a digest of the weights that it trained.

python -m tests.run_example NAME ARGUMENTS…
"""

import hashlib
import runpy
import sys


def run_example(name, *arguments):
  """Runs an example as a program in this process and returns its variables by name."""
  before, sys.argv = sys.argv, [name, *arguments]
  try:
    return runpy.run_module(f"docs.examples.{name}", run_name="__main__")
  finally:
    sys.argv = before


def digest(model):
  """Returns the SHA-256 of all weights of a model, in hexadecimal."""
  return hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()


if __name__ == "__main__":
  print("weights:", digest(run_example(*sys.argv[1:])["model"]))
