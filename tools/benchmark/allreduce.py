r"""Times all-reduces on your cluster, by size and as the step's own; do they hide behind backprop?

  python -m tools.benchmark.allreduce --step_seconds=0.2 --json=allreduce.json
  python -m tools.launch_local --tasks=2 --module=tools.benchmark.allreduce -- --network=resnet20

Runs under the same launch as a training run: alone on the GPUs of a machine, or in every task with
its `TF_CONFIG`. The first result of each is checked: small whole numbers, so float32's sum must be
exact (bfloat16's within its rounding). Then --turns results are fetched one after the other; the
chief tells median, least and most seconds, the wait for the slowest replica included.

by size: one float32 tensor. Bus bandwidth is 2 (p - 1) / p · bytes / seconds for p replicas, as in
  nccl-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): what each link of a ring carries.
the step's: the network's gradients, moving statistics and three scalars, as `step.py` adds them up,
  in packs of --bytes_per_pack (0: TensorFlow's default, one pack of all). With --wire=bfloat16 the
  gradients are cast, reduced and cast back; the rest stays float32, in a collective of its own, for
  a pack has one dtype. Casting and packing are timed too.
by class: the step's tensors of like size, each class reduced alone in one pack.
verdict: on the first of the step's reductions, with --step_seconds: the seconds of a step without
  communication (one replica alone with its share of the workers), and --passes: in how many passes
  it takes them, of which only the last one's backprop can hide anything. One pack waits for all
  gradients; only of several can the first go while backprop goes on.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Callable

# TensorFlow and Keras are imported where they are used, after the flags are found right.
import numpy as np
from absl import app, flags

from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.recipe import NETWORKS
from tf_largebatch.signals import end_process
from tools.forecast import usual_classes

_WARM_UP = 2  # Calls after the first, which is checked.
_CLASSES = (2**10, 2**14, 2**18, 2**22)  # Upper bounds in bytes; the last class has none.
_WIRES = ("float32", "bfloat16")
# Of a layer's three products (output, gradients by its input and by its weights) backprop does two.
_BACKPROP = 2 / 3


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_list("sizes", [str(4**i) for i in range(5, 15)], "Bytes of a message.")
  flags.DEFINE_integer("turns", 5, "Timed calls of each.", lower_bound=1)
  flags.DEFINE_enum("network", "resnet50", NETWORKS, "As in the recipe.")
  flags.DEFINE_integer(
    "num_classes", None, "Width of the logits; left out: ImageNet's or CIFAR-10's.", lower_bound=1
  )
  packs = [str(size) for size in (0, 2**22, 2**24, 2**26)]
  flags.DEFINE_list("bytes_per_pack", packs, "Least bytes of a collective; 0: all in one.")
  flags.DEFINE_multi_enum("wire", list(_WIRES), _WIRES, "What gradients are sent as.")
  flags.DEFINE_float(
    "step_seconds", 0.0, "Of a step without communication; 0: no verdict.", lower_bound=0
  )
  flags.DEFINE_integer("passes", 1, "Of a replica's workers in that step.", lower_bound=1)
  flags.DEFINE_string("json", "", "File for what was measured, written by the chief.")
  flags.DEFINE_enum("communication", "auto", ["auto", "nccl", "ring"], "As in a training run.")
  flags.DEFINE_float("cluster_timeout_minutes", 10.0, "For all tasks to come up.", lower_bound=0)


def bus_bytes_per_second(size: int, replicas: int, seconds: float) -> float:
  """Of an all-reduce of `size` bytes, by the convention of nccl-tests."""
  return 2 * (replicas - 1) / replicas * size / seconds


def judge(seconds: float, step_seconds: float, passes: int) -> dict:
  """What a reduction costs beside a step's computation of so many passes, both in seconds."""
  share = seconds / (step_seconds + seconds)
  return {"share_of_step": share, "can_hide": seconds <= _BACKPROP * step_seconds / passes}


def _pattern(shape) -> np.ndarray:
  """1, 2, … 7, 1, … float32: sums of 2000 replicas' are exact, and chunks of a ring differ."""
  return np.resize(np.arange(1, 8, dtype=np.float32), shape)


