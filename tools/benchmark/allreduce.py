r"""Times all-reduces on your cluster, by size and as the step makes them: can backprop hide them?

  python -m tools.benchmark.allreduce --step_seconds=0.2 --json=allreduce.json
  python -m tools.launch_local --tasks=2 --module=tools.benchmark.allreduce -- --network=resnet20

Start it as you start a training run: once for all GPUs of one machine, or in every task with its
`TF_CONFIG`. The first result of each all-reduce is checked: it adds up small whole numbers, so the
sum must be exact in float32 (in bfloat16: within its rounding). Then --repeats results are fetched,
one after the other; the chief prints median, minimum and maximum of the seconds, which include
waiting for the slowest replica.

by size: one float32 tensor. The bus bandwidth is 2 (p − 1) / p · bytes / seconds for p replicas, as
  in nccl-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): the traffic of each link in a
  ring.
as the step makes them: the network's gradients, its moving statistics and three scalars, in packs
  of --bytes_per_pack (0: TensorFlow's default, one pack). With --wire=bfloat16 the gradients are
  cast, reduced and cast back; the rest stays float32 and needs a collective of its own, because a
  pack has one dtype. The time includes casting and packing.
by class: the step's tensors grouped by size, each group reduced alone in one pack.
verdict: on the first of the step's reductions, if --step_seconds is given: the seconds of a step
  without communication (one replica alone, with its share of the workers). --passes says in how
  many passes that step processes them; only the backprop of the last pass can hide communication. A
  single pack waits for all gradients; with several packs the first can be sent while backprop
  continues.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

from absl import flags

# TensorFlow and Keras are imported where they are used, after the flags have been checked.
from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import NETWORKS
from tools import hardware, output, program
from tools.benchmark.reductions import WIRES, bfloat16_error, time_reduce
from tools.forecasting.layers import usual_classes

_CLASSES = (2**10, 2**14, 2**18, 2**22)  # Upper bounds in bytes; the last class has none.
# A layer computes three products: its output and, in backprop, the gradients of its input and its
# weights.
_BACKPROP = 2 / 3


def define_flags():
  flags.DEFINE_list("sizes", [str(4**i) for i in range(5, 15)], "Bytes of a message.")
  flags.DEFINE_integer("repeats", 5, "Timed calls of each all-reduce.", lower_bound=1)
  flags.DEFINE_enum("network", "resnet50", NETWORKS, "As in the recipe.")
  flags.DEFINE_integer(
    "num_classes", None, "Width of the logits; default: ImageNet's or CIFAR-10's.", lower_bound=1
  )
  packs = [str(size) for size in (0, 2**22, 2**24, 2**26)]
  flags.DEFINE_list("bytes_per_pack", packs, "Minimum bytes of a collective; 0: all in one.")
  flags.DEFINE_multi_enum("wire", list(WIRES), WIRES, "Dtype in which gradients are sent.")
  flags.DEFINE_float(
    "step_seconds", 0.0, "Seconds of a step without communication; 0: no verdict.", lower_bound=0
  )
  flags.DEFINE_integer(
    "passes", 1, "Passes in which that step processes its workers.", lower_bound=1
  )
  flags.DEFINE_string("json", None, "File for the results, as JSON, written by the chief.")
  flags.DEFINE_enum("communication", "auto", ["auto", "nccl", "ring"], "As in a training run.")
  flags.DEFINE_float(
    "cluster_timeout_minutes", 10.0, "Minutes to wait for all tasks at the start.", lower_bound=0
  )


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to measure: the flags of the same names, checked."""

  sizes: tuple[int, ...]
  repeats: int
  network: str
  num_classes: int
  bytes_per_pack: tuple[int, ...]
  wire: tuple[str, ...]
  step_seconds: float
  passes: int
  communication: str
  cluster_timeout_minutes: float


def bus_bytes_per_second(size: int, replicas: int, seconds: float) -> float:
  """Bus bandwidth of an all-reduce of `size` bytes, by the convention of nccl-tests."""
  return 2 * (replicas - 1) / replicas * size / seconds


def judge(seconds: float, step_seconds: float, passes: int) -> dict:
  """Compares a reduction's seconds with those of a step's computation, in so many passes."""
  share = seconds / (step_seconds + seconds)
  return {"share_of_step": share, "can_hide": seconds <= _BACKPROP * step_seconds / passes}


