r"""Compares the training curves of runs: do they follow the baseline's, and from which epoch on?

  python -m tools.compare_runs runs/k8_seed0 runs/k8_seed1 runs/k16_seed0 --output_dir=curves

A RUN is a work directory of `tf_largebatch.train`, complete or not. Runs whose recipes are equal in
all but the seed are one group; the first RUN's group (or --baseline's) is the baseline. Goyal et
al. 2017 find that curves of large and small minibatches match after the warmup (Figure 2), so a run
can be judged by its curve long before it converges. The program prints a verdict for each group and
writes compare_runs.png, .html (the same in one file, for a reader) and .json (for a program).

final error: the median of the validation error of a run's last 5 epochs (§5); of a group, the mean
  ± sample standard deviation over its complete runs, or over all as long as none is complete.
training error of an epoch: the mean over its steps. An epoch that is not over has none.
difference: a group's mean error less the baseline's, each over the seeds that have that epoch.
band: 2 s sqrt(1/a + 1/b) for groups of a and b seeds, two standard errors of the difference, where
  s is their pooled sample standard deviation at that epoch; none where both have one seed. Pooling
  lets a group of several seeds lend its scatter to one of a single seed. s is rough for few seeds;
  the factor stays 2, not a t quantile (12.7 for two), with which anything would match.
match: |difference| is within the larger of the band and --tolerance. The default, one point, tells
  apart what the paper does: in its Table 1 gradual warmup ends 0.14 points above the baseline, no
  warmup 1.24 and constant warmup 2.28.
follows: all epochs that both have match from one on. leaves: none does from one on. meets: only the
  last matches. The verdict is on the validation error. Where the training error matches and it does
  not, the running averages of batch normalisation, noisier for large kn (§5.2), may be why.
"""

import base64
import dataclasses
import html
import io
import json
import math
import os
import statistics
import sys

from absl import app, flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "compare_runs", "Directory for what is written.")
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 0.01, "Difference of two errors that counts as a match; a fraction, 0.01: one point."
)
_BASELINE = flags.DEFINE_string(
  "baseline", None, "One of the RUNs, whose group is the baseline; left out: the first."
)

