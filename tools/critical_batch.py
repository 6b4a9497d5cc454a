r"""Up to which minibatch does linear scaling pay in a run, epoch by epoch?

  python -m tools.critical_batch runs/kn32 runs/kn256 --output_dir=critical_batch
  python -m tools.critical_batch --from_checkpoint=runs/kn32/checkpoints/step-0000003750.json \
    --workers=4,8,16 --epochs=2 --output_dir=branches

The first command asks the noise of the gradients. A RUN is the work directory of
`tf_largebatch.train`; its run may still be training, and needs several passes in a step
(k / g ≥ 2). From what its records hold of the noise (docs/metrics.md), with means over an epoch,

  B = tr Σ / |G|²                            the noise scale, in images
  r / k = (B + n) / (B + kn)                 AdaScale's gain as a share of linear scaling's

so the share is at least s up to kn = B (1 − s) / s + n / s. The program prints kn for 80 % and 50 %
by epoch, and writes critical_batch.png and critical_batch.json. The errors are those of B by a
jackknife over the epoch's records. B depends on where training is: it is measured at the weights of
this run, with its rate and its kn, and it says what a step is worth there, not how a run with
another kn would end.

The second command tries it: from a checkpoint at the end of an epoch, the run goes on for --epochs
with its own k and with each of --workers, on the same images in the same order, with the rate that
the recipe has for that k. A branch's loss "comes back" if its mean over the last epoch is at most
--tolerance above that of the run's own k. The program prints the largest kn whose loss comes back,
and writes branches.png and branches.json. Each branch is a work directory below --output_dir; the
same command continues those that are not complete. A run keeps its last three checkpoints and the
best, so copy the one to branch from while it trains, with recipe.json and flags.txt.

Source: McCandlish et al. 2018 (arXiv 1812.06162), §2.2; Johnson et al. 2020 (arXiv 2007.05105);
Merrill et al. 2025 (arXiv 2505.23971), §3.
"""

import dataclasses
import json
import math
import os

from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import program
from tools.benchmark import harness
from tools.studies import output
from tools.studies.noise import Epoch, critical_batch, epochs_of
from tools.studies.work_directories import read_recipe, read_records

_SHARES = (0.8, 0.5)
_NAME = "critical_batch"


def define_flags():
  flags.DEFINE_string("output_dir", _NAME, "Directory for the files to write.")
  flags.DEFINE_string("from_checkpoint", None, "Branch from this RUN/checkpoints/step-N.json.")
  flags.DEFINE_list("workers", [], "With --from_checkpoint, the k to try.")
  flags.DEFINE_integer("epochs", 2, "With --from_checkpoint, epochs of a branch.", lower_bound=1)
  flags.DEFINE_float("tolerance", 0.01, "By how much of it the loss may be higher.", lower_bound=0)


def _read(work_dir: str) -> tuple[Recipe, list[Epoch]]:
  recipe = read_recipe(work_dir)
  epochs = list(epochs_of(read_records(work_dir)))
  if not epochs:
    raise UserError(
      f"{work_dir} holds no gradient_variance: its steps have one pass, or an older version "
      "trained it. Train with several workers in a step (k / g of 2 or more)."
    )
  return recipe, epochs


def _table(work_dir: str, recipe: Recipe, epochs: list[Epoch]) -> list[str]:
  n = recipe.per_worker_batch_size
  columns = "".join(f"{f'kn for {share:.0%}':>14}" for share in _SHARES)
  lines = [f"{work_dir}: kn = {recipe.workers} x {n} = {recipe.global_batch_size}"]
  lines.append(f"{'epoch':>6}{'B':>10}{'± s.e.':>10}{columns}{'share at kn':>14}")
  for each in epochs:
    scale = each.noise_scale
    sizes = "".join(f"{_shown(critical_batch(scale, n, share)):>14}" for share in _SHARES)
    share = 1.0 if math.isinf(scale) else (scale + n) / (scale + recipe.global_batch_size)
    lines.append(f"{each.epoch:6d}{_shown(scale):>10}{_shown(each.error):>10}{sizes}{share:14.0%}")
  return lines


def _shown(value: float | None) -> str:
  return "-" if value is None or not math.isfinite(value) else f"{value:.0f}"


