r"""Checks that your machines, devices and collectives compute the recipe correctly.

  python -m tools.verify
  python -m tools.launch_local --tasks=2 --module=tools.verify

Start it as you would start a training run: alone, or on each machine with its `TF_CONFIG`. A small
problem in float32 goes through the package's own input pipeline, step, optimizer and collectives on
all devices. Each property of the paper's recipe is compared with `conformance.reference`, the
equations in NumPy float64, and gets a line with the measured deviation and its limit. The exit
status is 1 if a property fails, and `--output` receives the results as JSON.

Each property is measured where no other can hide it: the aggregation of gradients on a network
without BN, weight decay where the loss is constant, momentum with the rates that were actually
used. So the line that fails names the fault. Augmentation and evaluation do not depend on the
machines; the tests cover them.

--network, --decay and --optimizer name a recipe other than the paper's. The properties that say
nothing about it are left out, and named with the reason.
"""

import dataclasses
import math
import os
import pathlib
import time

# The reference's matrix products are small, so threads would cost more than they gain.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags

from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import output, program
from tools.conformance.properties.checks import CHECKS, SLOW, not_covered, verify
from tools.conformance.properties.result import Result

# The fields of the recipe that decide which properties apply to it.
_FIELDS = ("network", "decay", "optimizer")


def define_flags():
  flags.DEFINE_string("output", "verify.json", "File for the results, as JSON; empty: none.")
  flags.DEFINE_enum(
    "communication", "auto", ["auto", "nccl", "ring"], "Collectives, as in a training run."
  )
  flags.DEFINE_integer(
    "logical_cpus",
    1,
    "Number of replicas to make of this machine's CPU, if there is no GPU and only one task.",
    lower_bound=1,
  )
  flags.DEFINE_list(
    "only",
    [],
    f"Names of the properties to check; empty: all but {', '.join(SLOW)}, which take minutes.",
  )

  paper = Recipe()
  for name in _FIELDS:
    flags.DEFINE_string(name, getattr(paper, name), f"The recipe's {name}, as in a training run.")


def _check_flags(cluster: Cluster) -> pathlib.Path | None:
  """Reports a user's mistake before TensorFlow starts; returns the file that the chief writes.

  Raises:
    UserError: a property or a field of the recipe is unknown, there are several tasks of several
      logical CPUs, or the output cannot be written.
  """
  unknown = [name for name in flags.FLAGS.only if name not in CHECKS]
  if unknown:
    raise UserError(
      f"--only={','.join(unknown)}: there is no such property; use any of {', '.join(CHECKS)}."
    )
  fields = {name: flags.FLAGS[name].value for name in _FIELDS}
  Recipe(**fields)  # Raises UserError for an unknown name.
  if flags.FLAGS.logical_cpus > 1 and cluster.num_tasks > 1:
    raise UserError(
      f"--logical_cpus={flags.FLAGS.logical_cpus} works with one task only; leave it out under "
      "TF_CONFIG, where TensorFlow uses one CPU per task."
    )
  # Only the chief writes the file; if another task ended here, the rest would wait for it.
  return output.output_path("--output", flags.FLAGS.output) if cluster.is_chief else None


def _make_logical_cpus(count: int) -> None:
  """Splits the CPU into logical devices, each of which becomes a replica.

  Raises:
    UserError: the machine has a GPU.
  """
  import tensorflow as tf

  if tf.config.list_physical_devices("GPU"):
    raise UserError(
      f"--logical_cpus={count} is for machines without a GPU, but this one has one; leave it out."
    )
  (cpu,) = tf.config.list_physical_devices("CPU")
  tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)


def _table(results: list[Result], cluster: dict, seconds: float, left_out: dict) -> str:
  lines = [
    ", ".join(f"{name} {value}" for name, value in cluster.items()),
    f"{'property':<22}{'deviation':>10}{'limit':>10}",
  ]
  for result in results:
    verdict = "holds" if result.holds else "FAILS"
    lines.append(
      f"{result.name:<22}{result.deviation:>10.1e}{result.limit:>10.1e}  {verdict}  "
      + result.meaning
    )
  failed = [result.name for result in results if not result.holds]
  if failed:
    lines.append(f"{len(failed)} of {len(results)} properties fail: {', '.join(failed)}.")
  else:
    lines.append(f"All {len(results)} properties hold, in {seconds:.0f} s.")
  for why in dict.fromkeys(left_out.values()):
    names = [name for name in left_out if left_out[name] == why]
    lines.append(f"Not checked ({why}): {', '.join(names)}.")
  return "\n".join(lines)


def _as_json(result: Result) -> dict:
  deviation = result.deviation if math.isfinite(result.deviation) else None  # JSON has no NaN.
  return dataclasses.asdict(result) | {"deviation": deviation, "holds": result.holds}


def main() -> bool:
  """Checks the properties and reports them; returns whether one fails."""
  cluster = read_cluster()
  path = _check_flags(cluster)
  if flags.FLAGS.logical_cpus > 1:
    _make_logical_cpus(flags.FLAGS.logical_cpus)
  import tensorflow as tf

  from tf_largebatch.distributed.strategy import describe, make_strategy
  from tf_largebatch.training.environment import versions

  strategy = make_strategy(cluster, flags.FLAGS.communication)
  tf.get_logger().setLevel("ERROR")  # Mistakes the gather of each new run for retracing.
  began = time.monotonic()
  left_out = not_covered(**{name: flags.FLAGS[name].value for name in _FIELDS})
  left_out = {name: why for name, why in left_out.items() if name not in (*SLOW, *flags.FLAGS.only)}
  names = flags.FLAGS.only or [name for name in CHECKS if name not in (*left_out, *SLOW)]
  results = verify(strategy, names)
  seconds = time.monotonic() - began
  failed = not all(result.holds for result in results)
  if cluster.is_chief:
    description = describe(strategy, cluster, flags.FLAGS.communication)
    print(_table(results, description, seconds, left_out))
    report = {
      "status": "failed" if failed else "verified",
      "properties": [_as_json(result) for result in results],
      "not_checked": left_out,
      "seconds": seconds,
      "cluster": description,
      "versions": versions(),
    }
    if path:
      output.write_json("--output", path, report)
  return failed


if __name__ == "__main__":
  program.run(main, define_flags)
