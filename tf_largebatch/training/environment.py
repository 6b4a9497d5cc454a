"""The software and the processor that a run uses."""

import importlib.metadata
import os
import platform
import time

from absl import logging

from tf_largebatch.errors import UserError

# Names in Linux's /proc/cpuinfo of the instructions for each dtype, on x86 and on ARM.
_CPU_FEATURES = {
  "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
  "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def versions() -> dict[str, str]:
  """Versions of the packages that can change what a recipe computes, by name."""
  packages = ("tensorflow", "keras", "tensorflow-datasets", "numpy")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"python": platform.python_version(), **found}


def require_clock() -> None:
  """Checks that ZIP files, which `model.keras` is one of, can hold the current date.

  Boards without a battery begin in 1970 until they reach a time server.

  Raises:
    UserError: they cannot.
  """
  if not 1980 <= time.localtime().tm_year <= 2107:
    raise UserError(
      f"This machine's clock says {time.strftime('%Y-%m-%d')}, a date that model.keras cannot "
      "hold; set the clock, then run the same command."
    )


def emulates(dtype: str, cpuinfo: str = "/proc/cpuinfo") -> bool:
  """Whether the CPU is known to have no instructions for a 16-bit dtype."""
  if dtype not in _CPU_FEATURES or not os.path.exists(cpuinfo):
    return False
  with open(cpuinfo) as file:
    return not _CPU_FEATURES[dtype] & set(file.read().split())


def warn_of_slow_dtype(dtype: str, cpuinfo: str = "/proc/cpuinfo") -> None:
  """Logs a warning if the CPU has to emulate the dtype."""
  if emulates(dtype, cpuinfo):
    logging.warning(
      "This CPU has no %s instructions, which makes dtype=%s many times slower than "
      "dtype=float32 (another recipe, in another work_dir).",
      dtype,
      dtype,
    )
