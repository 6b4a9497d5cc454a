"""What this process may use of its machine, in a container too: memory and cores."""

import contextlib
import math
import os
import pathlib
import resource

import psutil

# Of version 2 and of version 1: the files of a group's limit and of its use, and the prefix of its
# statistics, which count the groups below too.
_MEMORY_FILES = {
  "": ("memory.max", "memory.current", ""),
  "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def free_memory(root: str = "/") -> float:
  """Returns how many more bytes this process may use; infinity where nothing says so.

  That is the least of what is free on the machine, in each control group around the process
  (containers, Slurm jobs, systemd services) and in its address space (`ulimit -v`).

  Args:
    root: directory that holds `proc` and `sys`; for tests.
  """
  free = [math.inf]
  with contextlib.suppress(OSError, psutil.Error):  # No /proc.
    free.append(psutil.virtual_memory().available)
  free += (_free_in(*group) for group in _groups(root, _MEMORY_FILES))
  limit, _ = resource.getrlimit(resource.RLIMIT_AS)
  if limit != resource.RLIM_INFINITY:
    with contextlib.suppress(OSError, psutil.Error):
      free.append(limit - psutil.Process().memory_info().vms)
  return max(0, min(free))


def usable_cores(root: str = "/") -> int:
  """Returns how many cores this process may use: its affinity, and its groups' quotas."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  for controller, directory in _groups(root, ("", "cpu")):
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
      if controller:
        quota, period = (_read(directory, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
      else:
        quota, period = _read(directory, "cpu.max").split()
      if quota not in ("max", "-1"):
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
  return cores


def thread_settings(cores: int) -> dict[str, str]:
  """Returns the environment variables that make TensorFlow start threads for so many cores."""
  return {
    "TF_NUM_INTRAOP_THREADS": str(cores),
    # With a single one, the all-reduce would wait until backprop has ended.
    "TF_NUM_INTEROP_THREADS": str(max(2, cores)),
  }


def _groups(root: str, controllers):
  """Yields (controller, directory) of each control group around this process.

  A container often sees its own group as the root of the hierarchy but its name as the machine
  does, so directories that do not exist are passed over. Version 2 has the controller "".
  """
  with contextlib.suppress(OSError):
    for line in pathlib.Path(root, "proc/self/cgroup").read_text().splitlines():
      _, names, name = line.split(":", 2)
      for controller in set(names.split(",")) & set(controllers):
        for mount in (f"sys/fs/cgroup/{controller}", *([] if names else ["sys/fs/cgroup/unified"])):
          top = pathlib.Path(root, mount)
          group = top / name.lstrip("/")
          yield from ((controller, d) for d in (group, *group.parents) if d.is_relative_to(top))


def _free_in(controller: str, directory: pathlib.Path) -> float:
  """Returns the bytes that a group leaves, of which the kernel can take back its file cache."""
  limit_file, use_file, prefix = _MEMORY_FILES[controller]
  try:
    limit = _read(directory, limit_file)
    if limit == "max":
      return math.inf
    statistics = dict(line.split() for line in _read(directory, "memory.stat").splitlines())
    cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return int(limit) - int(_read(directory, use_file)) + cache
  except (OSError, ValueError):
    return math.inf


def _read(directory: pathlib.Path, name: str) -> str:
  return (directory / name).read_text().strip()