_NAME = "compare_runs"
_FINAL_EPOCHS = 5
_ROUNDING = 1e-9  # 0.31 - 0.30 is a little more than 0.01.
_KINDS = {"training": "Training error", "validation": "Validation error"}
# Errors of runs that differ in these are not errors of the same thing.
_TASK_FIELDS = ("dataset", "train_split", "validation_split", "network")
_WORKER_FIELDS = ("workers", "per_worker_batch_size")
# Okabe and Ito's colours for all kinds of colour vision, less their yellow, too pale for a line.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"
_STYLES = ("-", "--", ":")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse }}
td, th {{ border-bottom: 1px solid #ccc; padding: .2em 1em .2em 0; text-align: left }}
td, pre {{ white-space: pre-wrap; font-family: inherit }}
</style>
<h1>{title}</h1>
{words}
<img alt="Error by epoch; the text above tells what it shows." src="data:image/png;base64,{image}">
<table>
<tr><th>{head}
{rows}
</table>
<h2>What the words mean</h2>
<pre>{meaning}</pre>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a work directory tells; the curves map an epoch to an error, a fraction."""

  work_dir: str
  recipe: Recipe
  complete: bool
  training: dict[float, float]
  validation: dict[float, float]

  @property
  def final_epochs(self) -> list[float]:
    """The epochs that the final error is taken from."""
    return sorted(self.validation)[-_FINAL_EPOCHS:]

  @property
  def final_error(self) -> float:
    """Median of the validation error of the last five epochs, of all if there are fewer."""
    return statistics.median(self.validation[epoch] for epoch in self.final_epochs)


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one recipe, but for the seed."""

  label: str
  runs: tuple[Run, ...]

  @property
  def recipe(self) -> Recipe:
    """The recipe, with the first run's seed."""
    return self.runs[0].recipe

  @property
  def complete(self) -> bool:
    """Whether all its runs are complete."""
    return all(run.complete for run in self.runs)

  @property
  def warmup_ends(self) -> float:
    """The epoch at which the warmup ends, 0 where there is none."""
    return self.recipe.warmup_epochs if self.recipe.warms_up else 0.0

  @property
  def final_errors(self) -> list[float]:
    """Of its complete runs, or of all as long as none is complete."""
    runs = [run for run in self.runs if run.complete] or self.runs
    return [run.final_error for run in runs]

  def errors(self, kind: str) -> dict[float, list[float]]:
    """Epoch → the errors of the runs that have it."""
    curves = [getattr(run, kind) for run in self.runs]
    epochs = sorted({epoch for curve in curves for epoch in curve})
    return {epoch: [curve[epoch] for curve in curves if epoch in curve] for epoch in epochs}


@dataclasses.dataclass(frozen=True)
class Difference:
  """A group's mean error less the baseline's at an epoch; the limit is up to where they match."""

  epoch: float
  difference: float
  band: float | None
  limit: float
  match: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The differences at all epochs that a group and the baseline have."""

  differences: list[Difference]
  tolerance: float

  @property
  def tail(self) -> list[Difference]:
    """The longest run of epochs up to the last that all match, or of which none does."""
    start = len(self.differences)
    while start and self.differences[start - 1].match == self.differences[-1].match:
      start -= 1
    return self.differences[start:]

  @property
  def verdict(self) -> str:
    """One of "follows", "leaves", "never matches" and "nothing in common"."""
    if not self.differences:
      return "nothing in common"
    if self.tail[0].match:
      return "follows"
    return "leaves" if len(self.tail) < len(self.differences) else "never matches"

  @property
  def matches_from_epoch(self) -> float | None:
    """The smallest epoch from which on all match; None where the last does not."""
    return self.tail[0].epoch if self.verdict == "follows" else None

  @property
  def side(self) -> str:
    """Where the group's curve is in the tail, seen from the baseline's."""
    signs = {math.copysign(1, each.difference) for each in self.tail}
    return {(1,): "above", (-1,): "below"}.get(tuple(signs), "now above, now below,")

  def tell(self) -> str:
    """What follows "its … error", in words."""
    tail, first, last = self.tail, self.tail[0], self.tail[-1]
    sizes = [abs(each.difference) for each in tail]
    limits = f"tolerance {100 * self.tolerance:g}"
    widest = max(each.limit for each in tail)
    if widest > self.tolerance:
      limits += f", seeds' band up to {_points(widest)}"
    if self.verdict == "follows":
      where = f"from epoch {first.epoch:g} on"
      if len(tail) == len(self.differences):
        where = f"at every epoch, {first.epoch:g} to {last.epoch:g}"
      if len(tail) == 1:
        only = "the only one" if len(self.differences) == 1 else "the last"
        where = f"only at epoch {last.epoch:g}, {only} compared"
      return f"matches {where} (within {_points(max(sizes))} points; {limits})"
    end = f"({_points(sizes[-1])} at epoch {last.epoch:g}; {limits})"
    if self.verdict == "never matches":
      return f"is {self.side} by at least {_points(min(sizes))} points {end}"
    matches = [each.epoch for each in self.differences if each.match]
    before = f"matched through epoch {matches[-1]:g}"
    if len(matches) + len(tail) < len(self.differences):
      before = f"matched at {len(matches)} of {len(self.differences)} epochs, last {matches[-1]:g}"
    size = f"{_points(max(sizes))} points"
    if len(tail) == 1:
      return f"{before}, and at epoch {last.epoch:g} is {self.side} by {size} ({limits})"
    return f"{before}, and from epoch {first.epoch:g} on is {self.side} by up to {size} {end}"


def seeds_band(errors: list[float], baseline: list[float]) -> float | None:
  """Two standard errors of the difference of two means, by the pooled standard deviation."""
  degrees = len(errors) + len(baseline) - 2
  if not degrees:
    return None
  groups = [group for group in (errors, baseline) if len(group) > 1]
  squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
  return 2 * math.sqrt(squares / degrees * (1 / len(errors) + 1 / len(baseline)))


def compare(group: Group, baseline: Group, kind: str, tolerance: float) -> Comparison:
  """Compares "training" or "validation" errors at the epochs that both have."""
  theirs = baseline.errors(kind)
  differences = []
  for epoch, errors in group.errors(kind).items():
    if epoch in theirs:
      difference = statistics.fmean(errors) - statistics.fmean(theirs[epoch])
      band = seeds_band(errors, theirs[epoch])
      limit = max(tolerance, band or 0.0)
      match = abs(difference) <= limit + _ROUNDING
      differences.append(Difference(epoch, difference, band, limit, match))
  return Comparison(differences, tolerance)


def tell(group: Group, baseline: Group, comparisons: dict[str, Comparison]) -> str:
  """A group's verdict in words."""
  validation, training = comparisons["validation"], comparisons["training"]
  epochs = [each.epoch for each in validation.differences]
  if not epochs:
    return f"{group.label} and its baseline {baseline.label} have no evaluated epoch in common."
  verdict = validation.verdict
  if verdict == "follows" and len(validation.tail) == 1:
    verdict = "meets"  # One epoch is no curve.
  text = (
    f"{group.label} {verdict} its baseline {baseline.label}: its validation error "
    f"{validation.tell()}."
  )
  if not training.differences:
    text += " They have no whole epoch of training in common."
  else:
    agree = (training.verdict == "follows") == (validation.verdict == "follows")
    text += f" {'Its' if agree else 'But its'} training error {training.tell()}."
  if group.complete and baseline.complete:
    ours, theirs = (_mean_error(each.final_errors) for each in (group, baseline))
    text += f" Final error {ours} against {theirs}."
  planned = sorted({group.recipe.epochs, baseline.recipe.epochs})
  if len(epochs) < planned[-1]:
    which = f"epochs {epochs[0]:g} to {epochs[-1]:g}" if len(epochs) > 1 else f"epoch {epochs[0]:g}"
    text += f" Only {which} could be compared, of {' and '.join(map(str, planned))}."
  warmup_ends = max(group.warmup_ends, baseline.warmup_ends)
  if epochs[-1] <= warmup_ends:
    text += f" That is within the warmup ({warmup_ends:g} epochs), during which curves may differ."
  return text


def _points(fraction: float) -> str:
  return f"{100 * fraction:.2f}"


def _seeds(runs: list[Run]) -> str:
  return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def _mean_error(errors: list[float]) -> str:
  scatter = f" ± {_points(statistics.stdev(errors))}" if len(errors) > 1 else ""
  return f"{_points(statistics.fmean(errors))}{scatter} %"


def _read(path: str, missing: str) -> str:
  try:
    with open(path, encoding="utf-8") as file:
      return file.read()
  except FileNotFoundError as error:
    raise UserError(missing) from error
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); mend it or leave its run out.") from error


def read_recipe(work_dir: str) -> Recipe:
  """The recipe of the run in a work directory.

  Raises:
    UserError: there is none, or it is damaged.
  """
  if not os.path.isdir(work_dir):
    raise UserError(f"{work_dir} is no directory; give the --work_dir of a run.")
  path = os.path.join(work_dir, "recipe.json")
  text = _read(path, f"{work_dir} has no recipe.json; give the --work_dir of a run.")
  try:
    recipe = Recipe(**json.loads(text)["recipe"])
    recipe.global_batch_size  # noqa: B018 - Raises where k is missing.
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path} is no recipe of a run ({error}); leave its run out.") from error
  return recipe


