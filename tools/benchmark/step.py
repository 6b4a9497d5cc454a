r"""Compares the speed of a training step with Keras, PyTorch and the limit of the hardware.

  python -m tools.benchmark.step --contenders=ours,keras,fit,torch --network=resnet50 \
    --image_size=224 --dtype=float32 --repeats=5 --json=step.json

Every field of the recipe is a flag, so the trainer's flagfiles work here too. Each contender runs
in a process of its own, on the same random images; on a machine with several GPUs all use the first
one. They take turns: in each repeat every contender takes one untimed step and then --steps timed
ones, while the others wait.

  ours            the compiled step of `step.make_train_step`, called as the trainer calls it
  loop            the trainer's loop around that step, with its metrics, and input from memory. Each
                  repeat times bare step, loop, loop, bare step in the same process and compares
                  them. On a CPU, where a step has finished when it returns, the tool also reports
                  the share of the loop's time that is spent in the step; this share does not depend
                  on how fast the machine is
  evaluate        an evaluation of the kn images, in the recipe's evaluation_dtype
  keras           the same network of stock Keras layers with Keras' SGD, in a plain compiled step
  fit             the same with `Model.fit`
  our_fit         the same with this package's `fit`
  torch           the same network in PyTorch, eager, channels_last (16 bits: with autocast)
  torch_compiled  the same with `torch.compile`

A contender takes options, as in `ours:workers=8:tasks=2`:
- fields of the recipe, and the run options workers_per_pass, jit_compile, allreduce_dtype and
  bytes_per_pack;
- environment variables (TF_ENABLE_ONEDNN_OPTS=0);
- cores: how many logical CPUs to use;
- layers (only fit and our_fit): "stock" or "ours", whose model and optimizer it trains;
- tasks (only ours): processes that train together and share the cores evenly.
Keras and PyTorch process the kn images of k workers in k passes and accumulate the gradients, as is
usual there; fit makes k updates instead.

FLOPs are those of convolutions and dense layers, two per multiply-add. Backprop counts as twice the
forward pass, less the gradient of the first layer's input. The ceiling of a contender is a large
matrix product in its dtype on its cores, timed in the same repeats: by TensorFlow (oneDNN, cuBLAS),
or by NumPy's OpenBLAS if that is faster in float32 on this CPU.

--profile lists the operations that take most of each contender's step (not of PyTorch's): on a CPU
in seconds summed over all threads, on a GPU in seconds of its kernels.
"""

import contextlib
import statistics
import sys
import tempfile

from absl import flags

from tf_largebatch import command_line
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import hardware, output, program
from tools.benchmark import harness
from tools.benchmark.contenders.ceiling import ceiling_of, count_work, product_flops
from tools.benchmark.contenders.contender import STEP_OPTIONS, Contender, parse_contender
from tools.benchmark.contenders.tasks import Tasks

_OPERATIONS = 12  # In the table; the JSON file has all.


def define_flags():
  flags.DEFINE_list("contenders", ["ours", "keras", "torch"], "See above; ratios are to the first.")
  flags.DEFINE_integer("repeats", 5, "How often each contender is timed.", lower_bound=1)
  flags.DEFINE_integer("steps", 1, "Timed steps in a repeat.", lower_bound=1)
  flags.DEFINE_string("json", None, "File for the results, as JSON.")
  flags.DEFINE_boolean("profile", False, "Also list the operations that take most of a step.")


def measure(contenders: list[Contender], repeats: int, steps: int, profile: bool) -> dict:
  """The reports of each contender and of its `ceiling_of`, by name.

  Raises:
    UserError: none of the contenders could be measured.
  """
  products = {product.name: product for product in map(ceiling_of, contenders)}
  results, running = {}, []
  with contextlib.ExitStack() as stack:
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    for contender in [*contenders, *products.values()]:
      scratch = tempfile.mkdtemp(dir=directory)
      started = stack.enter_context(contextlib.ExitStack())
      tasks = started.enter_context(Tasks(contender, scratch))
      try:  # One contender after another, because compiling keeps all cores busy.
        results[contender.name] = {"ready": tasks.wait_until_ready(), "repeats": []}
        running.append(tasks)
      except UserError as error:
        if contender.kind == "product":
          raise
        print(f"not measured: {error}", file=sys.stderr, flush=True)
        started.close()
    for repeat, tasks in harness.rotate(running, repeats):
      report, name = tasks.run(steps), tasks.contender.name
      results[name]["repeats"].append(report)
      seconds = report["seconds"] / steps
      line = f"repeat {repeat + 1} of {repeats}: {name}: {seconds:.3f} s"
      print(line, file=sys.stderr, flush=True)
    if profile:
      for tasks in running:
        results[tasks.contender.name]["operations"] = tasks.profile()
  if not set(results) - set(products):
    raise UserError("None of the contenders could be measured.")
  return results


def summarize(contenders: list[Contender], results: dict, steps: int, work: dict) -> dict:
  """The figures of each contender, by name; a "ratio" is the first's median over this one's.

  Args:
    contenders, steps: as for `measure`.
    results: of `measure`.
    work: `count_work` of each contender that was measured, by name.
  """
  ceilings = {}
  for name in dict.fromkeys(ceiling_of(contender).name for contender in contenders):
    reports = results[name]["repeats"]
    seconds = statistics.median(report["seconds"] for report in reports)
    ceilings[name] = product_flops("gpu_peak_bytes" in reports[0]) * steps / seconds
  rows = {
    contender.name: _row(contender, results[contender.name], steps, work[contender.name], ceilings)
    for contender in contenders
    if contender.name in results
  }
  base = next(iter(rows.values()))["images_per_second"]
  for row in rows.values():
    row["ratio"] = base / row["images_per_second"]
  return {"contenders": rows, "ceilings_flops_per_second": ceilings}


