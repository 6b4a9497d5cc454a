r"""Times how fast training batches are read: by this package, by others, and by the decoder alone.

  python -m tools.benchmark.input_pipeline --data_dir=data --json=input.json
  python -m tools.benchmark.input_pipeline --data_dir=data --readers="ours,dali" --cores=8
  python -m tools.benchmark.input_pipeline --data_dir=data --pixels=500

All readers do the same to the same JPEGs of a prepared data set: random crops of 8–100 % of the
area with aspect ratios of 3/4 to 4/3, resized to 224×224 (bilinear), flipped at random, in batches
of 32.

  ours               `input_pipeline.train_dataset`, called as a training run calls it
  ours skip          the same with --bad_examples=skip
  ours in order      the same in the order of the shards: shows what the exact shuffle costs
  decode whole       simple tf.data: shards in order, whole images decoded and then cropped
  model garden       the TensorFlow Model Garden's input for ResNet (official/vision): interleaved
                     shards, a shuffle buffer of 10 000 records; float32, normalised
  model garden uint8 the same without the normalisation
  pillow             the classic way in PyTorch: files as in torchvision's ImageFolder, processes as
                     in DataLoader, which decode with Pillow and return batches in shared memory
  dali               NVIDIA DALI on the CPU, from the same files, resized without antialiasing, as
                     in ours (with it DALI takes longer)
  bare libjpeg-turbo the upper limit: only TensorFlow's decoder, called as in ours, and its bilinear
                     resize, on JPEGs in memory with crops drawn beforehand

In each of --repeats repeats every reader runs once, alone, in a new process, on the same --cores
logical CPUs; each repeat starts with another reader. Neither the time until the first batch (start,
tracing, filling a shuffle buffer) nor the next --warm_up seconds are counted. The table shows
medians over the repeats [min–max], user and system time per image, and the median of ours divided
by each reader's.

The readers read the first --examples of the split again and again, so that they come from memory
rather than from a disk. The examples are also written to a temporary directory (TMPDIR), about
1.2 GB.

--pixels=N compares libjpeg's settings instead of readers. For N crops it shows how far the pixels
are from those of the exact DCT with fancy upscaling of the chroma (mean |Δ|, mean Δ and maximum, in
grey levels, as decoded and after the resize), and it times bare libjpeg-turbo with each setting.
"""

import dataclasses
import os
import statistics
import sys
import tempfile

from absl import flags

from tf_largebatch.errors import UserError
from tools import hardware, output, program
from tools.benchmark import harness
from tools.benchmark.readers.jobs import run_alone
from tools.benchmark.readers.pixels import DECODERS
from tools.benchmark.readers.task import BATCH, SIDE, Task
from tools.benchmark.readers.timing import READERS

_OTHERS = 0.1  # Cores that the rest of the machine may use without a note.


def define_flags():
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  )
  flags.DEFINE_string("dataset", "imagenet2012", "A data set of JPEGs, prepared as TFRecords.")
  flags.DEFINE_string("split", "train", "Split to read, or a slice such as train[:2000].")
  flags.DEFINE_integer(
    "examples", 10_000, "Maximum number of examples to read of a whole split.", lower_bound=BATCH
  )
  flags.DEFINE_list("readers", list(READERS), "Readers to measure, by name.")
  flags.DEFINE_integer("repeats", 5, "How often each reader is measured.", lower_bound=1)
  flags.DEFINE_float("seconds", 10.0, "Measured seconds in a repeat.", lower_bound=0.1)
  flags.DEFINE_float("warm_up", 3.0, "Seconds of reading before them.", lower_bound=0.0)
  flags.DEFINE_integer("cores", None, "Logical CPUs to use; default: all.", lower_bound=1)
  flags.DEFINE_integer(
    "pixels", 0, "Compare decoders on this many images instead of readers.", lower_bound=0
  )
  flags.DEFINE_string("json", None, "File for the results, as JSON.")


@dataclasses.dataclass(frozen=True)
class Timing:
  """How often, and for how many seconds, each reader is measured; as the flags of these names."""

  repeats: int
  warm_up: float
  seconds: float


def measure(tasks: dict[str, tuple[str, Task]], timing: Timing) -> dict[str, list[dict]]:
  """Times each (reader, task) once per repeat; the results of `time_reader` by name."""
  results = {name: [] for name in tasks}
  for repeat, name in harness.rotate(list(tasks), timing.repeats):
    if results[name] and "missing" in results[name][0]:
      continue
    reader, task = tasks[name]
    arguments = {"reader": reader, "warm_up": timing.warm_up, "seconds": timing.seconds}
    found = run_alone("time_reader", task, arguments)
    results[name].append(found)
    rate = "missing"
    if "missing" not in found:
      rate = f"{found['images'] / found['seconds']:.0f} images/s"
    line = f"repeat {repeat + 1} of {timing.repeats}: {name}: {rate}"
    print(line, file=sys.stderr, flush=True)
  return results


