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
import io
import json
import math
import os
from collections.abc import Iterator

import numpy as np
from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import program
from tools.studies import output
from tools.studies.work_directories import read_recipe, read_records

_SHARES = (0.8, 0.5)
_NAME = "critical_batch"


def define_flags():
  flags.DEFINE_string("output_dir", _NAME, "Directory for the files to write.")


@dataclasses.dataclass(frozen=True)
class Epoch:
  """The noise of an epoch.

  Attributes:
    epoch: its number, from 1.
    variance, squared_gradient: means of tr Σ and |G|² over its steps.
    error: standard error of B; NaN with one record.
  """

  epoch: int
  variance: float
  squared_gradient: float
  error: float

  @property
  def noise_scale(self) -> float:
    """B; infinite if no gradient is seen above the noise."""
    return _ratio(self.variance, self.squared_gradient)


def _ratio(variance, squared_gradient) -> float:
  return max(variance, 0.0) / squared_gradient if squared_gradient > 0 else math.inf


def critical_batch(noise_scale: float, per_worker_batch_size: int, share: float) -> float:
  """The largest kn at which AdaScale's gain is still this share of k.

  From (B + n) / (B + kn) = s.

  Args:
    noise_scale: B.
    per_worker_batch_size: n.
    share: s, above 0 and at most 1.
  """
  return (noise_scale * (1 - share) + per_worker_batch_size) / share


def epochs_of(records: list[dict]) -> Iterator[Epoch]:
  """The epochs that training records with `gradient_variance` tell of, in order."""
  spans, last = {}, 0
  for record in records:
    if record["kind"] != "train":
      continue
    steps, last = record["step"] - last, record["step"]
    if "gradient_variance" in record:
      row = (steps, record["gradient_variance"], record["squared_gradient"])
      spans.setdefault(math.ceil(record["epoch"] - 1e-9), []).append(row)
  for epoch, rows in sorted(spans.items()):
    steps, variances, squares = np.array(rows, np.float64).T
    without = np.sum(steps) - steps
    with np.errstate(divide="ignore", invalid="ignore"):
      jackknife = [
        _ratio(v, s)
        for v, s in zip(
          (np.sum(steps * variances) - steps * variances) / without,
          (np.sum(steps * squares) - steps * squares) / without,
          strict=True,
        )
      ]
    count = len(rows)
    error = (
      math.sqrt((count - 1) * np.var(jackknife)) if np.all(np.isfinite(jackknife)) else math.nan
    )
    means = np.average([variances, squares], axis=1, weights=steps)
    yield Epoch(epoch, *map(float, means), error if count > 1 else math.nan)


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


def _shown(value: float) -> str:
  return "-" if not math.isfinite(value) else f"{value:.0f}"


def _draw(runs: dict[str, tuple[Recipe, list[Epoch]]]) -> bytes:
  from matplotlib.figure import Figure  # Slow to import, so not before the runs have been read.

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
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("minibatch kn, images")
  panels[0].legend()
  image = io.BytesIO()
  figure.savefig(image, format="png")
  return image.getvalue()


def _as_json(recipe: Recipe, epochs: list[Epoch]) -> dict:
  finite = lambda value: value if math.isfinite(value) else None  # noqa: E731 - JSON has no NaN.
  n = recipe.per_worker_batch_size
  rows = [
    {
      **{name: finite(value) for name, value in dataclasses.asdict(each).items()},
      "noise_scale": finite(each.noise_scale),
      "kn": {str(share): finite(critical_batch(each.noise_scale, n, share)) for share in _SHARES},
    }
    for each in epochs
  ]
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