def _draw(runs: dict[str, tuple[Recipe, list[Epoch]]]) -> bytes:
  from matplotlib.figure import Figure  # Slow to import, so not before the runs have been read.
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(5.5 * len(runs), 4), dpi=120, layout="constrained")
  panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
  for panel, (work_dir, (recipe, epochs)) in zip(panels, runs.items(), strict=True):
    known = [each for each in epochs if math.isfinite(each.noise_scale)]
    numbers = [each.epoch for each in known]
    for share in _SHARES:
      n = recipe.per_worker_batch_size
      sizes = [critical_batch(each.noise_scale, n, share) for each in known]
      panel.plot(numbers, sizes, marker=".", label=f"linear scaling keeps {share:.0%}")
    panel.axhline(recipe.global_batch_size, color="grey", linestyle="--", label="this run's kn")
    panel.set(title=os.path.basename(os.path.normpath(work_dir)), xlabel="epoch", yscale="log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("minibatch kn, images")
  panels[0].legend()
  return output.to_png(figure)


def _as_json(recipe: Recipe, epochs: list[Epoch]) -> dict:
  n = recipe.per_worker_batch_size
  rows = []
  for each in epochs:
    scale = each.noise_scale if math.isfinite(each.noise_scale) else None  # JSON has no infinity.
    sizes = {str(s): scale if scale is None else critical_batch(scale, n, s) for s in _SHARES}
    rows.append({**dataclasses.asdict(each), "noise_scale": scale, "kn": sizes})
  return {"workers": recipe.workers, "per_worker_batch_size": n, "epochs": rows}


def main(work_dirs: list[str]):
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads files here.
  if flags.FLAGS.from_checkpoint:
    if work_dirs:
      raise UserError(f"Unexpected argument {work_dirs[0]!r} beside --from_checkpoint; drop one.")
    harness.exit_on_sigterm()
    _try_branches(flags.FLAGS)
    return
  work_dirs = [os.path.expanduser(path) for path in work_dirs]
  if not work_dirs:
    raise UserError("No run was given; give the work directories of runs.")
  runs = {work_dir: _read(work_dir) for work_dir in work_dirs}
  for work_dir, run in runs.items():
    print("\n".join(_table(work_dir, *run)))
  _write(_NAME, _draw(runs), {work_dir: _as_json(*run) for work_dir, run in runs.items()})


def _write(name: str, picture: bytes, numbers: dict):
  """Writes NAME.png and NAME.json into the --output_dir."""
  path = os.path.join(os.path.expanduser(flags.FLAGS.output_dir), name)
  output.write_all(
    f"--output_dir={flags.FLAGS.output_dir}",
    {
      f"{path}.png": picture,
      f"{path}.json": (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode(),
    },
  )
  print(f"Written: {path}.png and .json")


def _try_branches(values: flags.FlagValues):
  """Trains the branches, and says up to which kn the loss comes back."""
  others = program.whole_numbers("--workers", values.workers)
  # Imports TensorFlow, so not before the flags have been checked.
  from tools.studies import branches

  parent = branches.read_parent(os.path.expanduser(values.from_checkpoint))
  own = parent.recipe.workers
  recipes = [branches.branch_recipe(parent, k, values.epochs) for k in sorted({own, *others})]
  directory = os.path.expanduser(values.output_dir)
  outcomes = []
  print(f"{'k':>6}{'kn':>8}{'steps':>8}{'rate':>10}{'loss':>10}{'of own k':>10}{'error':>10}")
  # The own k first, because the others are compared with it.
  for recipe in sorted(recipes, key=lambda each: each.workers != own):
    work_dir = os.path.join(directory, f"k{recipe.workers}")
    branches.begin(parent, recipe, work_dir)
    outcomes.append(branches.train_branch(parent, recipe, work_dir))
    print(_branch_line(outcomes[-1], outcomes[0]), flush=True)
  largest = branches.largest_that_comes_back(outcomes, own, values.tolerance)
  print(f"The loss comes back up to kn = {largest}, within {values.tolerance:.1%}.")
  numbers = {
    "from_checkpoint": values.from_checkpoint,
    "epoch": parent.epoch,
    "tolerance": values.tolerance,
    "largest_kn": largest,
    "branches": [
      dataclasses.asdict(each) | {"loss": each.loss if math.isfinite(each.loss) else None}
      for each in outcomes
    ],
  }
  _write("branches", _draw_branches(outcomes), numbers)


def _branch_line(branch, own) -> str:
  end = [f"{branch.loss:.4f}", f"{branch.loss / own.loss - 1:+.1%}"]
  end = end if math.isfinite(branch.loss) else ["diverged", "-"]
  error = "-" if branch.validation_error is None else f"{branch.validation_error:.2%}"
  columns = "".join(f"{word:>10}" for word in (f"{branch.learning_rate:.4g}", *end, error))
  return f"{branch.workers:6d}{branch.kn:8d}{branch.steps:8d}{columns}"


def _draw_branches(outcomes) -> bytes:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
  panel = figure.subplots()
  for each in sorted(outcomes, key=lambda outcome: outcome.kn):
    panel.plot(list(each.curve), list(each.curve.values()), label=f"kn = {each.kn}")
  panel.set(xlabel="epoch", ylabel="training loss", yscale="log")
  panel.grid(alpha=0.3)
  panel.legend()
  return output.to_png(figure)


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
