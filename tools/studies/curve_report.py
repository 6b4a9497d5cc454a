"""The report of `tools.compare_runs`: picture, page, numbers and table."""

import base64
import dataclasses
import html
import statistics

from tools.studies import comparison
from tools.studies.comparison import Comparison
from tools.studies.curves import (
  COLOURS,
  KINDS,
  Group,
  Run,
  format_mean,
  format_points,
  format_seeds,
)
from tools.studies.output import to_png

# Errors of runs that differ in these fields do not measure the same thing.
_TASK_FIELDS = ("dataset", "train_split", "validation_split", "network")
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
<img alt="Error by epoch, as the text above describes." src="data:image/png;base64,{image}">
<table>
<tr><th>{head}
{rows}
</table>
<h2>Definitions</h2>
<pre>{definitions}</pre>
</html>
"""


def notes(groups: list[Group]) -> list[str]:
  """Returns what a reader should know about the runs before any verdict."""
  lines = []
  if len(groups) == 1:
    lines.append("All runs have one recipe, so there is nothing to compare.")
  recipes = [group.recipe.to_dict() for group in groups]
  for name in _TASK_FIELDS:
    values = list(dict.fromkeys(str(recipe[name]) for recipe in recipes))
    if len(values) > 1:
      lines.append(
        f"The runs differ in {name} ({', '.join(values)}), so their errors may not be comparable."
      )
  for run in (run for group in groups for run in group.runs):
    if not run.complete:
      reached = max(run.validation)
      lines.append(f"{run.path} is incomplete: epoch {reached:g} of {run.recipe.epochs}.")
  return lines


def final_table(groups: list[Group]) -> list[list[str]]:
  """Returns rows of the final errors, a heading first: each group, then its runs."""
  rows = [["recipe, runs", "seed", "epochs", "final error", "median over"]]
  for group in groups:
    state = "" if group.final_runs[0].complete else ", so far"
    error = format_mean(group.final_errors) + state
    rows.append([group.label, format_seeds(group.final_runs), "", error, ""])
    for run in group.runs:
      first, last = run.final_epochs[0], run.final_epochs[-1]
      rows.append(
        [
          f"  {run.path}",
          str(run.recipe.seed),
          f"{last:g} of {run.recipe.epochs}",
          f"{format_points(run.final_error)} %" + ("" if run.complete else ", incomplete"),
          f"epochs {first:g} to {last:g}",
        ]
      )
  return rows


def draw(
  groups: list[Group], comparisons: dict[str, dict[str, Comparison]], tolerance: float
) -> bytes:
  """Draws mean errors ± standard deviation and, below, differences ± band; returns a PNG."""
  from matplotlib.figure import Figure  # Slow to import, so not before the runs have been checked.

  rows = 2 if comparisons else 1
  figure = Figure(figsize=(11, 2 + 3 * rows), dpi=150, layout="constrained")
  panels = figure.subplots(rows, 2, sharex=True, sharey="row", squeeze=False)
  warmup_ends = max(group.warmup_ends for group in groups)
  for column, kind in zip(panels.T, KINDS, strict=True):
    column[0].set_title(f"{kind.capitalize()} error")
    column[-1].set_xlabel("epoch")
    for index, group in enumerate(groups):
      _draw_group(column, index, group, kind, comparisons)
    if comparisons:
      _show_tolerance(column[1], 100 * tolerance)
    for panel in column:
      _finish_panel(panel, warmup_ends)
  labels = ["error, %", "difference from the baseline, points"]
  shown = {}
  for panel, label in zip(panels[:, 0], labels, strict=False):
    panel.set_ylabel(label)
    handles, names = panel.get_legend_handles_labels()
    shown |= zip(names, handles, strict=True)
  legend = figure.legend(shown.values(), shown, loc="outside lower center", ncols=2, frameon=False)
  for text in legend.get_texts():
    text.set_parse_math(False)  # A $ in a label does not start a formula.
  return to_png(figure)


def _draw_group(column, index: int, group: Group, kind: str, comparisons):
  """Draws a group's errors and, if it has been compared, its differences below."""
  label = f"{group.label}: {format_seeds(group.runs)}{'' if group.complete else ', incomplete'}"
  points = [
    (epoch, statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0)
    for epoch, each in group.errors(kind).items()
  ]
  _draw_curve(column[0], index, label, points)
  if group.label in comparisons:
    differences = comparisons[group.label][kind].differences
    points = [(each.epoch, each.difference, each.band or 0.0) for each in differences]
    _draw_curve(column[1], index, label, points)


