r"""What would the final weights of a run err with other batch statistics?

  python -m tools.bn_statistics runs/n2 runs/n32 --data_dir=data --output=bn_statistics.json

A RUN is the work directory of a complete `tf_largebatch.train`. Its final weights are evaluated on
its validation split, and batch normalisation normalises by

  running      the moving averages of the run: its val_error
  recomputed   the mean and the unbiased variance of minibatches of n training images, averaged over
               the first --images in the source's order, without augmentation ("PreciseBN")
  minibatch    the statistics of the n validation images themselves; images after the last whole
               minibatch are left out

The program prints the three errors and merges them into the JSON --output, by the name of the work
directory. A run whose weights and number of --images are already there is not measured again, so
the same command continues.

Source: Wu and Johnson 2021 (arXiv 2105.07576), §3; Wu and He 2018 (arXiv 1803.08494).
"""

import json
import os

from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.options import expand_home
from tf_largebatch.recipe import Recipe
from tools import program
from tools.studies import bn_results, output
from tools.studies.work_directories import read_recipe, read_result


def define_flags():
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  )
  flags.DEFINE_integer(
    "images", 8192, "Training images for the recomputed statistics, at most.", lower_bound=1
  )
  flags.DEFINE_string("output", "bn_statistics.json", "JSON file to merge the results into.")


def _name(work_dir: str) -> str:
  return os.path.basename(os.path.abspath(work_dir))


def _read_runs(work_dirs: list[str]) -> dict[str, tuple[str, Recipe, dict]]:
  """Reads (work directory, recipe, result) of each run, by its name."""
  runs = {}
  for work_dir in work_dirs:
    recipe, result = read_recipe(work_dir), read_result(work_dir)
    if result is None:
      raise UserError(f"{work_dir} is not complete; wait until its run ends, or leave it out.")
    digest, error = result.get("weights_sha256"), result.get("val_error")
    if not isinstance(digest, str) or not isinstance(error, int | float):
      raise UserError(
        f"{work_dir}/result.json has weights_sha256 {digest} and val_error {error}, which are "
        "needed to check what is measured; leave that run out."
      )
    name = _name(work_dir)
    if name in runs:
      raise UserError(f"Two runs are named {name}; measure them with an --output for each.")
    runs[name] = (work_dir, recipe, result)
  return runs


def _row(name: str, run: dict, width: int) -> str:
  errors = "".join(f"{run[kind]['error']:12.2%}" for kind in bn_results.KINDS)
  return f"{name:{width}}{run['workers']:6d}{run['per_worker_batch_size']:6d}{errors}"


def _measure(work_dir: str, recipe: Recipe, result: dict) -> dict:
  # Imports TensorFlow, so not before all runs have been read.
  from tools.studies.batch_statistics import measure

  data_dir = expand_home(flags.FLAGS.data_dir)
  return measure(work_dir, recipe, result, data_dir, flags.FLAGS.images)


def main(work_dirs: list[str]):
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  values = flags.FLAGS
  if not work_dirs:
    raise UserError("No run was given; give the work directories of complete runs.")
  path = os.path.expanduser(values.output)
  runs = _read_runs([os.path.expanduser(work_dir) for work_dir in work_dirs])
  results = bn_results.read(path, "give another --output")
  width = max(map(len, ["run", *runs]))
  print(f"{'run':{width}}{'k':>6}{'n':>6}" + "".join(f"{kind:>12}" for kind in bn_results.KINDS))
  for name, (work_dir, recipe, result) in runs.items():
    identity = {"requested_images": values.images, "weights_sha256": result["weights_sha256"]}
    if results.get(name, {}) | identity != results.get(name):
      results[name] = {
        "workers": recipe.workers,
        "per_worker_batch_size": recipe.per_worker_batch_size,
        "seed": recipe.seed,
        **_measure(work_dir, recipe, result),
        **identity,
      }
      text = json.dumps(results, indent=2, allow_nan=False) + "\n"
      output.write_all(f"--output={values.output}", {path: text.encode()})
    print(_row(name, results[name], width), flush=True)
  print(f"Results: {path}")


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
