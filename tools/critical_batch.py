r"""Up to which minibatch does linear scaling pay in a run, epoch by epoch?

  python -m tools.critical_batch runs/kn32 runs/kn256 --output_dir=critical_batch

A RUN is the work directory of `tf_largebatch.train`; its run may still be training, and needs
several passes in a step (k / g ≥ 2). From what the run's records hold of the gradient's noise
(docs/metrics.md), with means over an epoch,

  B = tr Σ / |G|²                            the noise scale, in images
  r / k = (B + n) / (B + kn)                 AdaScale's gain as a share of linear scaling's

so the share is at least s up to kn = B (1 − s) / s + n / s. The program prints kn for 80 % and 50 %
by epoch, and writes critical_batch.png and critical_batch.json. The errors are those of B by a
jackknife over the epoch's records. B depends on where training is: it is measured at the weights of
this run, with its rate and its kn, and it says what a step is worth there, not how a run with
another kn would end.

Source: McCandlish et al. 2018 (arXiv 1812.06162), §2.2; Johnson et al. 2020 (arXiv 2007.05105).
"""

import dataclasses
import json
import math
import os

from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import program
from tools.studies import output
from tools.studies.noise import Epoch, critical_batch, epochs_of
from tools.studies.work_directories import read_recipe, read_records

_SHARES = (0.8, 0.5)
_NAME = "critical_batch"


def define_flags():
  flags.DEFINE_string("output_dir", _NAME, "Directory for the files to write.")


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
  work_dirs = [os.path.expanduser(path) for path in work_dirs]
  if not work_dirs:
    raise UserError("No run was given; give the work directories of runs.")
  runs = {work_dir: _read(work_dir) for work_dir in work_dirs}
  for work_dir, run in runs.items():
    print("\n".join(_table(work_dir, *run)))
  directory = os.path.expanduser(flags.FLAGS.output_dir)
  numbers = {work_dir: _as_json(*run) for work_dir, run in runs.items()}
  path = os.path.join(directory, _NAME)
  output.write_all(
    f"--output_dir={flags.FLAGS.output_dir}",
    {
      f"{path}.png": _draw(runs),
      f"{path}.json": (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode(),
    },
  )
  print(f"Written: {path}.png and .json")


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
