r"""Shows that `tools.verify` can fail: the paper's subtle mistakes, one at a time.

  python -m tools.conformance.negative_controls
  python -m tools.conformance.negative_controls --quick --only="warmup from 0,decay twice"

For each mistake a scratch copy of the package is changed, `tools.verify` runs there on two replicas
(logical CPUs), and a table tells which property failed, by how much, and which others did. The exit
status is 1 if a mistake was not caught by the property that should catch it, or if the package as
it stands does not pass.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl import app, flags

from tf_largebatch.errors import UserError

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SECONDS = 300  # Until a run is given up.


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A mistake: (file of the package, what stands there once, what the mistake puts there)."""

  name: str
  caught_by: str
  edits: tuple[tuple[str, str, str], ...]


MUTATIONS = (
  Mutation(
    "loss over n instead of kn",
    "aggregation",
    (
      (
        "training/step",
        "images_in_step, workers = recipe.global_batch_size,",
        "images_in_step, workers = recipe.per_worker_batch_size,",
      ),
    ),
  ),
  Mutation(
    "sum of replicas not scaled",
    "aggregation",
    (
      (
        "training/step",
        "    # [workers, n, …] → [passes, g·n",
        "    nonlocal images_in_step\n"
        "    images_in_step = images.shape[0] * images.shape[1]\n"
        "    # [workers, n, …] → [passes, g·n",
      ),
    ),
  ),
  Mutation(
    "decay on γ and β",
    "weight decay",
    (("optim/sgd", "return kernel and self._use_weight_decay", "return self._use_weight_decay"),),
  ),
  Mutation(
    "decay twice (L2 without the half)",
    "weight decay",
    (
      (
        "optim/sgd",
        "tf.constant(self.coupled_weight_decay, dtype)",
        "tf.constant(2 * self.coupled_weight_decay, dtype)",
      ),
    ),
  ),
  Mutation(
    "decoupled decay",
    "weight decay",
    (
      (
        "optim/sgd",
        "      gradient += tf.constant(self.coupled_weight_decay, dtype) * variable\n",
        "      decay = tf.constant(self.coupled_weight_decay, dtype) * variable\n"
        '      self.assign_sub(variable, by["rate"] * decay)\n',
      ),
      ("optim/sgd", '      "scale": scale,\n', '      "scale": scale, "rate": learning_rate,\n'),
    ),
  ),
  Mutation(
    "no momentum correction",
    "momentum correction",
    (("optim/sgd", '"decay": self.momentum * factor,', '"decay": self.momentum,'),),
  ),
  Mutation(
    "correction applied after instead of before",
    "momentum correction",
    (
      ("optim/sgd", '"decay": self.momentum * factor,', '"decay": self.momentum, "after": factor,'),
      ("optim/sgd", "buffer.assign(velocity)", 'buffer.assign(by["after"] * velocity)'),
    ),
  ),
  Mutation(
    "BN over all workers",
    "BN groups",
    (
      (
        "training/step",
        "    # [workers, n, …] → [passes, g·n",
        "    nonlocal workers_per_pass\n"
        "    workers_per_pass = images.shape[0]\n"
        "    # [workers, n, …] → [passes, g·n",
      ),
      (
        "training/trainer",
        "PerWorkerBatchNormalization, per_worker_batch_size=recipe.per_worker_batch_size",
        "PerWorkerBatchNormalization",
      ),
    ),
  ),
  Mutation(
    "BN statistics of the first worker only",
    "moving statistics",
    (
      (
        "training/step",
        "      return index + 1, tf.nest",
        "      first = [tf.where(index == 0, x * count, tf.zeros_like(x)) for x in addends[1]]\n"
        "      addends = (addends[0], first, *addends[2:])\n"
        "      return index + 1, tf.nest",
      ),
    ),
  ),
  Mutation(
    "moving statistics per replica",
    "replicas identical",
    (
      (
        "training/step",
        "    scalars = {\n",
        "    local = recipe.workers / images.shape[0]\n"
        "    statistics = [local * value for value in rest[0]]\n"
        "    scalars = {\n",
      ),
    ),
  ),
  Mutation(
    "shuffle per worker",
    "one shuffle for all",
    (
      (
        "data/input_pipeline",
        "    ids = _example_id(recipe, source.num_examples, epoch, tf.range(first, first + n))\n",
        "    share = source.num_examples // recipe.workers\n"
        "    own = step_in_epoch * n + tf.range(n, dtype=tf.int64)\n"
        "    ids = worker * share + _example_id(recipe, share, epoch, own)\n",
      ),
    ),
  ),
  Mutation(
    "shuffle the same every epoch",
    "shuffled anew",
    (("data/input_pipeline", "tf.cast(epoch, tf.int64)]", "tf.zeros([], tf.int64)]"),),
  ),
  Mutation(
    "warmup from 0",
    "warmup",
    (
      (
        "optim/schedule",
        "progress: reference + (peak - reference) * progress",
        "progress: peak * progress",
      ),
    ),
  ),
  Mutation(
    "warmup per epoch",
    "warmup",
    (
      (
        "optim/schedule",
        "step / self.warmup_steps",
        "step // self.steps_per_epoch * self.steps_per_epoch / self.warmup_steps",
      ),
    ),
  ),
  Mutation(
    "decay one step late",
    "step decay",
    (("optim/schedule", "tf.cast(step >= boundary", "tf.cast(step > boundary"),),
  ),
  Mutation(
    "stride on the 1×1",
    "network",
    (
      (
        "models/resnet",
        'layers.unit(x, filters, 1, 1, f"{name}_1")',
        'layers.unit(x, filters, 1, strides, f"{name}_1")',
      ),
      (
        "models/resnet",
        'layers.unit(y, filters, 3, strides, f"{name}_2")',
        'layers.unit(y, filters, 3, 1, f"{name}_2")',
      ),
    ),
  ),
  Mutation(
    "last γ not zero",
    "initial γ",
    (("models/resnet", 'f"{name}_bn", self.last_gamma)', 'f"{name}_bn")'),),
  ),
  Mutation(
    "rate scaled by k alone",
    "scaling rule",
    (
      (
        "training/trainer",
        "    global_batch_size=recipe.global_batch_size,\n    reference_learning",
        "    global_batch_size=recipe.workers * recipe.reference_batch_size,\n"
        "    reference_learning",
      ),
    ),
  ),
  Mutation(
    "moving statistics divided by n",
    "moving statistics",
    (
      (
        "training/step",
        "share = workers_per_pass / workers",
        "share = 1 / recipe.per_worker_batch_size",
      ),
    ),
  ),
  Mutation(
    "second decay lost",
    "step decay",
    (("optim/schedule", "** decays", "** tf.minimum(decays, 1)"),),
  ),
  Mutation(
    "the same images left out of every epoch",
    "every image once",
    (
      (
        "data/input_pipeline",
        "  last = train_examples - 1\n",
        "  last = train_examples // recipe.global_batch_size * recipe.global_batch_size - 1\n",
      ),
    ),
  ),
  Mutation(
    "Keras' own BN",
    "network",
    (
      (
        "training/trainer",
        'if purpose != "export":',
        'if purpose == "never":',
      ),
    ),
  ),
  Mutation(
    "biases on the convolutions",
    "variables",
    (("models/resnet", "use_bias=False", "use_bias=True"),),
  ),
  Mutation(
    "one seed for all kernels",
    "initial kernels",
    (("models/resnet", 'return zlib.crc32(f"{self.seed}/{name}".encode())', "return self.seed"),),
  ),
  Mutation(
    "a worker's batch padded",
    "BN groups",
    (
      # Of the kind that fills up a multiple of 8: the loss masks the image of zeros, BN sees it.
      (
        "training/step",
        "      logits, updates = model",
        "      images = tf.pad(images, [[0, 1], [0, 0], [0, 0], [0, 0]])\n"
        "      logits, updates = model",
      ),
      (
        "training/step",
        "      loss = _loss_sum(recipe, labels, logits) / images_in_step\n",
        "      logits = logits[:-1]\n"
        "      loss = _loss_sum(recipe, labels, logits) / images_in_step\n",
      ),
    ),
  ),
)


