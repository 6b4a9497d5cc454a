"""The pictures of `tools.answers`."""

import math
import statistics

from tools.benchmark.links.judgement import CLOSE
from tools.studies import answers, answers_c, answers_n, bn_results
from tools.studies.answers import BASELINE, NO_MOMENTUM, SAME_STEPS, SWEEP, Runs
from tools.studies.curves import COLOURS
from tools.studies.output import to_png
from tools.studies.verdicts import DELTA

_BLACK, _BLUE, _ORANGE = COLOURS[:3]
_SHARE_TICKS = (0.1, 1, 10, 100)
_TICKS = (9, 10, 12, 15, 20, 30, 50, 90)


def draw(runs: Runs, statistics: answers_n.Statistics, links: list[dict]) -> dict[str, bytes]:
  """Draws the pictures that have something to show; returns PNGs by name."""
  pictures = {"c": _draw_links(links)}
  if any(runs.errors(answers_n.stem(kn, n)) for kn in answers_n.KNS for n in (2, 128)):
    pictures["n"] = _draw_sizes(runs, statistics)
  if not runs.errors(BASELINE):
    return pictures
  pictures["d1"] = _draw_sweep(runs)
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
  _use_log_scale(panel)
  panel.set_xticks(range(len(groups)), list(groups))
  panel.set_ylabel("validation error, %")
  panel.grid(axis="y", alpha=0.3)
  panel.legend(fontsize=9, frameon=False, loc="upper left")


def _use_log_scale(panel):
  """Shows errors in % on a log scale, with ticks that one can read."""
  panel.set_yscale("log")
  panel.minorticks_off()
  low, high = panel.get_ylim()
  shown = [tick for tick in _TICKS if low <= tick <= high]
  panel.set_yticks(shown, [f"{tick:g}" for tick in shown])


def _draw_sizes(runs: Runs, found: answers_n.Statistics) -> bytes:
  """Draws the error by n, of the runs and of the final weights by kind of batch statistics."""
  figure = _new_figure(12)
  for panel, kn in zip(figure.subplots(1, 2, sharey=True), answers_n.KNS, strict=True):
    lines = {"error of a run": lambda n, kn=kn: runs.errors(answers_n.stem(kn, n))}
    for kind in bn_results.KINDS:
      label = f"final weights, {kind} statistics"
      lines[label] = lambda n, kn=kn, kind=kind: found.errors(answers_n.stem(kn, n), kind)
    for colour, (label, errors_of) in zip(COLOURS, lines.items(), strict=False):
      _draw_line(panel, {n: errors_of(n) for n in answers_n.SIZES}, colour, label)
    panel.set_xscale("log", base=2)
    panel.set_xticks(answers_n.SIZES, [str(n) for n in answers_n.SIZES])
    panel.set(xlabel="n, images of a worker", title=f"kn = {kn} (median, and each seed)")
    panel.set_ylabel("validation error, %")
    panel.tick_params(labelleft=True)
    _use_log_scale(panel)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=9, frameon=False)
  return to_png(figure)


def _draw_line(panel, errors: dict[int, list[float]], colour: str, label: str):
  """Draws the medians and the seeds where there are any."""
  points = {n: [100 * each for each in found] for n, found in errors.items() if found}
  medians = [statistics.median(found) for found in points.values()]
  panel.plot(list(points), medians, color=colour, marker="_", label=label)
  for n, found in points.items():
    panel.plot([n] * len(found), found, "o", color=colour, alpha=0.5, markersize=3)


def _draw_links(links: list[dict]) -> bytes:
  """Draws the forecast steps beside the measured ones, and the forecast for many GPUs."""
  figure = _new_figure(14 if links else 8)
  panels = figure.subplots(1, 2 if links else 1, squeeze=False)[0]
  if links:
    _draw_agreement(panels[0], links)
  panel = panels[-1]
  kn = [answers_c.IMAGES * gpus for gpus in answers_c.GPUS]
  styles = dict(zip(answers_c.NETWORK_GIGABITS, (":", "--", "-"), strict=True))
  for colour, network in zip(COLOURS, answers_c.NETWORKS, strict=False):
    for gigabits, style in styles.items():
      shares = answers_c.exposed_shares(network, 1, gigabits)
      panel.plot(kn, [100 * share for share in shares], style, color=colour)
    panel.plot([], [], color=colour, label=network)
  for gigabits, style in styles.items():
    panel.plot([], [], style, color="0.4", label=f"{gigabits} Gbit/s per server")
  for limit in answers_c.SHARES:
    panel.axhline(100 * limit, color="0.7", linewidth=0.8, zorder=0)
  panel.set(xscale="log", yscale="log", xlabel="minibatch kn (n = 32, 8 to 10 000 GPUs)")
  panel.set(ylabel="of the step exposed, %", title="Forecast, the paper's GPU")
  panel.set_yticks(_SHARE_TICKS, [f"{tick:g}" for tick in _SHARE_TICKS])
  panel.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
  return to_png(figure)


def _draw_agreement(panel, links: list[dict]):
  """Draws each setting's forecast over its measured step."""
  for colour, network in zip(
    COLOURS, dict.fromkeys(each["network"] for each in links), strict=False
  ):
    for packed, marker in ((True, "o"), (False, "x")):
      found = [
        each["judged"]
        for each in links
        if each["network"] == network and (each["bytes_per_pack"] > 0) == packed
      ]
      steps = [1e3 * each["step_seconds"] for each in found]
      label = f"{network}, {'packs during backprop' if packed else 'one pack after it'}"
      errors = [100 * each["error"] for each in found]
      panel.plot(steps, errors, marker, color=colour, alpha=0.7, label=label)
  panel.axhspan(-100 * CLOSE, 100 * CLOSE, color="0.9", zorder=0, label="c.2: within 20 %")
  panel.set(xscale="log", xlabel="measured step, ms", ylabel="error of the forecast, %")
  panel.set_title("Steps of 2 and 4 tasks on throttled links")
  panel.grid(alpha=0.3)
  panel.legend(fontsize=9, frameon=False, loc="center left")
