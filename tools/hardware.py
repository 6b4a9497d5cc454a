"""The processor and the software that a benchmark ran on."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess


def describe() -> dict[str, str | int]:
  """The CPU's name, and how many logical CPUs this process may use."""
  return {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}


def cpu_name(cpuinfo: str = "/proc/cpuinfo") -> str:
  """The CPU's model name as Linux has it, or else the name of its architecture."""
  with contextlib.suppress(OSError), open(cpuinfo) as lines:
    for line in lines:
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.machine()


def versions(*packages: str) -> dict[str, str]:
  """Versions of Python and of those packages that are installed, by name."""
  found = {"python": platform.python_version()}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def commit() -> str | None:
  """The commit of these sources, with "-dirty" if files differ from it; None without git."""
  command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    done = subprocess.run(
      command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
  except OSError:
    return None
  return done.stdout.strip() or None