def read_run(work_dir: str, recipe: Recipe) -> Run:
  """The run's curves, as far as they go.

  Raises:
    UserError: nothing was evaluated yet, or a file is damaged.
  """
  # Only now, for it imports TensorFlow, and most mistakes are found before.
  from tf_largebatch.training.metrics import read_metrics

  path = os.path.join(work_dir, "result.json")
  complete = os.path.exists(path)
  if complete:
    text = _read(path, f"{path} is gone; try again.")
    try:
      complete = json.loads(text)["status"] == "complete"
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f"{path} is no result of a run ({error}); leave its run out.") from error
  path = os.path.join(work_dir, "metrics.jsonl")
  lines = _read(path, f"{work_dir} has no metrics.jsonl; leave this run out.").splitlines()
  records = read_metrics(work_dir)
  # The last line may be half-written while the run goes on; `read_metrics` ends at any such line.
  if len(records) < len(lines) - (not complete):
    raise UserError(
      f"{path} is damaged in line {len(records) + 1} of {len(lines)}; mend it or leave its run out."
    )
  for number, record in enumerate(records, 1):
    for name in ("epoch", "error"):
      value = record.get(name)
      if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(
          f"{path} line {number}: {name} is {value}, no finite number; leave this run out."
        )
  validation = {each["epoch"]: each["error"] for each in records if each["kind"] == "eval"}
  if not validation:
    raise UserError(
      f"{work_dir} has no evaluation yet; wait for its first epoch to end, or leave this run out."
    )
  return Run(work_dir, recipe, complete, training_curve(records), validation)