@functools.cache  # So that nothing is traced twice.
def _make_reduce(strategy, bytes_per_pack: int = 0, wire: str = "float32") -> Callable:
  """(gradients, others), lists of tensors → (a number that waits for all sums, the sums)."""
  import tensorflow as tf

  options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=bytes_per_pack)

  def replica(gradients, others):
    # Copies on this replica's device, where the all-reduce looks for what it adds up.
    gradients, others = tf.nest.map_structure(tf.identity, (gradients, others))
    context = tf.distribute.get_replica_context()

    def total(tensors):
      return list(context.all_reduce(tf.distribute.ReduceOp.SUM, tensors, options))

    if wire == "float32":
      totals = total([*gradients, *others])
    else:
      totals = total([tf.cast(gradient, wire) for gradient in gradients])
      totals = [tf.cast(each, tf.float32) for each in totals] + total(others)
    return tf.add_n([tf.reshape(each, [-1])[0] for each in totals]), totals

  return tf.function(lambda *lists: strategy.run(replica, args=lists), autograph=False)


def _on_replicas(strategy, value: Callable, gradients, others) -> tuple[list, list]:
  """`value(pattern, replica)` for the shapes, made on every replica before anything is timed."""
  import tensorflow as tf

  @tf.function(autograph=False)
  def make(patterns):
    def replica(patterns):
      rank = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
      return [value(pattern, rank) for pattern in patterns]

    return strategy.run(replica, args=(patterns,))

  made = make([tf.constant(_pattern(shape)) for shape in (*gradients, *others)])
  return made[: len(gradients)], made[len(gradients) :]


def _time(strategy, gradients, others, turns: int, bytes_per_pack: int = 0, wire: str = "float32"):
  """Figures of an all-reduce of tensors of these shapes, by name; seconds are the median.

  Raises:
    UserError: a sum is wrong.
  """
  replicas, local = strategy.num_replicas_in_sync, strategy.experimental_local_results
  reduce = _make_reduce(strategy, bytes_per_pack, wire)
  # Replica r adds r + 1 patterns.
  inputs = _on_replicas(strategy, lambda x, r: x * (r + 1), gradients, others)
  # Of bfloat16 each of p roundings and additions keeps 8 bits.
  limit = 0.0 if wire == "float32" else replicas * 2.0**-8
  for shape, total in zip((*gradients, *others), reduce(*inputs)[1], strict=True):
    expected = _pattern(shape) * (replicas * (replicas + 1) / 2)
    off = max(np.max(np.abs(copy.numpy() / expected - 1)) for copy in local(total))
    if not off <= limit:  # NaN neither.
      raise UserError(
        f"The sum of a {wire} tensor of shape {shape} over {replicas} replicas is wrong: relative"
        f" error {off:.3g}, limit {limit:g}; do not train with these collectives."
      )
  seconds = []
  for _ in range(_WARM_UP + turns):
    began = time.perf_counter()
    for number in local(reduce(*inputs)[0]):
      float(number)  # Waits for the device.
    seconds.append(time.perf_counter() - began)
  seconds = seconds[_WARM_UP:]
  operations = reduce.get_concrete_function(*inputs).graph.get_operations()
  collectives = sum(operation.type == "CollectiveReduceV2" for operation in operations)
  return {
    "seconds": statistics.median(seconds),
    "min": min(seconds),
    "max": max(seconds),
    "collectives": collectives // len(local(total)),  # Of each replica.
  }


def _bfloat16_error(strategy, gradients, others, bytes_per_pack: int) -> float:
  """‖sum sent as bfloat16 - sum sent as float32‖ / ‖the latter‖, of normal random gradients."""
  import tensorflow as tf

  places = itertools.count()  # A tensor's place is half of its seed.

  def value(pattern, rank):
    seed = tf.stack([tf.cast(rank, tf.int32), next(places)])
    return 1e-3 * tf.random.stateless_normal(pattern.shape, seed)

  inputs, sums = _on_replicas(strategy, value, gradients, others), []
  for wire in _WIRES:
    totals = _make_reduce(strategy, bytes_per_pack, wire)(*inputs)[1][: len(gradients)]
    sums.append([strategy.experimental_local_results(total)[0] for total in totals])
  errors = [rounded - exact for exact, rounded in zip(*sums, strict=True)]
  return float(tf.linalg.global_norm(errors) / tf.linalg.global_norm(sums[0]))


