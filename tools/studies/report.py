"""The report of `tools.replication` in Markdown."""

import dataclasses
import os

from tools.studies import claims, post_hoc
from tools.studies.claims import BASELINE, KNOWN_ERROR, SWEEP, Claim
from tools.studies.curves import format_mean, format_points
from tools.studies.results import Group, Result
from tools.studies.verdicts import PENDING

_PILOTS = (
  "The learning rate, the number of epochs and the length of the warmup were chosen by pilot runs "
  "of the baseline and of gradual warmup at 32 times its minibatch (seed 0) before the studies "
  "began. With the paper's own η = 0.1, the curve of gradual warmup left the baseline's for good. "
  "With the paper's share of the epochs, one of 18, the warmup was too short (12.3 % error at "
  "epoch 8 of a pilot, against 10.9 % with a warmup of 1.67 of 20 epochs). So a1 is not "
  "independent of that choice, and neither are a2, a3, a5, d1 and f1 as far as they rest on the "
  "group of gradual warmup."
)
_COMMANDS = """```
python -m tools.study table1 figure1 correction  # The runs of (a), (d) and (f).
python -m tools.study known_number               # The run of (e).
python -m tools.replication                      # This report.
```"""
_READING = (
  'Brackets hold the 90 % interval of a difference. In the column "test", 512 is gradual warmup at '
  "kn = 512. The paper's figures are for ResNet-50 on ImageNet, so only the signs of differences "
  "are comparable, not their sizes. No verdict is corrected for the number of claims."
)
_PAPER_BREAK = (
  "The paper's break lies in (8k, 16k], that is (32, 64] times its baseline's 256, and its error "
  "grows by points with each doubling."
)
_SECTIONS = (
  ("(a) Table 1 and Figure 2: warmup", claims.TABLE_1, ("table1",)),
  ("(d) Figures 1 and 3: error by minibatch", tuple(SWEEP), ("figure1", "figure3")),
  ("(f) Remark 2: the momentum correction", claims.CORRECTION, ("correction",)),
)
_VARIED = ("workers", "warmup", "momentum_correction")  # And the seed.


def to_markdown(groups: dict[str, Group], decided: list[Claim], pictures: dict[str, str]) -> str:
  """Returns the report; `pictures` maps a picture's name to its path, relative to the report."""
  results = [result for group in groups.values() for result in group.results]
  warmup, sweep, correction = (_describe_groups(groups, pictures, *each) for each in _SECTIONS)
  known = decided[-1]
  rules = claims.__doc__[claims.__doc__.index("The error of a run") :].strip()
  blocks = [
    "# What we reproduce of the paper, at a scale we can afford",
    _describe_scale(groups),
    _PILOTS,
    _COMMANDS,
    describe_cost(results),
    "## The claims",
    _tabulate_claims(decided),
    _READING,
    post_hoc.to_markdown(groups),
    *warmup,
    *sweep,
    f"**The break.** {_describe_break(groups)} {_PAPER_BREAK}",
    *correction,
    "## (e) A known number",
    f"{known.claim}: theirs {format_points(KNOWN_ERROR)} % (Table 6, arXiv 1512.03385), ours "
    f"{known.ours or 'not there yet'}: {bold(known.verdict)}.",
    *_show(pictures, "(e) A known number", ("known_number",)),
    "## The rules, fixed before the runs",
    f"```text\n{rules}\n```",
    "## Runs",
    _tabulate_runs(results),
  ]
  return "\n\n".join(block for block in blocks if block) + "\n"


def tabulate(head: list[str], rows: list[list]) -> str:
  """Returns a table in Markdown."""
  cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
  lines = [f"| {' | '.join(row)} |" for row in cells]
  return "\n".join([lines[0], f"|{' --- |' * len(head)}", *lines[1:]])


def _show(pictures: dict[str, str], title: str, names: tuple[str, ...]) -> list[str]:
  return [f"![{title}]({pictures[name]})" for name in names if name in pictures]


def bold(verdict: str) -> str:
  """Returns a verdict in bold type; of one that names missing runs, the first word."""
  return verdict.replace(PENDING, f"**{PENDING}**") if PENDING in verdict else f"**{verdict}**"


def _tabulate_claims(decided: list[Claim]) -> str:
  head = ["claim", "paper, %", "ours", "difference, points", "test", "verdict"]
  rows = [
    [f"**{c.key}** {c.claim}", c.paper, c.ours, c.difference, c.test, bold(c.verdict)]
    for c in decided
  ]
  return tabulate(head, rows)