def make_copy(directory: pathlib.Path, mutation: Mutation | None) -> pathlib.Path:
  """Copies the package and the tools, makes the mistake in the copy, and returns its root.

  Raises:
    AssertionError: what should stand in a file is not there once, so the mistake is out of date.
  """
  for folder in ("tf_largebatch", "tools"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / folder, directory / folder, ignore=ignored)
  for module, old, new in mutation.edits if mutation else ():
    path = directory / "tf_largebatch" / f"{module}.py"
    source = path.read_text()
    if source.count(old) != 1:
      raise AssertionError(f"{mutation.name}: {path.name} has {source.count(old)} times {old!r}.")
    path.write_text(source.replace(old, new))
  return directory


def run_verify(mutation: Mutation | None, only: str | None, at_once: int) -> dict:
  """Runs `tools.verify` on a scratch copy; line by name, as in its JSON.

  Args:
    mutation: None for the package as it stands.
    only: one property, or None for all.
    at_once: copies that share the machine's cores.

  Raises:
    RuntimeError: it left no result; with the end of its output.
  """
  with tempfile.TemporaryDirectory() as directory:
    scratch = make_copy(pathlib.Path(directory), mutation)
    command = [sys.executable, "-m", "tools.verify", "--logical_cpus=2"]
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    finished = subprocess.run(
      [*command, *([f"--only={only}"] if only else [])],
      cwd=scratch,
      env={name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
      | {"CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": threads, "PYTHONPATH": ""}
      | {f"TF_NUM_{kind}OP_THREADS": threads for kind in ("INTRA", "INTER")},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=_SECONDS,
      check=False,
    )
    output = scratch / "verify.json"
    if not output.exists():
      raise RuntimeError(f"verify left no result: {finished.stdout[-2000:]}")
    report = json.loads(output.read_text())
  lines = {line["name"]: line for line in report["properties"]}
  failed = any(not line["holds"] for line in lines.values())
  assert finished.returncode == failed, (finished.returncode, report)
  return lines


def _row(mutation: Mutation | None) -> dict:
  only = mutation.caught_by if mutation and flags.FLAGS.quick else None
  try:
    lines = run_verify(mutation, only, flags.FLAGS.at_once)
  except (RuntimeError, subprocess.TimeoutExpired) as error:
    name = mutation.name if mutation else "none"
    return {"mistake": name, "caught": False, "no_result": str(error)}
  failed = [name for name, line in lines.items() if not line["holds"]]
  if mutation is None:
    return {"mistake": "none", "caught": not failed, "failed": failed}
  line = lines[mutation.caught_by]
  return {
    "mistake": mutation.name,
    "caught": mutation.caught_by in failed,
    "caught_by": mutation.caught_by,
    "deviation": line["deviation"],
    "limit": line["limit"],
    "failed": failed,
  }


def _describe(row: dict) -> str:
  if "no_result" in row:
    return f"{row['mistake']:<44}NO RESULT: {row['no_result']}"
  if row["mistake"] == "none":
    return "none: " + ("all properties hold" if row["caught"] else f"FAILS {row['failed']}")
  deviation, limit = row["deviation"], row["limit"]
  deviation = float("nan") if deviation is None else deviation
  margin = f"{deviation / limit:.3g} times" if limit else "limit 0"
  others = [name for name in row["failed"] if name != row["caught_by"]]
  verdict = row["caught_by"] if row["caught"] else f"NOT CAUGHT by {row['caught_by']}"
  return (
    f"{row['mistake']:<44}{verdict:<22}{deviation:>10.1e}{limit:>10.1e}{margin:>16}  "
    + ", ".join(others)
  )


def _run() -> int:
  names = [mutation.name for mutation in MUTATIONS]
  unknown = sorted(set(flags.FLAGS.only) - set(names))
  if unknown:
    raise UserError(f"--only={','.join(unknown)}: no such mistake; there are {', '.join(names)}.")
  chosen = [m for m in MUTATIONS if not flags.FLAGS.only or m.name in flags.FLAGS.only]
  print(
    f"{'mistake':<44}{'caught by':<22}{'deviation':>10}{'limit':>10}{'over the limit':>16}  also"
  )
  rows = []
  with concurrent.futures.ThreadPoolExecutor(flags.FLAGS.at_once) as pool:
    for row in pool.map(_row, chosen if flags.FLAGS.quick else [None, *chosen]):
      rows.append(row)
      print(_describe(row), flush=True)
  if flags.FLAGS.output:
    pathlib.Path(flags.FLAGS.output).write_text(
      json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    )
  missed = [row["mistake"] for row in rows if not row["caught"]]
  print(f"Not as it should be: {', '.join(missed)}." if missed else "Every mistake was caught.")
  return bool(missed)


def main(argv: list[str]) -> int:
  try:
    if len(argv) > 1:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
    return int(_run())
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_boolean(
    "quick",
    False,
    "Check only the property that should fail, and not the package as it stands.",
  )
  flags.DEFINE_list("only", [], "Mistakes to make, by name; left out: all.")
  flags.DEFINE_string("output", None, "File for the table, as JSON.")
  flags.DEFINE_integer("at_once", 2, "Copies that run at a time.", lower_bound=1)


if __name__ == "__main__":
  define_flags()
  app.run(main)
