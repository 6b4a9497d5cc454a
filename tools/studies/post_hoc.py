"""Analyses that were chosen when the results were known, so that no verdict rests on them."""

import itertools

from scipy.stats import mannwhitneyu

from tools.studies.claims import PAIRS, SWEEP, Pair, against_first, pending, ratio_to_baseline
from tools.studies.results import Group
from tools.studies.verdicts import DELTA, format_test, holm, welch

_CHOSEN_BY_PILOTS = ("a1", "a2", "a3")  # The recipes of these groups were chosen with seed 0.


def to_markdown(groups: dict[str, Group]) -> str | None:
  """Returns the analyses as a list; None if too many runs are missing for any of them."""
  pairs = [p for p in PAIRS if not pending(groups, (p.first, p.second), p.seeds)]
  lines = [*_correct(groups, pairs), *_without_pilots(groups, pairs), *_describe_sweep(groups)]
  if not lines:
    return None
  text = "**Post-hoc analyses**, chosen when the results were known; no verdict rests on them:"
  return "\n".join([text, "", *(f"- {line}" for line in lines)])


def _correct(groups: dict[str, Group], pairs: list[Pair]) -> list[str]:
  errors = {p.key: (groups[p.first].errors, groups[p.second].errors) for p in pairs}
  errors = {p.key: errors[p.key] for p in pairs if p.kind == "worse"}
  if not errors:
    return []
  tests = {key: welch(*both) for key, both in errors.items()}
  ranks = {k: float(mannwhitneyu(*v, alternative="greater").pvalue) for k, v in errors.items()}
  by_welch = holm({key: test.p_above() for key, test in tests.items() if test})
  by_ranks = holm(ranks)
  each = (
    f"{key} {by_welch.get(key, 1):.3f} and {by_ranks[key]:.3f} ({ranks[key]:.3f})" for key in ranks
  )
  return [
    "p of each claim that something is worse, corrected for the number of these claims (Holm), by "
    "Welch's test and by the Mann-Whitney rank test, on which a few outlying seeds have less "
    f"influence (in parentheses: the rank test's p, uncorrected): {', '.join(each)}."
  ]


def _without_pilots(groups: dict[str, Group], pairs: list[Pair]) -> list[str]:
  lines = []
  for pair in (pair for pair in pairs if pair.key in _CHOSEN_BY_PILOTS):
    later = [[r.error for r in groups[s].results if r.seed] for s in (pair.first, pair.second)]
    if min(map(len, later)) > 1:
      test = format_test(welch(*later), pair.kind)
      lines.append(f"Without seed 0, which the pilot runs used, {pair.key}: {test}.")
  return lines


def _describe_sweep(groups: dict[str, Group]) -> list[str]:
  if pending(groups, tuple(SWEEP), 3):
    return []
  lines = []
  sweep = against_first([groups[stem] for stem in SWEEP])
  fine = list(itertools.takewhile(lambda pair: pair[1] and pair[1].interval[1] < DELTA, sweep))
  if fine:
    largest = fine[-1][0]
    ratio = f"{ratio_to_baseline(largest, groups):g}"
    lines.append(
      f"No minibatch up to kn {largest.kn} ({ratio} times the baseline's) is worse than the "
      "baseline by δ: the upper ends of the intervals are below δ."
    )
  lower = [f"kn {group.kn}" for group, test in sweep if test and test.interval[1] < 0]
  if lower:
    lines.append(f"The whole interval of the difference is below 0 for {', '.join(lower)}.")
  return lines
