"""A contender's process: builds the contender, then times its steps on request."""

import collections
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

from tf_largebatch import train
from tf_largebatch.errors import UserError, summary
from tf_largebatch.recipe import Recipe
from tools.benchmark import harness
from tools.benchmark.contenders.ceiling import make_product
from tools.benchmark.contenders.contender import Contender, Runner
from tools.benchmark.contenders.ours import make_evaluation, make_ours
from tools.benchmark.contenders.pytorch import make_torch
from tools.benchmark.contenders.stock_keras import make_fit, make_keras

_MAKERS = {
  "ours": make_ours,
  "loop": make_ours,
  "evaluate": make_evaluation,
  "keras": make_keras,
  "fit": make_fit,
  "our_fit": make_fit,
  "torch": make_torch,
  "torch_compiled": make_torch,
  "product": make_product,
}


def serve():
  """The process' program.

  The first message is {"contender": fields of `Contender`, "task": index}, and the first report
  {"passes"} or {"error"}. Each further message is {"steps": number} or {"profile": true}.
  """
  messages = harness.messages()
  first = next(messages)
  contender = Contender(**first["contender"])
  _set_affinity(contender, first["task"])
  if contender.is_ours:  # The others run with their own defaults.
    train.set_environment(Recipe(**contender.recipe))
  elif contender.kind == "product":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
  from tf_largebatch.distributed.cluster import read_cluster

  try:
    runner = _MAKERS[contender.kind](contender, read_cluster())
    runner.run(1)
    runner.run(1)
  except (UserError, ImportError) as error:
    harness.report({"error": f"{contender.name}: {summary(error)}"})
    return
  harness.report({"passes": runner.passes})
  for message in messages:
    if "profile" in message:
      found = {"operations": profile(runner) if _is_tensorflow(contender) else {}}
    else:
      found = _measure(runner, message["steps"]) | _memory(contender)
    harness.report(found)


def _set_affinity(contender: Contender, task: int):
  """Restricts the process to its task's share of the contender's cores."""
  cores = sorted(os.sched_getaffinity(0))[: contender.cores]
  share = len(cores) // contender.tasks
  os.sched_setaffinity(0, cores[task * share :][:share] if share else cores)


def _measure(runner: Runner, steps: int) -> dict[str, float]:
  runner.run(1)  # Untimed: the other contenders have evicted its data from caches and memory.
  if runner.run_bare is None:
    return _timed(runner.run, steps)
  # In this order a steady drift of the machine's speed cancels out.
  bare, first, second, bare_again = (
    _timed(function, steps)
    for function in (runner.run_bare, runner.run, runner.run, runner.run_bare)
  )
  return {
    "bare_seconds": (bare["seconds"] + bare_again["seconds"]) / 2,
    "share_within_steps": runner.seconds_in_steps() / second["seconds"],
    **{name: statistics.mean((first[name], second[name])) for name in first},
  }


def _timed(run: Callable[[int], float], steps: int) -> dict[str, float]:
  began, cpu = time.perf_counter(), time.process_time()
  last = run(steps)
  seconds = time.perf_counter() - began
  return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "last": last}


def _is_tensorflow(contender: Contender) -> bool:
  return not contender.kind.startswith("torch")


def profile(runner: Runner) -> dict[str, float]:
  """Seconds of a step by operation, of a GPU's kernels or else of the CPU's threads."""
  import tensorflow as tf
  from tensorflow.tsl.profiler.protobuf import xplane_pb2

  with tempfile.TemporaryDirectory() as directory:
    with tf.profiler.experimental.Profile(directory):
      runner.run(1)
    (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
  planes = [plane for plane in space.planes if "device:GPU" in plane.name]
  found = collections.Counter()
  for plane in planes or [plane for plane in space.planes if "host:CPU" in plane.name]:
    for line in plane.lines:
      for event in line.events:
        name = plane.event_metadata[event.metadata_id].name
        # On the CPU an operation is "name:type"; its C++ callers ("A::B") are recorded too.
        owner, colon, kind = name.rpartition(":")
        if planes or (colon and kind.isidentifier() and not owner.endswith(":")):
          found[name if planes else kind] += event.duration_ps / 1e12
  return dict(found.most_common())


def _memory(contender: Contender) -> dict[str, int]:
  """Peak resident set size of the process so far and, on a GPU, peak memory in use, in bytes."""
  found = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  if not _is_tensorflow(contender):
    import torch

    if torch.cuda.is_available():
      found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
  else:
    import tensorflow as tf

    if tf.config.get_visible_devices("GPU"):
      found["gpu_peak_bytes"] = tf.config.experimental.get_memory_info("GPU:0")["peak"]
  return found
