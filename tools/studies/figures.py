"""The pictures of `tools.replication`."""

import itertools
import math
import statistics

from tools.studies import claims
from tools.studies.claims import BASELINE, CONSTANT, GRADUAL, KNOWN, NONE, OTHERS, SWEEP
from tools.studies.curves import COLOURS, KINDS
from tools.studies.output import to_png
from tools.studies.results import Group
from tools.studies.verdicts import DELTA, NOT_DECIDABLE, NOT_REPRODUCED, REPRODUCED, equal, welch

# The paper's Figures 1 and 3: kn → top-1 validation error, mean and standard deviation, %.
_PAPER = {
  **{128: (23.49, 0.12), 256: (23.60, 0.12), 512: (23.48, 0.09), 1024: (23.53, 0.08)},
  **{2048: (23.49, 0.11), 4096: (23.56, 0.12), 8192: (23.74, 0.09), 16384: (24.79, 0.27)},
  **{32768: (27.55, 0.28), 65536: (33.96, 0.80)},
}
_PAPER_BASELINE = 256
_BLACK, _BLUE, _ORANGE, _GREEN, _PINK = COLOURS[:5]
_VERDICT_COLOURS = {REPRODUCED: _BLUE, NOT_REPRODUCED: _ORANGE, NOT_DECIDABLE: "0.5"}


def draw(groups: dict[str, Group]) -> dict[str, bytes]:
  """Draws the pictures that have runs to show; returns PNGs by name."""
  warmups = ((GRADUAL, "gradual warmup", _BLUE), (CONSTANT, "constant warmup", _ORANGE))
  curves = [(BASELINE, "baseline", _BLACK), *warmups, (NONE, "no warmup", _GREEN)]
  table_1 = [[(kind, "", curves) for kind in KINDS]]
  panels = [
    ("training", f"{SWEEP[stem]} × the baseline's", [(BASELINE, "", "0.6"), (stem, "", _BLUE)])
    for stem in OTHERS
  ]
  correction = [
    [(kind, name, [(stem, "corrected", colour), (other, "uncorrected", _PINK)]) for kind in KINDS]
    for (stem, name, colour), other in zip(warmups, claims.UNCORRECTED, strict=True)
  ]
  known = [[(kind, "", [(KNOWN, "ResNet-20", _BLUE)]) for kind in KINDS]]
  pictures = {
    "figure1": draw_figure_1(groups),
    "table1": _draw_curves(groups, table_1, claims.TABLE_1),
    "figure3": _draw_curves(groups, [panels[:4], panels[4:]], OTHERS),
    "correction": _draw_curves(groups, correction, claims.UNCORRECTED),
    "known_number": _draw_curves(groups, known, (KNOWN,)),
  }
  return {name: image for name, image in pictures.items() if image}


def _draw_curves(groups: dict[str, Group], rows: list[list], needed) -> bytes | None:
  """Draws panels of curves.

  Args:
    groups: by stem.
    rows: of panels (kind of error, title, curves), whose curves are (stem, label, colour).
    needed: stems; without a run of any of them there is no picture.
  """
  from matplotlib.figure import Figure  # Slow to import, so not before the results are checked.

  if not any(stem in groups for stem in needed):
    return None
  size = (1.5 + 2.6 * len(rows[0]) if len(rows[0]) > 2 else 11, 1.2 + 3 * len(rows))
  figure = Figure(figsize=size, dpi=150, layout="constrained")
  share = "all" if len(rows[0]) > 2 else "col"
  panels = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=share, squeeze=False)
  for panel, (kind, title, curves) in zip(panels.flat, itertools.chain(*rows), strict=True):
    present = [(groups[stem], label, colour) for stem, label, colour in curves if stem in groups]
    for index, (group, label, colour) in enumerate(present):
      name = f"kn {group.kn}{label and ', '}{label}"
      _draw_curve(panel, group.curves.errors(kind), name, colour, 1.5 if index else 3)
    ends = max((group.curves.warmup_ends for group, _, _ in present), default=0)
    _finish_panel(panel, ends, bool(present))
    panel.set(title=title, xlabel="epoch", ylabel=f"{kind} error, %")
  for panel in panels.flat:  # After all curves, because some panels share their limits.
    _set_ticks(panel)
    if share == "all":
      panel.label_outer()
  return to_png(figure)


def _draw_curve(panel, errors: dict[float, list[float]], name: str, colour: str, width: float):
  """Draws mean ± standard deviation by epoch."""
  means = [100 * statistics.fmean(each) for each in errors.values()]
  scatter = [100 * statistics.stdev(e) if len(e) > 1 else 0.0 for e in errors.values()]
  # On a logarithmic axis the lower end of the band must stay above 0.
  lows = [max(mean - each, mean / 10) for mean, each in zip(means, scatter, strict=True)]
  highs = [mean + each for mean, each in zip(means, scatter, strict=True)]
  panel.plot(list(errors), means, color=colour, label=name, linewidth=width)
  panel.fill_between(list(errors), lows, highs, color=colour, alpha=0.25, linewidth=0)


def _finish_panel(panel, warmup_ends: float, has_curves: bool):
  from matplotlib.ticker import MaxNLocator

  if warmup_ends:
    panel.axvline(warmup_ends, color="0.5", linestyle=":", label="end of warmup")
  panel.set_yscale("log")
  panel.minorticks_off()
  panel.xaxis.set_major_locator(MaxNLocator(integer=True))
  panel.grid(alpha=0.3)
  if has_curves:
    panel.legend(fontsize=8, frameon=False)


