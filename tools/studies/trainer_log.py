"""What a trainer's log says about its end."""

import pathlib

DIVERGED = "error: Training diverged"  # How the trainer's message begins.


def last_message(log: pathlib.Path, start: int) -> str:
  """Returns the trainer's last error, or its last line if there is none, after `start` bytes."""
  lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
  errors = [line for line in lines if line.startswith("error: ")]
  return (errors or lines or [""])[-1]
