r"""Forecasts a step, an epoch and a run on 8 to 10 000 GPUs from one measured step.

  python -m tools.forecast --step_seconds=0.18 --overlap=backprop
  python -m tools.forecast --measured=step.json --allreduce=two_tasks.json --gpus=8,64,512
  python -m tools.forecast --measured=step.json --allreduce=two_tasks.json --tasks=1,2,4 --cores=2
  python -m tools.forecast --paper

A step of p GPUs with n images each takes as long as one GPU's step, plus the wait for the slowest
server, plus the part of the all-reduce that backprop does not hide. Flags describe the cluster, so
a flagfile (--flagfile=cluster.flags) can describe one. --tasks forecasts a fixed recipe of k
workers on tasks that share the cores of this machine, where nothing is hidden. --paper compares the
model with what Goyal et al. 2017 (arXiv 1706.02677) report of their own cluster: first from the
paper's inputs and stated assumptions alone, then with a step jitter fitted to the growth of the
iteration time, which leaves only the efficiency to compare (a weak test: whatever grows by 12 % by
352 GPUs has grown by about 11 % at 256). The program measures nothing and needs no TensorFlow.

The model leaves out input, other jobs on the network and the rounding of an epoch to whole steps.
"""

import dataclasses
import json

from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import NETWORKS
from tools import program
from tools.forecasting.allreduce import ALGORITHMS, fit
from tools.forecasting.layers import gradient_layers
from tools.forecasting.measurements import MeasuredStep, positive, read_points, read_step
from tools.forecasting.model import Cluster, Step, forecast_gpus, forecast_tasks
from tools.forecasting.paper import compare_with_paper

_GPUS = ["8", "16", "32", "64", "128", "256", "352", "512", "1024", "2048", "4096", "10000"]
_SHOWN, _NEEDED = "first_gpus_with_over_1_percent_exposed", "network_gigabits_needed_there"
_POSITIVE_FLAGS = (
  *("step_seconds", "backward_share", "image_size", "gradient_bytes", "images_per_gpu", "epochs"),
  *("gpus_per_server", "server_bandwidth", "network_gigabits", "network_overhead", "cores"),
  *("workers", "epoch_examples"),
)


def define_flags():
  flags.DEFINE_string("measured", None, "JSON of tools.benchmark.step: a replica's step.")
  flags.DEFINE_float("step_seconds", None, "A GPU's step without communication, seconds.")
  flags.DEFINE_float("backward_share", 2 / 3, "Share of backprop in a pass.")
  flags.DEFINE_float(
    "step_jitter", None, "Coefficient of variation of a server's steps; left out: as measured."
  )
  flags.DEFINE_enum("network", "resnet50", list(NETWORKS), "As in the recipe.")
  flags.DEFINE_integer("image_size", 224, "Height and width.")
  flags.DEFINE_float("gradient_bytes", None, "Of a step; left out: 4 per parameter.")
  flags.DEFINE_integer("images_per_gpu", 32, "n, without --measured.")
  # "none" where XLA compiles the passes; "backprop": the last pass hides what it can.
  flags.DEFINE_enum("overlap", "none", ["none", "backprop"], "What hides communication.")
  flags.DEFINE_float(
    "bytes_per_pack",
    2**24,
    "With --overlap=backprop, the fewest bytes of gradients sent together; 0: all at once.",
  )
  flags.DEFINE_integer("gpus_per_server", 8, "GPUs that share a network card.")
  flags.DEFINE_float("server_bandwidth", 20e9, "Of a GPU within its server, bytes/s.")
  flags.DEFINE_float("server_latency", 1e-5, "Of a message within a server, seconds.")
  flags.DEFINE_float("network_gigabits", 50, "Of a server's network, Gbit/s.")
  flags.DEFINE_float("network_overhead", 15 / 12.8, "Bits sent per bit of gradients (§4).")
  flags.DEFINE_float("network_latency", 5e-5, "Of a message between servers, seconds.")
  flags.DEFINE_enum("algorithm", "auto", [*ALGORITHMS, "auto"], "auto: the fastest.")
  flags.DEFINE_list("allreduce", [], "JSON of tools.benchmark.allreduce, to fit the network to.")
  flags.DEFINE_list("gpus", _GPUS, "Numbers of GPUs; the first is what others are compared with.")
  flags.DEFINE_float("epochs", 90, "Of a run.")
  flags.DEFINE_integer("epoch_examples", 1_281_167, "Images of an epoch.")
  flags.DEFINE_list("tasks", [], "Forecast these numbers of tasks, one core each, on this machine.")
  flags.DEFINE_integer("cores", 1, "With --tasks, the cores of the machine.")
  flags.DEFINE_integer("workers", None, "With --tasks, k of the recipe; left out: as measured.")
  flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
  flags.DEFINE_bool("paper", False, "Compare with the paper's figures.")