def _shapes(network: str, num_classes: int) -> tuple[list, list]:
  """Of the gradients, and of what `step.py` adds up beside them: statistics, loss, error, stop."""
  import keras

  from tf_largebatch.models import resnet

  model = resnet.build(
    network,
    input_shape=(32, 32, 3),  # No weight's shape depends on the image's.
    num_classes=num_classes,
    normalization=keras.layers.BatchNormalization,
    channel_mean=(0.0,) * 3,
    channel_std=(1.0,) * 3,
  )
  gradients = [tuple(variable.shape) for variable in model.trainable_variables]
  return gradients, [*(tuple(v.shape) for v in model.non_trainable_variables), (), (), ()]


def _bytes(shapes) -> int:
  return 4 * sum(math.prod(shape) for shape in shapes)


def _class_of(shape) -> int:
  return sum(_bytes([shape]) > bound for bound in _CLASSES)


def measure(cluster: Cluster, values: flags.FlagValues, lists: dict) -> dict | None:
  """Prints the tables on the chief; returns what --json holds, None on one replica.

  Args:
    cluster: what `read_cluster` returned.
    values: the flags.
    lists: the flags that are lists, checked, by name.
  """
  from tf_largebatch.distributed.strategy import describe, make_strategy

  strategy = make_strategy(cluster, values.communication, values.cluster_timeout_minutes)
  import tensorflow as tf

  tf.get_logger().setLevel("ERROR")  # Every list of shapes is traced for itself, as it should be.
  replicas, step_seconds = strategy.num_replicas_in_sync, values.step_seconds

  def say(line: str):
    if cluster.is_chief:
      print(line, flush=True)

  def row(label, timed: dict | None, last: str = ""):
    columns = ["median s", "least", "most", "collectives"]
    if timed:
      columns = [f"{timed[name]:.6f}" for name in ("seconds", "min", "max")]
      columns.append(str(timed["collectives"]))
    say(f"{label:>26}{''.join(f'{column:>12}' for column in columns)}{last:>14}")

  if replicas == 1:
    say("1 replica: there is nothing to reduce, and nothing was measured.")
    return None
  num_classes = values.num_classes or usual_classes(values.network)
  facts = (lists, values.turns, values.network, num_classes)
  digest = tf.constant(zlib.crc32(repr(facts).encode()), tf.float64)
  total = _make_reduce(strategy)([digest], [])[0]
  if float(strategy.experimental_local_results(total)[0]) != replicas * float(digest):
    raise UserError("The tasks do not agree: give all of them the same flags.")
  found = describe(strategy, cluster, values.communication)
  say(", ".join(f"{name} {value}" for name, value in found.items()) + "\n")

  row("bytes", None, "bus MB/s")
  points = []
  for size in lists["sizes"]:
    timed = _time(strategy, [(size // 4,)], [], values.turns)
    bandwidth = bus_bytes_per_second(size, replicas, timed["seconds"])
    points.append({"bytes": size, **timed, "bus_bytes_per_second": bandwidth})
    row(size, timed, f"{bandwidth / 1e6:.1f}")

  gradients, others = _shapes(values.network, num_classes)
  network = {"name": values.network, "step_seconds": step_seconds, "reductions": [], "classes": []}
  for name, shapes in (("gradients", gradients), ("others", others)):
    network[name] = {"tensors": len(shapes), "bytes": _bytes(shapes)}
  say("\n{name}: gradients {gradients}, others {others}".format(**network))
  row("wire, bytes per pack", None, "of a step" if step_seconds else "")
  for wire, pack in itertools.product(lists["wire"], lists["bytes_per_pack"]):
    timed = _time(strategy, gradients, others, values.turns, pack, wire)
    verdict = judge(timed["seconds"], step_seconds, values.passes) if step_seconds else {}
    network["reductions"].append({"wire": wire, "bytes_per_pack": pack, **timed, **verdict})
    row(f"{wire}, {pack}", timed, f"{100 * verdict['share_of_step']:.2f} %" if verdict else "")
  if "bfloat16" in lists["wire"]:
    network["bfloat16_relative_error"] = error = _bfloat16_error(
      strategy, gradients, others, lists["bytes_per_pack"][0]
    )
    say(f"Sent as bfloat16, the sum of random gradients has a relative error of {error:.3g}.")

  say("")
  row("tensors, bytes in all", None, "largest")
  for _, group in itertools.groupby(sorted([*gradients, *others], key=_class_of), _class_of):
    shapes = list(group)
    timed = _time(strategy, shapes, [], values.turns)
    sizes = {"bytes": _bytes(shapes), "largest_bytes": max(_bytes([shape]) for shape in shapes)}
    network["classes"].append({"tensors": len(shapes), **sizes, **timed})
    row(f"{len(shapes)}, {sizes['bytes']}", timed, str(sizes["largest_bytes"]))

  if step_seconds:
    first = network["reductions"][0]
    answer = "no"
    if first["can_hide"]:
      answer = "yes" if first["collectives"] > 1 else "yes, but only in several packs"
    behind = "the last pass' backprop" if values.passes > 1 else "backprop"
    hiding = _BACKPROP * step_seconds / values.passes
    network["verdict"] = (
      f"Communication ({first['wire']}, {first['bytes_per_pack']} bytes per pack) costs"
      f" {100 * first['share_of_step']:.3g} % of the step at this recipe if nothing is hidden:"
      f" {first['seconds']:.3g} s beside {step_seconds:.3g} s of computation. It can hide behind"
      f" {behind} (2/3 of a pass, {hiding:.3g} s): {answer}."
    )
    say(f"\n{network['verdict']}")
  with contextlib.suppress(tf.errors.OpError):
    # All end at once, for one that ends early takes along what the others still fetch from it.
    _make_reduce(strategy)([digest], [])
  packages = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")}
  found |= {"turns": values.turns, "points": points, "network": network}
  return {**found, "versions": {"python": platform.python_version(), **packages}}


def _numbers(name: str, words: list[str], least: int, unit: int) -> list[int]:
  """The whole numbers of a flag, each a multiple of `unit` and not below `least`."""
  try:
    numbers = [int(word) for word in words]
  except ValueError:
    numbers = []
  if not numbers or any(number < least or number % unit for number in numbers):
    raise UserError(
      f"--{name}={','.join(words)} is refused; give numbers of bytes from {least} on,"
      f" multiples of {unit}."
    )
  return numbers


def _run(values: flags.FlagValues, left: list[str]):
  if left:
    raise UserError(f"Unexpected argument {left[0]!r}; every option is a flag, --name=value.")
  sizes = _numbers("sizes", values.sizes, 4, 4)  # A float32's.
  lists = {
    "sizes": sizes,
    "bytes_per_pack": _numbers("bytes_per_pack", values.bytes_per_pack, 0, 1),
  }
  lists["wire"] = values.wire
  if not math.isfinite(values.step_seconds):
    raise UserError(f"--step_seconds={values.step_seconds} is refused; give a finite number.")
  path = os.path.expanduser(values.json)
  if path and not os.path.isdir(os.path.dirname(path) or "."):
    raise UserError(f"--json={values.json}: there is no such directory; make it first.")
  cluster = read_cluster()
  from tf_largebatch.distributed.lost_tasks import report_lost_tasks

  with report_lost_tasks(cluster, lambda: None):
    found = measure(cluster, values, lists)
  if found and path and cluster.is_chief:
    try:
      with open(path, "w") as file:
        file.write(json.dumps(found, indent=2) + "\n")
    except OSError as error:
      raise UserError(f"--json={values.json} cannot be written ({error.strerror}).") from error


def main(argv: list[str]) -> int:
  try:
    _run(flags.FLAGS, argv[1:])
    return 0
  except (UserError, InterruptedRunError) as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    if isinstance(error, InterruptedRunError):
      end_process(error.status)
    return error.status


if __name__ == "__main__":
  define_flags()
  app.run(main)
