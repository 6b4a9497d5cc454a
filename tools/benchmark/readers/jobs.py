"""Runs a job of the input benchmark in a process of its own."""

import dataclasses
import os
import tempfile

from tf_largebatch.errors import UserError
from tools.benchmark import harness
from tools.benchmark.readers.files import write_files
from tools.benchmark.readers.pixels import compare_pixels
from tools.benchmark.readers.task import Task
from tools.benchmark.readers.timing import time_reader

_JOBS = {job.__name__: job for job in (write_files, time_reader, compare_pixels)}
_START_SECONDS = 900  # Allowed in addition to the time that a job measures.


def run_alone(job: str, task: Task, arguments: dict) -> dict:
  """Runs a job with these arguments in a new process; the job's result.

  Raises:
    UserError: the job failed.
  """
  name = arguments.get("reader", job)
  seconds = _START_SECONDS + arguments.get("warm_up", 0) + arguments.get("seconds", 0)
  with (
    tempfile.TemporaryDirectory() as scratch,
    # None of the readers uses a GPU.
    harness.Process(name, serve, scratch, {"CUDA_VISIBLE_DEVICES": "-1"}) as process,
  ):
    process.send({"job": job, "task": dataclasses.asdict(task), "arguments": arguments})
    return process.receive(seconds)


def serve():
  """The process' program."""
  for message in harness.messages():
    task = Task(**message["task"])
    # Before any library counts the cores or starts a thread.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.cores])
    try:
      harness.report(_JOBS[message["job"]](task, **message["arguments"]))
    except UserError as error:
      harness.report({"error": str(error)})
