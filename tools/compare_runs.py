r"""Compares training curves: does a run follow the baseline's curve, and from which epoch on?

  python -m tools.compare_runs runs/k8_seed0 runs/k8_seed1 runs/k16_seed0 --output_dir=curves

A RUN is the work directory of `tf_largebatch.train`; its run may still be training. Runs whose
recipes differ only in the seed form one group; the first RUN's group (or --baseline's) is the
baseline. Goyal et al. 2017 find that the curves of large and small minibatches match after the
warmup (Figure 2), so a run can be judged by its curve long before it converges. The program prints
a verdict for each group and writes compare_runs.png, .html (everything in one page) and .json (the
numbers). `tools/studies/comparison.py` defines the verdicts, and the page repeats the definitions.
"""

import json
import os

from absl import flags

from tf_largebatch.errors import UserError
from tools import program
from tools.studies import comparison, curve_report, output
from tools.studies.curves import KINDS, Run, group_runs
from tools.studies.work_directories import read_recipe, read_run

_NAME = "compare_runs"


def define_flags():
  flags.DEFINE_string("output_dir", _NAME, "Directory for the files to write.")
  flags.DEFINE_float(
    "tolerance", 0.01, "Largest difference of errors that matches; a fraction, 0.01 is one point."
  )
  flags.DEFINE_string(
    "baseline", None, "One of the RUNs, whose group is the baseline; left out: the first."
  )


def compare_runs(
  work_dirs: list[str], output_dir: str, tolerance: float, baseline: str | None
) -> str:
  """Compares runs, writes the picture, the page and the numbers, and returns the text to print.

  Raises:
    UserError: a run, the baseline or the tolerance is invalid, or the output cannot be written.
  """
  if not work_dirs:
    raise UserError("No run was given; give the work directories of the runs to compare.")
  if not 0 <= tolerance < 1:  # NaN is refused too.
    raise UserError(
      f"--tolerance={tolerance} is refused; give a fraction below 1, such as 0.01 for one point."
    )
  runs, first = _read_runs(work_dirs, baseline)
  groups = group_runs(runs, first)
  base, *others = groups
  comparisons = {
    group.label: {kind: comparison.compare(group, base, kind, tolerance) for kind in KINDS}
    for group in others
  }
  lines = [comparison.describe(group, base, comparisons[group.label]) for group in others]
  lines += [f"Note: {note}" for note in curve_report.notes(groups)]
  table = curve_report.final_table(groups)
  title = f"Training curves: {'; '.join(group.label for group in groups)}"
  image = curve_report.draw(groups, comparisons, tolerance)
  numbers = {"words": lines, **curve_report.to_dict(groups, comparisons, tolerance)}
  path = os.path.join(output_dir, _NAME)
  output.write_all(
    f"--output_dir={output_dir}",
    {
      f"{path}.png": image,
      f"{path}.html": curve_report.to_html(title, lines, table, image).encode(),
      f"{path}.json": (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode(),
    },
  )
  return "\n".join([*lines, *_align(table), f"Curves: {path}.png, .html and .json"])


def _read_runs(work_dirs: list[str], baseline: str | None) -> tuple[list[Run], Run]:
  """Returns the runs, and the one whose group is the baseline."""
  recipes = {}
  for work_dir in work_dirs:
    recipe = read_recipe(work_dir)
    if recipe in recipes:
      raise UserError(
        f"{recipes[recipe]} and {work_dir} are the same run twice (recipe and seed {recipe.seed}); "
        "leave one of them out."
      )
    recipes[recipe] = work_dir
  paths = [os.path.realpath(work_dir) for work_dir in work_dirs]
  if baseline is not None and os.path.realpath(baseline) not in paths:
    raise UserError(
      f"--baseline={baseline} is not one of the runs; give one of {', '.join(work_dirs)}."
    )
  runs = [read_run(work_dir, recipe) for recipe, work_dir in recipes.items()]
  return runs, runs[paths.index(os.path.realpath(baseline)) if baseline is not None else 0]


def _align(table: list[list[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in table
  ]


def main(work_dirs: list[str]):
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads files here.
  values = flags.FLAGS
  print(
    compare_runs(
      [os.path.expanduser(path) for path in work_dirs],
      os.path.expanduser(values.output_dir),
      values.tolerance,
      values.baseline and os.path.expanduser(values.baseline),
    )
  )


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
