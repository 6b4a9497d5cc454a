"""The pictures of `tools.answers`."""

import math
import statistics

from tools.studies import answers
from tools.studies.answers import BASELINE, NO_MOMENTUM, SAME_STEPS, SWEEP, Runs
from tools.studies.curves import COLOURS
from tools.studies.output import to_png
from tools.studies.verdicts import DELTA

_BLACK, _BLUE, _ORANGE = COLOURS[:3]
_TICKS = (9, 10, 11, 12, 15, 20, 30, 50, 90)


def draw(runs: Runs) -> dict[str, bytes]:
  """Draws the pictures that have runs to show; returns PNGs by name."""
  if not runs.errors(BASELINE):
    return {}
  pictures = {"d1": _draw_sweep(runs)}
  groups = _why_groups(runs)
  if len(groups) > 3:  # Besides the runs of d1.
    pictures["why"] = _draw_groups(runs, groups)
  return pictures


def _why_groups(runs: Runs) -> dict[str, str]:
  """The groups of (why) that have runs, by label."""
  best = {
    "searched rate": runs.best(answers.RATES),
    "same steps, searched rate": runs.best(answers.STEPS_RATES),
    "long warmup": runs.best(answers.WARMUPS),
  }
  groups = {"kn 16": BASELINE, "kn 512": SWEEP[512], "kn 1024": SWEEP[1024]}
  groups |= {"same steps": SAME_STEPS}
  groups |= {label: stem for label, stem in best.items() if stem}
  groups |= {f"kn {kn}, m = 0": stem for kn, stem in NO_MOMENTUM.items()}
  return {label: stem for label, stem in groups.items() if runs.errors(stem)}


def _new_figure(width: float):
  from matplotlib.figure import Figure  # Slow to import, so not before the results are checked.

  return Figure(figsize=(width, 4.5), dpi=150, layout="constrained")


def _draw_sweep(runs: Runs) -> bytes:
  """Draws the error by kn, and the noise scale by epoch."""
  figure = _new_figure(12)
  errors, scales = figure.subplots(1, 2)
  present = {f"{kn}": stem for kn, stem in SWEEP.items() if runs.errors(stem)}
  _draw_errors(errors, runs, present)
  errors.set(xlabel="minibatch kn", title="Error by minibatch")
  for index, kn in enumerate((64, 256, 1024)):
    _draw_scales(scales, runs, kn, COLOURS[index])
  where = runs.find_break() if not runs.missing(SWEEP.values()) else None
  if where:
    scales.axhline(where, color="0.4", linestyle="--", label=f"the break, kn = {where}")
  scales.set(yscale="log", xlabel="epoch", ylabel="noise scale B, images")
  scales.set(title="Noise scale (geometric mean, and range over seeds)")
  scales.grid(alpha=0.3)
  scales.legend(fontsize=9, frameon=False)
  return to_png(figure)


def _draw_scales(panel, runs: Runs, kn: int, colour: str):
  """Draws B by epoch, where every seed has a finite one."""
  by_epoch = {}
  for result in runs.results(SWEEP[kn]):
    for each in result.noise:
      by_epoch.setdefault(each.epoch, []).append(each.noise_scale)
  known = {e: b for e, b in sorted(by_epoch.items()) if all(0 < x < math.inf for x in b)}
  means = [statistics.geometric_mean(scales) for scales in known.values()]
  panel.plot(list(known), means, color=colour, marker=".", label=f"runs of kn = {kn}")
  lows, highs = ([f(scales) for scales in known.values()] for f in (min, max))
  panel.fill_between(list(known), lows, highs, color=colour, alpha=0.2, linewidth=0)


def _draw_groups(runs: Runs, groups: dict[str, str]) -> bytes:
  figure = _new_figure(1.5 + 1.2 * len(groups))
  panel = figure.subplots()
  _draw_errors(panel, runs, groups)
  panel.set_title("What mends kn = 1024")
  panel.tick_params(axis="x", labelrotation=25)
  return to_png(figure)


def _draw_errors(panel, runs: Runs, groups: dict[str, str]):
  """Draws each seed's error and the median of each group; groups are by label."""
  baseline = 100 * statistics.median(runs.errors(BASELINE))
  delta = 100 * DELTA
  label = f"baseline's median ± {delta:g} points"
  panel.axhspan(baseline - delta, baseline + delta, color="0.9", zorder=0, label=label)
  for place, stem in enumerate(groups.values()):
    each = [100 * error for error in runs.errors(stem)]
    panel.plot([place] * len(each), each, "o", color=_BLUE, alpha=0.6, markersize=5)
    panel.plot(place, statistics.median(each), "_", color=_ORANGE, markersize=22, mew=2.5)
  panel.plot([], [], "o", color=_BLUE, label="one seed")
  panel.plot([], [], "_", color=_ORANGE, mew=2.5, label="median")
  panel.set_yscale("log")
  panel.minorticks_off()
  low, high = panel.get_ylim()
  shown = [tick for tick in _TICKS if low <= tick <= high]
  panel.set_yticks(shown, [f"{tick:g}" for tick in shown])
  panel.set_xticks(range(len(groups)), list(groups))
  panel.set_ylabel("validation error, %")
  panel.grid(axis="y", alpha=0.3)
  panel.legend(fontsize=9, frameon=False, loc="upper left")