def _draw_curve(panel, index: int, label: str, points: list[tuple[float, float, float]]):
  """Draws points of (epoch, value, half the width of the band around it)."""
  colour = COLOURS[index % len(COLOURS)]
  epochs = [epoch for epoch, _, _ in points]
  lower, middle, upper = (
    [100 * (value + sign * width) for _, value, width in points] for sign in (-1, 0, 1)
  )
  panel.plot(
    epochs,
    middle,
    _MARKERS[index % len(_MARKERS)] + _STYLES[index // len(COLOURS) % len(_STYLES)],
    color=colour,
    linewidth=1.5 if index else 3.5,  # The baseline's shows beneath the others.
    markersize=5 if index else 7,
    markevery=max(1, len(epochs) // 15),
    label=label,
  )
  panel.fill_between(epochs, lower, upper, color=colour, alpha=0.2, linewidth=0)


def _show_tolerance(panel, limit: float):
  """Shades ±limit, in points, and scales the axis: linear near 0, logarithmic far from it."""
  from matplotlib.ticker import FuncFormatter

  panel.axhspan(-limit, limit, color="0.8", zorder=0, label=f"tolerance, ±{limit:g}")
  panel.set_yscale("symlog", linthresh=max(2 * limit, 0.1))
  panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))


def _finish_panel(panel, warmup_ends: float):
  from matplotlib.ticker import MaxNLocator

  panel.grid(alpha=0.3)
  panel.set_xlim(left=0)
  panel.xaxis.set_major_locator(MaxNLocator(integer=True))
  if warmup_ends:
    panel.axvline(warmup_ends, color="0.5", linestyle=":", label="end of warmup")


def to_html(title: str, lines: list[str], table: list[list[str]], image: bytes) -> str:
  """Returns a page that includes everything: text, picture, table and definitions."""
  head, *rows = [[html.escape(cell) for cell in row] for row in table]
  definitions = comparison.__doc__
  return _PAGE.format(
    title=html.escape(title),
    words="\n".join(f"<p>{html.escape(line)}</p>" for line in lines),
    image=base64.b64encode(image).decode(),
    head="<th>".join(head),
    rows="\n".join(f"<tr><td>{'<td>'.join(row)}" for row in rows),
    definitions=html.escape(definitions[definitions.index("final error:") :].strip()),
  )


def to_dict(
  groups: list[Group], comparisons: dict[str, dict[str, Comparison]], tolerance: float
) -> dict:
  """Returns all numbers, errors as fractions; the first group is the baseline."""
  return {
    "tolerance": tolerance,
    "groups": [_group_to_dict(group, comparisons.get(group.label, {})) for group in groups],
  }


def _group_to_dict(group: Group, comparisons: dict[str, Comparison]) -> dict:
  recipe = group.recipe.to_dict()
  del recipe["seed"]
  return {
    "label": group.label,
    "recipe": recipe,
    "warmup_ends": group.warmup_ends,
    "final_error": _mean_to_dict(group.final_errors),
    "runs": [_run_to_dict(run) for run in group.runs],
    "curves": {
      kind: [{"epoch": epoch, **_mean_to_dict(each)} for epoch, each in group.errors(kind).items()]
      for kind in KINDS
    },
    "against_baseline": {
      kind: {
        "verdict": each.verdict,
        "matches_from_epoch": each.matches_from_epoch,
        "differences": [dataclasses.asdict(difference) for difference in each.differences],
      }
      for kind, each in comparisons.items()
    },
  }


def _run_to_dict(run: Run) -> dict:
  return {
    "seed": run.recipe.seed,
    "work_dir": run.path,
    "complete": run.complete,
    "final_error": run.final_error,
    "final_epochs": run.final_epochs,
  }


def _mean_to_dict(values: list[float]) -> dict:
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return {"mean": statistics.fmean(values), "standard_deviation": deviation, "seeds": len(values)}
