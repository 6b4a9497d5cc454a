"""Times a reader, and counts the CPU time that it and the rest of the machine use meanwhile."""

import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterator

from tools.benchmark.readers.jpeg_readers import read_bare, read_dali, read_pillow
from tools.benchmark.readers.task import BATCH, Task
from tools.benchmark.readers.tfrecord_readers import (
  read_decode_whole,
  read_model_garden,
  read_model_garden_uint8,
  read_ours,
  read_ours_and_skip,
  read_ours_in_order,
)

READERS = {
  "ours": read_ours,
  "ours skip": read_ours_and_skip,
  "ours in order": read_ours_in_order,
  "decode whole": read_decode_whole,
  "model garden": read_model_garden,
  "model garden uint8": read_model_garden_uint8,
  "pillow": read_pillow,
  "dali": read_dali,
  "bare libjpeg-turbo": read_bare,
}
# What to install with pip for the readers that need more than this package does.
_PACKAGES = {"pillow": "pillow", "dali": "nvidia-dali-cuda120"}


def time_reader(task: Task, reader: str, warm_up: float, seconds: float) -> dict:
  """Reads for so many seconds after a warm-up.

  Returns:
    {"images", "seconds", "cpu_seconds": of the reader, "others_seconds": CPU time of everything
    else on the machine}, or {"missing": why the reader cannot run}.
  """
  try:
    batches = READERS[reader](task)
    next(batches)
  except ImportError as error:
    if reader not in _PACKAGES:
      raise
    return {"missing": f"{error}; run pip install {_PACKAGES[reader]}"}
  _take_for(batches, warm_up)
  before = cpu_seconds(), machine_seconds()
  images, elapsed = _take_for(batches, seconds)
  own, everything = cpu_seconds() - before[0], machine_seconds() - before[1]
  others = max(0.0, everything - own)
  return {"images": images, "seconds": elapsed, "cpu_seconds": own, "others_seconds": others}


def _take_for(batches: Iterator, seconds: float) -> tuple[int, float]:
  """Takes batches until `seconds` have passed; (images taken, time that took)."""
  began, images, elapsed = time.perf_counter(), 0, 0.0
  while elapsed < seconds:
    next(batches)
    images += BATCH
    elapsed = time.perf_counter() - began
  return images, elapsed


def cpu_seconds() -> float:
  """User and system time of this process and of its children made by `multiprocessing`."""
  processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  ticks = 0
  for process in processes:
    # utime and stime are fields 14 and 15; the name, field 2, is in parentheses.
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
  """CPU time of all processes on all cores, including what a hypervisor took."""
  fields = pathlib.Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
  user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