def measure(cluster: Cluster, settings: Settings) -> dict | None:
  """Measures, and prints the tables on the chief.

  Args:
    cluster: what `read_cluster` returned.
    settings: what to measure.

  Returns:
    What --json holds, or None if there is only one replica.

  Raises:
    UserError: a sum is wrong, or the tasks' settings differ.
  """
  from tf_largebatch.distributed.strategy import describe, make_strategy

  strategy = make_strategy(cluster, settings.communication, settings.cluster_timeout_minutes)
  import tensorflow as tf

  from tf_largebatch.distributed.collectives import meet, require_agreement

  tf.get_logger().setLevel("ERROR")  # TensorFlow warns of retracing, which is intended here.

  def say(line: str):
    if cluster.is_chief:
      print(line, flush=True)

  if strategy.num_replicas_in_sync == 1:
    say("1 replica: there is nothing to reduce, so nothing was measured.")
    return None
  facts = dataclasses.replace(settings, step_seconds=0.0, passes=1)  # The chief alone uses these.
  require_agreement(strategy, (facts,), "give all of them the same flags")
  found = describe(strategy, cluster, settings.communication)
  say(", ".join(f"{name} {value}" for name, value in found.items()) + "\n")
  found["repeats"] = settings.repeats
  found["points"] = _measure_sizes(strategy, settings, say)
  found["network"] = _measure_network(strategy, settings, say)
  found["versions"] = hardware.versions("tensorflow", "keras")
  meet(strategy)
  return found