def training_curve(records: list[dict]) -> dict[float, float]:
  """Epoch → mean training error over all its steps, for the epochs that are over.

  A record is the mean over the steps since the one before it or since the epoch began, so it
  weighs as much as the part of the epoch that it spans.
  """
  curve, total, before = {}, 0.0, None
  for record in records:
    if record["kind"] != "train":
      continue
    epoch = math.ceil(record["epoch"])
    if before is None or before <= epoch - 1:
      before, total = epoch - 1, 0.0
    total += (record["epoch"] - before) * record["error"]
    before = record["epoch"]
    if before == epoch:
      curve[epoch] = total
  return curve


def group_runs(runs: list[Run], baseline: Run) -> list[Group]:
  """Groups of equal recipes but for the seed, the baseline's first, labelled by what differs."""
  members = {}
  for run in [baseline, *runs]:
    of_recipe = members.setdefault(dataclasses.replace(run.recipe, seed=0), [])
    if run not in of_recipe:
      of_recipe.append(run)
  recipes = [recipe.to_dict() for recipe in members]
  differ = [name for name in recipes[0] if any(each[name] != recipes[0][name] for each in recipes)]
  return [
    Group(_label(recipe, recipes[0], differ), tuple(of_recipe))
    for recipe, of_recipe in zip(recipes, members.values(), strict=True)
  ]


def _label(recipe: dict, baseline: dict, differ: list[str]) -> str:
  k, n = (recipe[name] for name in _WORKER_FIELDS)
  others = [name for name in differ if name not in _WORKER_FIELDS]
  with_size = not differ or others != differ
  parts = [f"k={k}"] if with_size else []
  if not differ or "per_worker_batch_size" in differ:
    parts.append(f"n={n}")
  for name in others:
    # Beside kn only what is other than the baseline's, or labels would be too long to read.
    if not with_size or recipe[name] != baseline[name]:
      value = recipe[name]
      value = ",".join(f"{item:g}" for item in value) if isinstance(value, list) else value
      parts.append(f"{name}={value}")
  return f"kn {k * n} ({', '.join(parts)})" if with_size else ", ".join(parts)


def notes(groups: list[Group]) -> list[str]:
  """What a reader should know of the runs before any verdict."""
  lines = []
  if len(groups) == 1:
    lines.append("There is one recipe only, so nothing to compare it with.")
  recipes = [group.recipe.to_dict() for group in groups]
  for name in _TASK_FIELDS:
    values = list(dict.fromkeys(str(recipe[name]) for recipe in recipes))
    if len(values) > 1:
      lines.append(f"The runs differ in {name} ({', '.join(values)}): so may what errors mean.")
  for run in (run for group in groups for run in group.runs):
    if not run.complete:
      reached = max(run.validation)
      lines.append(f"{run.work_dir} is incomplete: epoch {reached:g} of {run.recipe.epochs}.")
  return lines


def final_table(groups: list[Group]) -> list[list[str]]:
  """Rows of the final errors, a heading first: each group, then its runs."""
  rows = [["recipe, runs", "seed", "epochs", "final error", "median over"]]
  for group in groups:
    runs = [run for run in group.runs if run.complete] or group.runs
    state = "" if runs[0].complete else ", so far"
    rows.append([group.label, _seeds(runs), "", _mean_error(group.final_errors) + state, ""])
    for run in group.runs:
      first, last = run.final_epochs[0], run.final_epochs[-1]
      rows.append(
        [
          f"  {run.work_dir}",
          str(run.recipe.seed),
          f"{last:g} of {run.recipe.epochs}",
          f"{_points(run.final_error)} %" + ("" if run.complete else ", incomplete"),
          f"epochs {first:g} to {last:g}",
        ]
      )
  return rows


