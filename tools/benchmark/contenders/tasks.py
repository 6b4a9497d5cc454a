"""A contender's processes, as the benchmark sees them."""

import contextlib
import dataclasses
import json
import os

from tools.benchmark import harness
from tools.benchmark.contenders.contender import Contender
from tools.benchmark.contenders.serving import serve
from tools.launch_local import free_addresses

_REPORT_SECONDS = 1200  # Compiling for a GPU takes minutes.


class Tasks:
  """The processes of a contender, one per task; used as a context manager."""

  def __init__(self, contender: Contender, scratch: str):
    """Starts them; `scratch`: directory for their logs and temporary files."""
    self.contender = contender
    environment = {
      "TF_FORCE_GPU_ALLOW_GROWTH": "true",
      "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
      **contender.environment,
    }
    with contextlib.ExitStack() as stack:
      self._processes = []
      for task, cluster in enumerate(_clusters(contender.tasks)):
        process = harness.Process(contender.name, serve, scratch, environment | cluster)
        self._processes.append(stack.enter_context(process))
        process.send({"contender": dataclasses.asdict(contender), "task": task})
      self._stack = stack.pop_all()

  def __enter__(self) -> "Tasks":
    return self

  def __exit__(self, *_):
    self._stack.close()

  def _reports(self) -> list[dict]:
    return [process.receive(_REPORT_SECONDS) for process in self._processes]

  def _ask(self, message: dict) -> list[dict]:
    for process in self._processes:
      process.send(message)
    return self._reports()

  def wait_until_ready(self) -> dict:
    """The first task's report once all have compiled their steps and warmed up.

    Raises:
      UserError: one of them cannot run.
    """
    return self._reports()[0]

  def run(self, steps: int) -> dict:
    """The first task's report on so many steps, with CPU time and memory summed over all tasks."""
    reports = self._ask({"steps": steps})
    for name in ("cpu_seconds", "peak_bytes", "gpu_peak_bytes"):
      if name in reports[0]:
        reports[0][name] = sum(report[name] for report in reports)
    return reports[0]

  def profile(self) -> dict[str, float]:
    """The first task's seconds by operation."""
    return self._ask({"profile": True})[0]["operations"]


def _clusters(tasks: int) -> list[dict[str, str]]:
  """The environment that makes each process a task of the same cluster."""
  if tasks == 1:
    return [{}]
  cluster = {"worker": free_addresses(tasks)}
  return [
    {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
    for index in range(tasks)
  ]
