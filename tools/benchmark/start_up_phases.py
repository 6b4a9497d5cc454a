"""A process that runs the trainer up to the end of its first step, and times its phases."""

import functools
import importlib
import os
import time

from tf_largebatch.errors import UserError
from tools.benchmark import harness

# What is timed: phase → module and function.
_PHASES = {
  "strategy": ("tf_largebatch.training.trainer", "make_strategy"),
  "recipe and data set": ("tf_largebatch.training.trainer", "resolve_run"),
  "index and images": ("tf_largebatch.training.trainer", "_open"),
  "network": ("tf_largebatch.training.building", "build"),
  "checkpoints and metrics": ("tf_largebatch.training.trainer", "_restore"),
  "choosing g": ("tf_largebatch.training.trainer", "with_workers_per_pass"),
}
_INTERPRETER, _IMPORTS, _STEP, _OTHER = "interpreter", "imports", "first step", "other"
_TOTAL, _PROCESSOR = "total", "processor"
ROWS = (_INTERPRETER, _IMPORTS, *_PHASES, _STEP, _OTHER, _TOTAL, _PROCESSOR)


def serve():
  """In the process that starts: runs the trainer and reports the seconds of each phase."""
  arguments = next(harness.messages())["arguments"]
  began = _start()
  from tf_largebatch import command_line, train
  from tf_largebatch.signals import StopRequest

  seconds = {}
  try:
    argv = command_line.parse_flags(["train", *arguments])
    seconds[_INTERPRETER] = time.monotonic() - began
    import_trainer = train._import_trainer

    def import_and_time():
      imported = time.perf_counter()
      found = import_trainer()
      seconds[_IMPORTS] = time.perf_counter() - imported
      for phase, (module, name) in _PHASES.items():
        _time_calls(importlib.import_module(module), name, phase, seconds)
      _time_first_step(seconds, began)
      return found

    train._import_trainer = import_and_time
    train._train(argv, StopRequest())
  except UserError as error:
    harness.report({"error": str(error)})
  else:
    harness.report({"error": "The run is over before its first step; choose other flags."})


def _start() -> float:
  """When this process started, by the clock of `time.monotonic`."""
  with open("/proc/self/stat") as file:
    ticks = int(file.read().rpartition(")")[2].split()[19])  # Since the machine's start.
  age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  return time.monotonic() - age


def _time_calls(module, name: str, phase: str, seconds: dict[str, float]):
  function = getattr(module, name)

  @functools.wraps(function)
  def timed(*arguments, **keywords):
    began = time.perf_counter()
    try:
      return function(*arguments, **keywords)
    finally:
      seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began

  setattr(module, name, timed)


def _time_first_step(seconds: dict[str, float], start: float):
  """Makes the first step, with its batch, end with a report."""
  from tf_largebatch.training.loop import Loop

  train_to = Loop.train_to

  def train_and_report(loop, last):
    step, began = loop.train_step, time.perf_counter()

    def first_step(*arguments):
      float(step(*arguments)["loss"])  # Waits for the device.
      seconds[_STEP] = time.perf_counter() - began
      total = time.monotonic() - start
      seconds[_OTHER] = total - sum(seconds.values())
      seconds[_TOTAL], seconds[_PROCESSOR] = total, time.process_time()
      harness.report({"seconds": seconds})
      os._exit(0)

    loop.train_step = first_step
    return train_to(loop, last)

  Loop.train_to = train_and_report