def _set_ticks(panel):
  """Labels a logarithmic axis of errors with round numbers."""
  low, high = panel.get_ylim()
  low = max(low, 0.01)  # A logarithmic axis cannot show an error of 0.
  panel.set_ylim(low, high)
  parts = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
  ticks = (part * 10**power for power in (-2, -1, 0, 1) for part in parts)
  shown = [tick for tick in ticks if low <= tick <= high]
  panel.set_yticks(shown, [f"{tick:g}" for tick in shown])


def draw_figure_1(groups: dict[str, Group]) -> bytes:
  """Draws the paper's Figure 1 beside ours, aligned by the minibatch's ratio to the baseline's."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
  paper, ours = figure.subplots(1, 2)
  points = [(kn / _PAPER_BASELINE, *point, _BLACK, []) for kn, point in _PAPER.items()]
  _draw_minibatches(paper, points, _PAPER[_PAPER_BASELINE][0], _PAPER_BASELINE)
  paper.set_title("Paper (ImageNet, ResNet-50; as reported)")
  paper.set_ylabel("validation error, %")
  ours.set_title("Ours")
  if BASELINE in groups:
    _draw_ours(ours, groups)
  else:
    ours.text(0.5, 0.5, "no baseline yet", ha="center", transform=ours.transAxes)
  return to_png(figure)


def _draw_ours(panel, groups: dict[str, Group]):
  baseline = groups[BASELINE]
  points = [_to_point(groups[stem], groups) for stem in SWEEP if stem in groups]
  mean, delta = 100 * statistics.fmean(baseline.errors), 100 * DELTA
  panel.axhspan(
    mean - delta, mean + delta, color="0.9", zorder=0, label=f"baseline ± {delta:g} points"
  )
  _draw_minibatches(panel, points, mean, baseline.kn)
  for verdict, colour in _VERDICT_COLOURS.items():
    if colour in [point[3] for point in points]:
      panel.plot([], [], "o", color=colour, label=claims.AGAINST_BASELINE[verdict])
  panel.plot([], [], ".", color="0.5", label="one seed (at the top edge: off the scale)")
  panel.plot([], [], "^", color="0.5", label="mean off the scale")
  panel.errorbar([], [], [], fmt="o", color="0.5", capsize=3, label="mean ± standard deviation")
  panel.legend(fontsize=9, frameon=False, loc="upper left")
  recipe = baseline.recipe
  panel.set_title(f"Ours ({recipe.dataset}, {recipe.network}: scale model)")


def _to_point(group: Group, groups: dict[str, Group]) -> tuple:
  """Returns a point for `_draw_minibatches`, coloured by its verdict against the baseline."""
  baseline, errors = groups[BASELINE], group.errors
  scatter = 100 * statistics.stdev(errors) if len(errors) > 1 else 0.0
  mean, colour = 100 * statistics.fmean(errors), _BLACK
  if group is not baseline:
    several = min(len(errors), len(baseline.errors)) > 1
    test = welch(errors, baseline.errors) if several else None
    colour = _VERDICT_COLOURS[equal(test)]
  each = [100 * error for error in errors]
  return claims.ratio_to_baseline(group, groups), mean, scatter, colour, each


def _draw_minibatches(panel, points: list[tuple], baseline: float, baseline_kn: int):
  """Draws error by minibatch.

  Args:
    panel: to draw in.
    points: (kn over the baseline's kn, mean, standard deviation, colour, error of each seed).
    baseline: its error, %.
    baseline_kn: its minibatch.
  """
  # Both panels show the same range relative to the baseline's error. Errors above it, such as
  # chance, are drawn at the top edge: a larger range would flatten all others.
  top = 1.5 * baseline
  panel.set_ylim(0.92 * baseline, top)
  panel.axhline(baseline, color="0.4", linestyle="--", linewidth=1, zorder=1)
  shown = [(math.log2(ratio), mean) for ratio, mean, *_ in points if mean < top]
  panel.plot(*zip(*shown, strict=True), color="0.6", linewidth=1, zorder=1)
  for ratio, mean, scatter, colour, each in points:
    place = math.log2(ratio)
    dots = [min(error, 0.985 * top) for error in each]
    panel.plot([place + 0.15] * len(dots), dots, ".", color=colour, alpha=0.5, markersize=5)
    if mean < top:
      panel.errorbar(place, mean, scatter, fmt="o", color=colour, capsize=3, markersize=6)
      # Where the curve rises, it comes from the lower left: the space left of the point is free.
      rises = mean > 1.04 * baseline
      where = (place, mean if rises else mean + scatter)
      offset, side, text = (-8, -1) if rises else (0, 5), "right" if rises else "center", ""
    else:
      panel.plot(place, 0.985 * top, "^", color=colour, markersize=8)
      where, offset, side, text = (place, 0.985 * top), (0, -30), "center", f"\n±{scatter:.1f}"
    panel.annotate(
      f"{mean:.1f}{text}", where, offset, textcoords="offset points", ha=side, fontsize=9
    )
  ticks = range(-1, 9)
  sizes = [round(baseline_kn * 2**tick) for tick in ticks]
  names = [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes]
  ratios = [f"{2**tick}×" if tick >= 0 else "½×" for tick in ticks]
  panel.set_xticks(ticks, [f"{name}\n{ratio}" for name, ratio in zip(names, ratios, strict=True)])
  panel.set_xlim(-1.5, 8.5)
  panel.set_xlabel("minibatch kn, and its ratio to the baseline's")
  panel.grid(axis="y", alpha=0.3)