def draw(
  groups: list[Group], comparisons: dict[str, dict[str, Comparison]], tolerance: float
) -> bytes:
  """The picture, a PNG: mean errors ± standard deviation; below, differences ± band."""
  from matplotlib.figure import Figure  # Only now, for mistakes should not wait for it.
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  rows = 2 if comparisons else 1
  figure = Figure(figsize=(11, 2 + 3 * rows), dpi=150, layout="constrained")
  panels = figure.subplots(rows, 2, sharex=True, sharey="row", squeeze=False)
  warmup_ends = max(group.warmup_ends for group in groups)
  for column, (kind, title) in zip(panels.T, _KINDS.items(), strict=True):
    column[0].set_title(title)
    column[-1].set_xlabel("epoch")
    for index, group in enumerate(groups):
      label = f"{group.label}: {_seeds(group.runs)}{'' if group.complete else ', incomplete'}"
      points = [
        (epoch, statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0)
        for epoch, each in group.errors(kind).items()
      ]
      _draw_curve(column[0], index, label, points)
      if group.label in comparisons:
        differences = comparisons[group.label][kind].differences
        points = [(each.epoch, each.difference, each.band or 0.0) for each in differences]
        _draw_curve(column[1], index, label, points)
    if comparisons:
      limit = 100 * tolerance
      column[1].axhspan(-limit, limit, color="0.8", zorder=0, label=f"tolerance, ±{limit:g}")
      # Linear near zero, where matches show; beyond logarithmic, for curves may be far apart.
      column[1].set_yscale("symlog", linthresh=max(2 * limit, 0.1))
      column[1].yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+g}" if value else "0")
      )
    for panel in column:
      panel.grid(alpha=0.3)
      panel.set_xlim(left=0)
      panel.xaxis.set_major_locator(MaxNLocator(integer=True))
      if warmup_ends:
        panel.axvline(warmup_ends, color="0.5", linestyle=":", label="end of warmup")
  labels = ["error, %", "error less the baseline's, points"]
  shown = {}
  for panel, label in zip(panels[:, 0], labels, strict=False):
    panel.set_ylabel(label)
    handles, names = panel.get_legend_handles_labels()
    shown |= zip(names, handles, strict=True)
  legend = figure.legend(shown.values(), shown, loc="outside lower center", ncols=2, frameon=False)
  for text in legend.get_texts():
    text.set_parse_math(False)  # A label is no formula.
  image = io.BytesIO()
  figure.savefig(image, format="png")
  return image.getvalue()