def summarize(results: dict[str, list[dict]], cores: int, baseline: str) -> dict[str, dict]:
  """Medians over the repeats, by name; "ratio": the baseline's images/s over this one's."""
  rows = {}
  for name, reports in results.items():
    if "missing" in reports[0]:
      rows[name] = {"missing": reports[0]["missing"]}
      continue
    rates = [report["images"] / report["seconds"] for report in reports]
    rows[name] = {
      "images_per_second": statistics.median(rates),
      "min": min(rates),
      "max": max(rates),
      "images_per_second_each": rates,
      "images_per_second_per_core": statistics.median(rates) / cores,
      "cpu_ms_per_image": statistics.median(
        1000 * report["cpu_seconds"] / report["images"] for report in reports
      ),
      "cores_used_by_others": max(
        report["others_seconds"] / report["seconds"] for report in reports
      ),
    }
  ours = rows.get(baseline, {}).get("images_per_second")
  for row in rows.values():
    if "missing" not in row:
      row["ratio"] = ours / row["images_per_second"] if ours else None
  return rows


def benchmark_readers(task: Task, readers: list[str], timing: Timing) -> dict[str, dict]:
  """The rows of the readers' table."""
  tasks = {reader: (reader, task) for reader in readers}
  return summarize(measure(tasks, timing), task.cores, "ours")


def benchmark_decoders(task: Task, count: int, timing: Timing) -> dict[str, dict]:
  """The rows of the decoders' table: those of bare libjpeg-turbo, with "pixels"."""
  pixels = run_alone("compare_pixels", task, {"count": count})
  tasks = {
    name: ("bare libjpeg-turbo", dataclasses.replace(task, decoder=decoder))
    for name, decoder in DECODERS.items()
  }
  rows = summarize(measure(tasks, timing), task.cores, next(iter(DECODERS)))
  return {name: {**row, "pixels": pixels[name]} for name, row in rows.items()}


def to_table(rows: dict[str, dict], heading: str) -> list[str]:
  """The lines to print: with the ratio, or with "pixels" if the rows have them."""
  width = max(map(len, [heading, *rows]))
  pixels = any("pixels" in row for row in rows.values())
  last = ("decoded |Δ|", "Δ", "max", "resized |Δ|", "Δ", "max") if pixels else ("ours/this",)
  cells = ("images/s", "[min–max]", "per core", "CPU ms/image", *last)
  lines = [output.table_line(heading, width, cells, 14)]
  for name, row in rows.items():
    if "missing" in row:
      lines.append(f"{name:<{width}}  not measured: {row['missing']}")
      continue
    if pixels:
      found = [row["pixels"][stage] for stage in ("decoded", "resized")]
      last = [
        text
        for each in found
        for text in (f"{each['mean']:.3f}", f"{each['bias']:+.3f}", str(each["max"]))
      ]
    else:
      last = ["–" if row["ratio"] is None else f"{row['ratio']:.2f}"]
    cells = (
      f"{row['images_per_second']:.0f}",
      f"[{row['min']:.0f}–{row['max']:.0f}]",
      f"{row['images_per_second_per_core']:.0f}",
      f"{row['cpu_ms_per_image']:.2f}",
      *last,
    )
    lines.append(output.table_line(name, width, cells, 14))
  return lines


def _notes(report: dict, rows: dict[str, dict]) -> list[str]:
  """What was measured where, and whether the machine was busy with something else."""
  task, machine = report["task"], report["hardware"]
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  notes = [
    f"{task['repeats']} repeats of {task['seconds']:g} s on {task['cores']} of {machine['cores']} "
    f"cores of {machine['cpu']}; {task['dataset']} {task['split']}, {task['examples']} JPEGs of "
    f"{task['mean_jpeg_bytes'] / 1000:.0f} kB; {versions}"
  ]
  measured = [row for row in rows.values() if "missing" not in row]
  others = max((row["cores_used_by_others"] for row in measured), default=0.0)
  if others > _OTHERS:
    notes.append(
      f"Note: other processes used up to {others:.1f} cores; measure on an idle machine."
    )
  return notes


def main():
  values = flags.FLAGS
  harness.exit_on_sigterm()
  unknown = [reader for reader in values.readers if reader not in READERS]
  if unknown or not values.readers:
    raise UserError(f"--readers={','.join(unknown)}: unknown; use some of {', '.join(READERS)}.")
  path = output.output_path("--json", values.json)
  available = len(os.sched_getaffinity(0))
  cores = values.cores or available
  if cores > available:
    raise UserError(f"--cores={cores}: only {available} are available.")
  timing = Timing(values.repeats, values.warm_up, values.seconds)
  with tempfile.TemporaryDirectory(prefix="benchmark_input_") as files:
    data_dir = os.path.expanduser(values.data_dir)
    task = Task(values.dataset, values.split, data_dir, files, cores)
    found = run_alone("write_files", task, {"examples": values.examples})
    task = dataclasses.replace(task, **found)
    if values.pixels:
      rows, heading = benchmark_decoders(task, values.pixels, timing), "decoder"
    else:
      rows, heading = benchmark_readers(task, values.readers, timing), "reader"
    sizes = [path.stat().st_size for path in task.jpegs()]
  report = {
    "task": {
      "dataset": task.dataset,
      "split": task.split,
      "examples": len(sizes),
      "mean_jpeg_bytes": statistics.fmean(sizes),
      "batch": BATCH,
      "image_size": SIDE,
      "decoder": task.decoder,
      "cores": cores,
      **dataclasses.asdict(timing),
    },
    "hardware": hardware.describe(),
    "versions": hardware.versions("tensorflow", "numpy", "pillow", "nvidia-dali-cuda120"),
    f"{heading}s": rows,
  }
  print("\n".join([*to_table(rows, heading), *_notes(report, rows)]))
  if path:
    output.write_json("--json", path, report)


if __name__ == "__main__":
  program.run(main, define_flags)