def _measure_sizes(strategy, settings: Settings, say: Callable) -> list[dict]:
  """Times one tensor of each size."""
  points, replicas = [], strategy.num_replicas_in_sync
  say(_line("bytes", None, "bus MB/s"))
  for size in settings.sizes:
    timed = time_reduce(strategy, [(size // 4,)], [], settings.repeats)
    bandwidth = bus_bytes_per_second(size, replicas, timed["seconds"])
    points.append({"bytes": size, **timed, "bus_bytes_per_second": bandwidth})
    say(_line(size, timed, f"{bandwidth / 1e6:.1f}"))
  return points


def _measure_network(strategy, settings: Settings, say: Callable) -> dict:
  """Times what the step reduces: all of it in packs, then by class; and gives the verdict."""
  gradients, others = _shapes(settings.network, settings.num_classes)
  network = {"name": settings.network, "step_seconds": settings.step_seconds}
  for name, shapes in (("gradients", gradients), ("others", others)):
    network[name] = {"tensors": len(shapes), "bytes": _bytes(shapes)}
  say("\n{name}: gradients {gradients}, others {others}".format(**network))
  network["reductions"] = _measure_packs(strategy, settings, gradients, others, say)
  if "bfloat16" in settings.wire:
    error = bfloat16_error(strategy, gradients, others, settings.bytes_per_pack[0])
    network["bfloat16_relative_error"] = error
    say(f"Sent as bfloat16, the sum of random gradients has a relative error of {error:.3g}.")
  say("")
  network["classes"] = _measure_classes(strategy, settings, [*gradients, *others], say)
  if settings.step_seconds:
    network["verdict"] = _verdict(network["reductions"][0], settings)
    say(f"\n{network['verdict']}")
  return network


def _measure_packs(strategy, settings: Settings, gradients, others, say: Callable) -> list[dict]:
  """Times the step's reduction with each dtype and size of packs."""
  reductions, step_seconds = [], settings.step_seconds
  say(_line("wire, bytes per pack", None, "of step" if step_seconds else ""))
  for wire, pack in itertools.product(settings.wire, settings.bytes_per_pack):
    timed = time_reduce(strategy, gradients, others, settings.repeats, pack, wire)
    verdict = judge(timed["seconds"], step_seconds, settings.passes) if step_seconds else {}
    reductions.append({"wire": wire, "bytes_per_pack": pack, **timed, **verdict})
    share = f"{100 * verdict['share_of_step']:.2f} %" if verdict else ""
    say(_line(f"{wire}, {pack}", timed, share))
  return reductions


def _measure_classes(strategy, settings: Settings, shapes, say: Callable) -> list[dict]:
  """Times the step's tensors by class of size."""
  classes = []
  say(_line("tensors, bytes in all", None, "largest"))
  for _, group in itertools.groupby(sorted(shapes, key=_class_of), _class_of):
    group = list(group)
    timed = time_reduce(strategy, group, [], settings.repeats)
    sizes = {"bytes": _bytes(group), "largest_bytes": max(_bytes([shape]) for shape in group)}
    classes.append({"tensors": len(group), **sizes, **timed})
    say(_line(f"{len(group)}, {sizes['bytes']}", timed, str(sizes["largest_bytes"])))
  return classes


def _verdict(reduction: dict, settings: Settings) -> str:
  answer = "no"
  if reduction["can_hide"]:
    answer = "yes" if reduction["collectives"] > 1 else "yes, but only in several packs"
  backprop = "the last pass' backprop" if settings.passes > 1 else "backprop"
  hiding = _BACKPROP * settings.step_seconds / settings.passes
  return (
    f"Communication ({reduction['wire']}, {reduction['bytes_per_pack']} bytes per pack) costs"
    f" {100 * reduction['share_of_step']:.3g} % of the step of this recipe if nothing is hidden:"
    f" {reduction['seconds']:.3g} s in addition to {settings.step_seconds:.3g} s of computation. It"
    f" can hide behind {backprop} (2/3 of a pass, {hiding:.3g} s): {answer}."
  )


def _line(label: object, timed: dict | None, last: str) -> str:
  """A line of a table, or its heading if nothing was timed."""
  cells = ["median s", "min s", "max s", "collectives"]
  if timed:
    cells = [f"{timed[name]:.6f}" for name in ("seconds", "min", "max")]
    cells.append(str(timed["collectives"]))
  return output.table_line(label, 26, [*cells, last], 14).rstrip()


def _shapes(network: str, num_classes: int) -> tuple[list, list]:
  """Shapes of the gradients, and of what `step.py` adds up beside them.

  The latter are the moving statistics, loss, error and the request to stop.
  """
  import keras

  from tf_largebatch.models import resnet

  model = resnet.build(
    network,
    resnet.Layers(keras.layers.BatchNormalization),
    input_shape=(32, 32, 3),  # The weights' shapes do not depend on it.
    num_classes=num_classes,
    channel_mean=(0.0,) * 3,
    channel_std=(1.0,) * 3,
  )
  gradients = [tuple(variable.shape) for variable in model.trainable_variables]
  return gradients, [*(tuple(v.shape) for v in model.non_trainable_variables), (), (), ()]


def _bytes(shapes) -> int:
  return 4 * sum(math.prod(shape) for shape in shapes)


def _class_of(shape) -> int:
  return sum(_bytes([shape]) > bound for bound in _CLASSES)


def _settings(values: flags.FlagValues) -> Settings:
  """Checks the flags."""
  if not math.isfinite(values.step_seconds):
    raise UserError(f"--step_seconds={values.step_seconds} is refused; give a finite number.")
  return Settings(
    sizes=_numbers("sizes", values.sizes, 4, 4),  # Bytes of a float32.
    repeats=values.repeats,
    network=values.network,
    num_classes=values.num_classes or usual_classes(values.network),
    bytes_per_pack=_numbers("bytes_per_pack", values.bytes_per_pack, 0, 1),
    wire=tuple(values.wire),
    step_seconds=values.step_seconds,
    passes=values.passes,
    communication=values.communication,
    cluster_timeout_minutes=values.cluster_timeout_minutes,
  )


def _numbers(name: str, words: list[str], least: int, unit: int) -> tuple[int, ...]:
  """The whole numbers of a flag, each a multiple of `unit` and at least `least`."""
  try:
    numbers = tuple(int(word) for word in words)
  except ValueError:
    numbers = ()
  if not numbers or any(number < least or number % unit for number in numbers):
    raise UserError(
      f"--{name}={','.join(words)} is refused; give numbers of bytes, at least {least} and"
      f" multiples of {unit}."
    )
  return numbers


def run(values: flags.FlagValues):
  """Measures what the flags say.

  Raises:
    UserError: a flag is refused, or a sum is wrong.
    InterruptedRunError: a task was lost.
  """
  settings, path = _settings(values), output.output_path("--json", values.json)
  cluster = read_cluster()
  from tf_largebatch.distributed.lost_tasks import report_lost_tasks

  with report_lost_tasks(cluster, lambda: None):
    found = measure(cluster, settings)
  if found and path and cluster.is_chief:
    output.write_json("--json", path, found)


def main():
  run(flags.FLAGS)


if __name__ == "__main__":
  program.run(main, define_flags)