def _draw_curve(panel, index: int, label: str, points: list[tuple[float, float, float]]):
  """Draws (epoch, middle, half the width of the band around it)."""
  colour = _COLOURS[index % len(_COLOURS)]
  epochs = [epoch for epoch, _, _ in points]
  lower, middle, upper = (
    [100 * (value + sign * width) for _, value, width in points] for sign in (-1, 0, 1)
  )
  panel.plot(
    epochs,
    middle,
    _MARKERS[index % len(_MARKERS)] + _STYLES[index // len(_COLOURS) % len(_STYLES)],
    color=colour,
    linewidth=1.5 if index else 3.5,  # The baseline's shows beneath the others.
    markersize=5 if index else 7,
    markevery=max(1, len(epochs) // 15),
    label=label,
  )
  panel.fill_between(epochs, lower, upper, color=colour, alpha=0.2, linewidth=0)


def to_html(title: str, lines: list[str], table: list[list[str]], image: bytes) -> str:
  """One page with everything in it: the words, the picture, the table and what the words mean."""
  head, *rows = [[html.escape(cell) for cell in row] for row in table]
  return _PAGE.format(
    title=html.escape(title),
    words="\n".join(f"<p>{html.escape(line)}</p>" for line in lines),
    image=base64.b64encode(image).decode(),
    head="<th>".join(head),
    rows="\n".join(f"<tr><td>{'<td>'.join(row)}" for row in rows),
    meaning=html.escape(__doc__[__doc__.index("final error:") :].strip()),
  )


def to_dict(
  groups: list[Group], comparisons: dict[str, dict[str, Comparison]], tolerance: float
) -> dict:
  """All the numbers, errors as fractions."""

  def of_run(run: Run) -> dict:
    names = ("work_dir", "complete", "final_error", "final_epochs")
    return {"seed": run.recipe.seed, **{name: getattr(run, name) for name in names}}

  def of_values(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation, "seeds": len(values)}

  def of_group(group: Group) -> dict:
    recipe = group.recipe.to_dict()
    del recipe["seed"]
    return {
      "label": group.label,
      "recipe": recipe,
      "warmup_ends": group.warmup_ends,
      "final_error": of_values(group.final_errors),
      "runs": [of_run(run) for run in group.runs],
      "curves": {
        kind: [{"epoch": epoch, **of_values(each)} for epoch, each in group.errors(kind).items()]
        for kind in _KINDS
      },
      "against_baseline": {
        kind: {
          "verdict": each.verdict,
          "matches_from_epoch": each.matches_from_epoch,
          "differences": [dataclasses.asdict(difference) for difference in each.differences],
        }
        for kind, each in comparisons.get(group.label, {}).items()
      },
    }

  # The first group is the baseline.
  return {"tolerance": tolerance, "groups": [of_group(group) for group in groups]}


def write_all(output_dir: str, contents: dict[str, bytes]):
  """Writes files by name, none of them by half.

  Raises:
    UserError: the directory cannot be written.
  """
  partial = {name: os.path.join(output_dir, f".{name}.partial") for name in contents}
  try:
    os.makedirs(output_dir, exist_ok=True)
    try:
      for name, content in contents.items():
        with open(partial[name], "wb") as file:
          file.write(content)
      for name in contents:
        os.replace(partial[name], os.path.join(output_dir, name))
    finally:
      for path in partial.values():
        if os.path.exists(path):
          os.remove(path)
  except OSError as error:
    raise UserError(
      f"--output_dir={output_dir} cannot be written ({error.strerror}); name one that can."
    ) from error


def compare_runs(
  work_dirs: list[str], output_dir: str, tolerance: float, baseline: str | None
) -> str:
  """Compares runs, writes the picture, the page and the numbers, and returns the words.

  Raises:
    UserError: a run, the baseline, the tolerance or the directory will not do.
  """
  if not work_dirs:
    raise UserError("No run was given; give the work directories of the runs to compare.")
  if not 0 <= tolerance < 1:  # NaN neither.
    raise UserError(f"--tolerance={tolerance} is refused; give a fraction, such as 0.01: a point.")
  recipes = {}
  for work_dir in work_dirs:
    recipe = read_recipe(work_dir)
    if recipe in recipes:
      raise UserError(
        f"{recipes[recipe]} and {work_dir} are the same run twice (recipe and seed {recipe.seed}); "
        "leave one of them out."
      )
    recipes[recipe] = work_dir
  named = [os.path.realpath(work_dir) for work_dir in work_dirs]
  if baseline is not None and os.path.realpath(baseline) not in named:
    raise UserError(
      f"--baseline={baseline} is none of the runs; name one of {', '.join(work_dirs)}."
    )
  runs = [read_run(work_dir, recipe) for recipe, work_dir in recipes.items()]
  first = runs[named.index(os.path.realpath(baseline)) if baseline is not None else 0]
  groups = group_runs(runs, first)
  baseline_group, *others = groups
  comparisons = {
    group.label: {kind: compare(group, baseline_group, kind, tolerance) for kind in _KINDS}
    for group in others
  }
  lines = [tell(group, baseline_group, comparisons[group.label]) for group in others]
  lines += [f"Note: {note}" for note in notes(groups)]
  table = final_table(groups)
  title = f"Training curves: {'; '.join(group.label for group in groups)}"
  image = draw(groups, comparisons, tolerance)
  numbers = {"words": lines, **to_dict(groups, comparisons, tolerance)}
  write_all(
    output_dir,
    {
      f"{_NAME}.png": image,
      f"{_NAME}.html": to_html(title, lines, table, image).encode(),
      f"{_NAME}.json": (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode(),
    },
  )
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  for row in table:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    lines.append("  ".join(cells).rstrip())
  lines.append(f"Curves: {os.path.join(output_dir, _NAME)}.png, .html and .json")
  return "\n".join(lines)


def main(argv: list[str]) -> int:
  """Compares the runs on the command line, and returns the process' exit status."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only reads files here.
  try:
    print(
      compare_runs(
        [os.path.expanduser(path) for path in argv[1:]],
        os.path.expanduser(_OUTPUT_DIR.value),
        _TOLERANCE.value,
        _BASELINE.value and os.path.expanduser(_BASELINE.value),
      )
    )
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  app.run(main)