def _check_flags(values: flags.FlagValues):
  for name in _POSITIVE_FLAGS:
    if values[name].value is not None:
      positive(name, values[name].value)
  for name in ("server_latency", "network_latency", "bytes_per_pack", "step_jitter"):
    positive(name, values[name].value or 0, zero=True)
  if values.backward_share > 1:
    raise UserError(f"backward_share={values.backward_share} is refused; it must be at most 1.")


def _cluster_from_flags(values: flags.FlagValues) -> Cluster:
  return Cluster(
    gpus_per_server=values.gpus_per_server,
    server_bandwidth=values.server_bandwidth,
    server_latency=values.server_latency,
    network_bandwidth=values.network_gigabits * 1e9 / 8 / values.network_overhead,
    network_latency=values.network_latency,
    algorithm=values.algorithm,
  )


def _step_from_flags(values: flags.FlagValues) -> tuple[Step, int]:
  """Returns the step, and the workers of its replica."""
  if values.measured:
    measured = read_step(values.measured)
  elif values.step_seconds is not None:
    measured = MeasuredStep(
      seconds=values.step_seconds,
      passes=1,
      workers=1,
      images=values.images_per_gpu,
      network=values.network,
      image_size=values.image_size,
      gradient_bytes=values.gradient_bytes,
      jitter=0.0,
    )
  else:
    raise UserError("Give --measured=FILE or --step_seconds=SECONDS (or --paper).")
  step = Step(
    seconds=measured.seconds,
    backward_seconds=values.backward_share * measured.seconds / measured.passes,
    images=measured.images,
    layers=gradient_layers(measured.network, measured.image_size, measured.gradient_bytes),
    jitter=measured.jitter if values.step_jitter is None else values.step_jitter,
    overlap=values.overlap == "backprop",
    bytes_per_pack=values.bytes_per_pack,
  )
  return step, measured.workers


def report(values: flags.FlagValues) -> dict:
  """Returns what the flags ask for: the rows of a table, and further results by name."""
  _check_flags(values)
  cluster = _cluster_from_flags(values)
  if values.paper:
    names = ("server_bandwidth", "server_latency", "network_latency", "backward_share")
    rows = compare_with_paper(cluster, values.backward_share)
    return {"assumed": {name: values[name].value for name in names}, "rows": rows}
  step, step_workers = _step_from_flags(values)
  points = [point for path in values.allreduce for point in read_points(path)]
  found = {"step_jitter": step.jitter}
  if values.tasks:
    tasks = program.whole_numbers("tasks", values.tasks)
    # Tasks that share cores also send more slowly, so points of as many tasks are preferred.
    fits = {t: fit([p for p in points if p[2] == t] or points) for t in tasks if t > 1}
    workers = values.workers or step_workers
    rows = forecast_tasks(step, step_workers, workers, tasks, values.cores, fits)
    return {**found, "fits": fits, "rows": rows}
  overhead = values.network_overhead
  if values.allreduce:
    found["fit"] = fit(points)
    overhead = 1.0  # The bandwidth was measured in bytes of gradients.
    cluster = dataclasses.replace(
      cluster,
      network_latency=found["fit"]["latency_seconds"],
      network_bandwidth=found["fit"]["bandwidth_bytes_per_second"],
    )
  gpus = program.whole_numbers("gpus", values.gpus)
  rows = forecast_gpus(step, cluster, gpus, values.epochs * values.epoch_examples, overhead)
  shown = next((row for row in rows if not row["hidden"]), {})
  found[_SHOWN] = shown.get("gpus")
  found[_NEEDED] = shown.get("needed_gigabits")
  return {**found, "rows": rows}


def table(rows: list[dict]) -> str:
  """Aligns the rows in columns, with numbers to five digits."""

  def text(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "-" if value is None else str(value)

  lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines
  )


def main():
  values = flags.FLAGS
  found = report(values)
  if values.json:
    print(json.dumps(found, indent=2))
    return
  print(table(found.pop("rows")))
  gpus, gigabits = found.pop(_SHOWN, None), found.pop(_NEEDED, None)
  print(*(f"{name}: {json.dumps(value)}" for name, value in found.items()), sep="\n")
  if gpus:
    network = f"a network of {gigabits:.4g} Gbit/s" if gigabits else "no network, however fast,"
    print(f"Over 1 % of a step is first exposed at {gpus} GPUs; {network} would hide it there.")
  elif not (values.paper or values.tasks):
    print("Over 1 % of a step is exposed nowhere.")


if __name__ == "__main__":
  program.run(main, define_flags)