def _row(contender: Contender, found: dict, steps: int, work: dict, ceilings: dict) -> dict:
  """The figures of a contender, all but the ratio."""
  recipe, reports = Recipe(**contender.recipe), found["repeats"]
  each = [report["seconds"] / steps for report in reports]
  seconds = statistics.median(each)
  images = recipe.global_batch_size
  flops = images * work["forward_flops" if contender.kind == "evaluate" else "flops"] / seconds
  row = {
    "kind": contender.kind,
    "network": recipe.network,
    "image_size": recipe.image_size,
    "per_worker_batch_size": recipe.per_worker_batch_size,
    "workers": recipe.workers,
    "passes": found["ready"]["passes"],
    "tasks": contender.tasks,
    "cores": contender.cores,
    "dtype": recipe.dtype,
    "step_options": contender.step_options,
    "gradient_bytes": 4 * work["parameters"],
    "steps": steps,
    "step_seconds": seconds,
    "step_seconds_each": each,
    "images_per_second": images / seconds,
    "cpu_seconds": statistics.median(report["cpu_seconds"] / steps for report in reports),
    "flops_per_second": flops,
    "share_of_ceiling": flops / ceilings[ceiling_of(contender).name],
    "peak_bytes": reports[-1]["peak_bytes"],
    "gpu_peak_bytes": reports[-1].get("gpu_peak_bytes"),
    "operations": found.get("operations", {}),
  }
  if contender.kind == "loop":
    shares = [report["bare_seconds"] / report["seconds"] for report in reports]
    row["share_of_bare_step"] = statistics.median(shares)
    row["share_of_bare_step_each"] = shares
    within = statistics.median(report["share_within_steps"] for report in reports)
    on_gpu = "gpu_peak_bytes" in reports[-1]  # There a step returns before it has finished.
    row["share_within_steps"] = None if on_gpu else within
  return row


def to_table(summary: dict) -> list[str]:
  """The lines to print."""
  rows = summary["contenders"]
  width = max(map(len, ["contender", *rows]))
  heading = ("images/s", "[min–max]", "first/this", "GFLOP/s", "of ceiling", "peak MiB")
  lines = [output.table_line("contender", width, heading, 16)]
  for name, row in rows.items():
    images = row["images_per_second"] * row["step_seconds"]
    slowest, fastest = (images / pick(row["step_seconds_each"]) for pick in (max, min))
    cells = (
      f"{row['images_per_second']:.2f}",
      f"[{slowest:.2f}–{fastest:.2f}]",
      f"{row['ratio']:.3f}",
      f"{row['flops_per_second'] / 1e9:.1f}",
      f"{row['share_of_ceiling']:.0%}",
      f"{(row['gpu_peak_bytes'] or row['peak_bytes']) / 2**20:.0f}",
    )
    lines.append(output.table_line(name, width, cells, 16))
  for name, row in rows.items():
    lines += [f"{name}: {note}" for note in _notes(row)]
  for name, ceiling in summary["ceilings_flops_per_second"].items():
    lines.append(f"ceiling: {name} at {ceiling / 1e9:.1f} GFLOP/s")
  return lines


def _notes(row: dict) -> list[str]:
  """What the table has no columns for: a loop's shares, and the operations."""
  notes = []
  if "share_of_bare_step" in row:
    each = row["share_of_bare_step_each"]
    share = f"{row['share_of_bare_step']:.1%} [{min(each):.1%}–{max(each):.1%}]"
    notes.append(f"{share} of the images/s of its bare step")
    if row["share_within_steps"]:
      notes.append(f"{row['share_within_steps']:.2%} of the loop's time is spent in the step")
  if row["operations"]:
    total = sum(row["operations"].values())
    largest = list(row["operations"].items())[:_OPERATIONS]
    shares = ", ".join(f"{kind} {seconds / total:.1%}" for kind, seconds in largest)
    notes.append(f"{total:.3f} s: {shares}")
  return notes


def _contenders_from_flags() -> list[Contender]:
  recipe = command_line.recipe_from_flags().to_dict()
  recipe["workers"] = recipe["workers"] or 1
  recipe["image_size"] = recipe["image_size"] or 224
  for name, default in (
    ("channel_mean", (123.675, 116.28, 103.53)),
    ("channel_std", (58.395, 57.12, 57.375)),
  ):
    recipe[name] = recipe[name] or default
  options = command_line.options_from_flags()
  options = {name: getattr(options, name) for name in STEP_OPTIONS}
  return [parse_contender(text, recipe, options) for text in flags.FLAGS.contenders]


def main():
  values = flags.FLAGS
  harness.exit_on_sigterm()
  path = output.output_path("--json", values.json)
  contenders = _contenders_from_flags()
  results = measure(contenders, values.repeats, values.steps, values.profile)
  # Only now, when TensorFlow no longer takes memory, of the GPU either, from a contender.
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")
  measured = [contender for contender in contenders if contender.name in results]
  work = {contender.name: count_work(Recipe(**contender.recipe)) for contender in measured}
  summary = summarize(contenders, results, values.steps, work)
  print("\n".join(to_table(summary)))
  if path:
    summary["versions"] = hardware.versions("tensorflow", "keras", "torch", "numpy")
    summary["hardware"] = hardware.describe()
    output.write_json("--json", path, summary)


if __name__ == "__main__":
  program.run(main, define_flags)