def _tabulate_runs(results: list[Result]) -> str:
  rows = []
  for result in results:
    name = f"{result.study}/{os.path.basename(result.run.path)}"
    error, seconds = f"{format_points(result.error)} %", f"{result.seconds:.0f}"
    if result.diverged:
      error, seconds = f"{error} (diverged: {result.divergence})", ""
    sha = f"`{result.weights_sha256}`" if result.weights_sha256 else ""
    rows.append([name, error, seconds, sha])
  return tabulate(["run", "error", "seconds", "SHA-256 of the weights"], rows)


def _describe_groups(
  groups: dict[str, Group], pictures: dict[str, str], title: str, stems: tuple[str, ...], names
) -> list[str]:
  """Returns a section: heading, table of the groups and pictures."""
  head = ["flagfile", "kn", "times the baseline's", "peak rate", "warmup", "momentum correction"]
  head += ["seeds", "error of each, %", "mean ± std", "training error, last epoch"]
  rows = [_group_row(groups[stem], groups) for stem in stems if stem in groups]
  table = tabulate(head, rows) if rows else "No run yet."
  return [f"## {title}", table, *_show(pictures, title, names)]


def _group_row(group: Group, groups: dict[str, Group]) -> list:
  recipe = group.recipe
  training = [each.run.training for each in group.results if each.run.complete]
  last = [curve[max(curve)] for curve in training if curve]
  each = ", ".join(
    format_points(result.error) + " (diverged)" * result.diverged for result in group.results
  )
  return [
    f"`{group.stem}`",
    group.kn,
    f"{claims.ratio_to_baseline(group, groups):g}" if BASELINE in groups else "",
    f"{recipe.peak_learning_rate:g}",
    f"{recipe.warmup}, {recipe.warmup_epochs:g} epochs" if recipe.warms_up else "none",
    "on" if recipe.momentum_correction else "off",
    len(group.results),
    each,
    format_mean(group.errors),
    format_mean(last) if last else "",
  ]


def _describe_scale(groups: dict[str, Group]) -> str:
  """Describes what was trained here, and what in the paper."""
  if BASELINE not in groups:
    return "The baseline has no run yet."
  group = groups[BASELINE]
  recipe, examples = group.recipe, group.results[0].train_examples
  large = dataclasses.replace(recipe, workers=32 * recipe.workers, warmup="none")
  fields = recipe.to_dict()
  differ = sorted(
    f"{name} ({stem})"
    for stem in set(claims.SCALE_MODEL) & groups.keys()
    for name, value in groups[stem].recipe.to_dict().items()
    if name not in (*_VARIED, "seed") and value != fields[name]
  )
  size = recipe.image_size
  return (
    f"We train a scale model: {recipe.network} on {recipe.dataset} ({examples} training images"
    f"{f' of {size}×{size}' if size else ''}) with n = {recipe.per_worker_batch_size} images per "
    f"worker for {recipe.epochs} epochs. The paper trains ResNet-50 on ImageNet with n = 32 for 90 "
    f"epochs. The baseline has kn = {group.kn} and η = {recipe.peak_learning_rate:g} (the paper's: "
    f"256 and 0.1). At 32 times that, kn = {large.global_batch_size}, the peak rate is "
    f"{large.peak_learning_rate:g} (the paper's: 8192 and 3.2). The recipes differ only in "
    f"{', '.join(_VARIED)} and seed{''.join(f', and in {each}' for each in differ)}."
  )


def describe_cost(results: list[Result]) -> str:
  """Returns how long the runs trained, where and with what."""
  seconds = sum(result.seconds for result in results)
  hardware = "; ".join(sorted({result.hardware for result in results}))
  versions = "; ".join(sorted({result.versions for result in results}))
  return (
    f"{len(results)} runs trained for {seconds:.0f} s ({seconds / 3600:.1f} h) in all, without "
    f"evaluation and start-up. Hardware of a run: {hardware}. Versions: {versions}."
  )


def _describe_break(groups: dict[str, Group]) -> str:
  missing = claims.pending(groups, tuple(SWEEP), 3)
  if missing:
    return f"Our break is {missing}."
  largest, smallest = claims.find_break([groups[stem] for stem in SWEEP])
  low = f"{claims.ratio_to_baseline(largest, groups):g}"
  equals = f"All minibatches up to kn {largest.kn} ({low} times the baseline's) are equal to it"
  if largest.stem == BASELINE:
    equals = "Not even the next larger minibatch can be called equal to the baseline"
  if smallest is None:
    return f"{equals}, and none is worse by more than δ: we saw no break."
  high = f"{claims.ratio_to_baseline(smallest, groups):g}"
  return (
    f"{equals}, and the smallest that is worse by more than δ is kn {smallest.kn} ({high} times): "
    f"our break lies in ({largest.kn}, {smallest.kn}], that is ({low}, {high}] times the "
    "baseline's minibatch."
  )
