"""The claims about the paper, and the rules that decide them.

The rules were fixed after the pilot runs and before the runs of the studies:

The error of a run is the median validation error of its last 5 epochs (the paper's §5), a result
the mean ± sample standard deviation over seeds. A run that diverged counts as chance, 90 % (10
classes). Differences are tested by Welch's t-test (unequal variances, degrees of freedom by
Satterthwaite) at alpha = 0.05. The margin delta is 0.5 points of error, a little under half of the
paper's smallest failure in Table 1 (no warmup ends 1.10 points above gradual warmup). "The
interval" is the 90 % Welch interval of the difference of two means, the first minus the second.

equal(A, B): two one-sided tests. Reproduced if the interval lies within ±delta, not reproduced if
  it lies wholly outside, otherwise not decidable at this scale.
worse(A, B): a one-sided test that A's error is higher. Reproduced if p < alpha. Otherwise not
  reproduced if the opposite test has p < alpha or the interval lies within ±delta (no effect of
  practical size). Otherwise not decidable at this scale.
worse by more than delta: the lower end of the interval, a one-sided 95 % bound, is above delta.
If neither group has any scatter, no test is possible: not decidable. Pending: runs are missing.

a1-a4 (Table 1; 5 seeds each): the pairs in the table of claims. Gradual, constant and no warmup are
  at 32 times the baseline's minibatch.
a5 (Figure 2; 5 seeds each): reproduced if, from some epoch in the first half of the run on, the
  mean training error of gradual warmup stays within 1 point of the baseline's, or within two
  standard errors of the difference if they are larger. Otherwise, or if a run of the two groups
  diverged, not reproduced.
d1 (Figures 1 and 3; 3 seeds each, as for d2 and d3): equal(kn, baseline) for every minibatch kn
  from 2 to 32 times the baseline's. Reproduced if all are reproduced, not reproduced if one
  is not reproduced, otherwise not decidable.
d2: reproduced if some minibatch above 32 times the baseline's is worse by more than delta. Not
  reproduced if all from 2 to 256 times are equal. Otherwise not decidable. The break lies above the
  largest kn such that it and all smaller ones are equal, and at or below the smallest kn that is
  worse by more than delta.
d3: from the break on, mean errors grow with each doubling. Not decidable with fewer than two
  minibatches from the break on. Not reproduced if the means do not grow. If they do, the verdict of
  worse(the largest kn, the smallest kn beyond the break).
f1, f2 (remark 2; 3 seeds each): worse(without the momentum correction, with it) at 32 times the
  baseline's minibatch, for gradual and for constant warmup.
e (a known number: He et al. 2016, arXiv 1512.03385, Table 6, 8.75 %): reproduced if the error of
  one run after its last epoch is within delta of theirs, otherwise not reproduced. No statistics.
"""

import dataclasses
import itertools
import math
import statistics

from tf_largebatch.errors import UserError
from tools.studies import comparison
from tools.studies.curves import format_points
from tools.studies.results import Group
from tools.studies.verdicts import (
  DELTA,
  NOT_DECIDABLE,
  NOT_REPRODUCED,
  PENDING,
  REPRODUCED,
  Welch,
  equal,
  format_signed_points,
  format_test,
  welch,
  worse,
  worse_by_delta,
)

_TOLERANCE = 0.01  # Of a5.
_STEM = "fashion_mnist_kn"
# The groups, by the stem of their flagfile. SWEEP maps each to kn over the baseline's kn.
SWEEP = {f"{_STEM}{16 * ratio}": ratio for ratio in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
BASELINE, *OTHERS = SWEEP
GRADUAL, NONE, CONSTANT = f"{_STEM}512", f"{_STEM}512_none", f"{_STEM}512_constant"
UNCORRECTED = (f"{_STEM}512_uncorrected", f"{_STEM}512_constant_uncorrected")
TABLE_1 = (BASELINE, GRADUAL, NONE, CONSTANT)
CORRECTION = (GRADUAL, UNCORRECTED[0], CONSTANT, UNCORRECTED[1])
SCALE_MODEL = tuple(dict.fromkeys((*SWEEP, *TABLE_1, *CORRECTION)))
KNOWN, KNOWN_ERROR = "cifar10_resnet20_he", 0.0875  # He et al. 2016, Table 6.
# The paper's Table 1, %.
_PAPER_TABLE_1 = {
  **{BASELINE: "23.60 ± 0.12", GRADUAL: "23.74 ± 0.09"},
  **{NONE: "24.84 ± 0.37", CONSTANT: "25.88 ± 0.56"},
}
# What the verdict of equal(kn, baseline) means for a minibatch.
AGAINST_BASELINE = {
  REPRODUCED: "equal to the baseline",
  NOT_REPRODUCED: "outside ±δ",
  NOT_DECIDABLE: "not decidable",
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """A claim about two groups; `kind` is "equal" or "worse"."""

  key: str
  claim: str
  kind: str
  first: str
  second: str
  seeds: int


PAIRS = (
  Pair("a1", "gradual warmup ends where the baseline does", "equal", GRADUAL, BASELINE, 5),
  Pair("a2", "no warmup is worse than gradual", "worse", NONE, GRADUAL, 5),
  Pair("a3", "constant warmup is worse than gradual", "worse", CONSTANT, GRADUAL, 5),
  Pair("a4", "constant warmup is worse than none", "worse", CONSTANT, NONE, 5),
  Pair("f1", "gradual warmup needs the correction", "worse", UNCORRECTED[0], GRADUAL, 3),
  Pair("f2", "constant warmup needs the correction", "worse", UNCORRECTED[1], CONSTANT, 3),
)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A row of the table of claims."""

  key: str
  claim: str
  paper: str
  ours: str
  difference: str
  test: str
  verdict: str


def arrange(groups: dict[str, Group]) -> dict[str, Group]:
  """Returns the groups in the order of the report.

  Raises:
    UserError: kn is not the multiple of the baseline's that the name of a flagfile says.
  """
  if BASELINE in groups:
    for stem, ratio in SWEEP.items():
      if stem in groups and groups[stem].kn != ratio * groups[BASELINE].kn:
        path = groups[stem].results[0].run.path
        raise UserError(
          f"{path}: kn is {groups[stem].kn}, not {ratio} times the baseline's; remove it."
        )
  return {stem: groups[stem] for stem in (*SCALE_MODEL, *groups) if stem in groups}


def ratio_to_baseline(group: Group, groups: dict[str, Group]) -> float:
  return group.kn / groups[BASELINE].kn


def decide(groups: dict[str, Group]) -> list[Claim]:
  """Decides all claims, in the order of the report."""
  pairs = [_decide_pair(groups, pair) for pair in PAIRS]
  return [*pairs[:4], _decide_a5(groups), *_decide_sweep(groups), *pairs[4:], _decide_e(groups)]


def pending(groups: dict[str, Group], stems: tuple[str, ...], seeds: int) -> str | None:
  """Returns the verdict that names the missing runs, or None if none is missing."""
  counts = {stem: len(groups[stem].results) if stem in groups else 0 for stem in stems}
  missing = [f"{count} of {seeds} of {stem}" for stem, count in counts.items() if count < seeds]
  return f"{PENDING} (runs: {', '.join(missing)})" if missing else None


def against_first(groups: list[Group]) -> list[tuple[Group, Welch | None]]:
  """Returns each of the other groups with its test against the first."""
  return [(group, welch(group.errors, groups[0].errors)) for group in groups[1:]]


def find_break(groups: list[Group]) -> tuple[Group, Group | None]:
  """Finds the ends of the interval that the break lies in.

  Args:
    groups: by kn, the baseline first.

  Returns:
    The last group such that it and all smaller ones are equal to the baseline, and the first that
    is worse by more than delta, or None.
  """
  tests = against_first(groups)
  equals = itertools.takewhile(lambda pair: equal(pair[1]) == REPRODUCED, tests)
  largest_equal = [groups[0], *(group for group, _ in equals)][-1]
  return largest_equal, next((group for group, test in tests if worse_by_delta(test)), None)


def _list_results(groups: dict[str, Group], stems: list[str]) -> str:
  present = (groups[stem] for stem in stems if stem in groups)
  return "<br>".join(f"{group.label}: {group.summary}" for group in present)


def _decide_pair(groups: dict[str, Group], pair: Pair) -> Claim:
  stems = (pair.first, pair.second)
  paper = "no figure"
  if pair.first in _PAPER_TABLE_1:
    paper = " vs ".join(_PAPER_TABLE_1[stem] for stem in stems)
  difference, verdict = "", pending(groups, stems, pair.seeds)
  if not verdict:
    test = welch(*(groups[stem].errors for stem in stems))
    difference = format_test(test, pair.kind)
    verdict = (equal if pair.kind == "equal" else worse)(test)
  test_name = f"{pair.kind}({', '.join(stem.removeprefix(_STEM) for stem in stems)})"
  ours = _list_results(groups, stems)
  return Claim(pair.key, pair.claim, paper, ours, difference, test_name, verdict)


def _decide_a5(groups: dict[str, Group]) -> Claim:
  """Decides whether the training curves match."""
  verdict, ours = pending(groups, (GRADUAL, BASELINE), 5), ""
  if not verdict:
    gradual, baseline = groups[GRADUAL], groups[BASELINE]
    found = comparison.compare(gradual.curves, baseline.curves, "training", _TOLERANCE)
    ours = "no epoch in common"
    if found.differences:
      above = sum(each.difference > 0 for each in found.tail)
      last = f"the last {len(found.tail)} epochs"
      ours = f"the training error {found.describe()}; above the baseline's at {above} of {last}"
    diverged = any(result.diverged for group in (gradual, baseline) for result in group.results)
    ours += "; a run diverged" if diverged else ""
    since = math.inf if found.matches_from_epoch is None else found.matches_from_epoch
    good = not diverged and since <= gradual.recipe.epochs / 2
    verdict = REPRODUCED if good else NOT_REPRODUCED
  claim = "Figure 2: the training curves of gradual and the baseline match after the warmup"
  return Claim("a5", claim, "match (no figure)", ours, "", "compare_runs, 1 point", verdict)


def _decide_sweep(groups: dict[str, Group]) -> list[Claim]:
  """Decides d1, d2 and d3."""
  present = [groups[stem] for stem in SWEEP if stem in groups]
  tests = {}
  if BASELINE in groups and len(groups[BASELINE].results) > 1:
    several = [group for group in present[1:] if len(group.results) > 1]
    tests = {group.stem: test for group, test in against_first([groups[BASELINE], *several])}
  missing = pending(groups, tuple(SWEEP), 3)
  beyond_break = []
  if not missing:
    _, smallest = find_break(present)
    beyond_break = present[present.index(smallest) :] if smallest else []
  return [
    _decide_d1(groups, tests),
    _decide_d2(groups, tests, missing),
    _decide_d3(beyond_break, missing),
  ]


def _list_tests(
  groups: dict[str, Group], tests: dict[str, Welch | None], stems: list[str], kind: str
) -> str:
  lines = []
  for stem in (stem for stem in stems if stem in tests):
    verdict = AGAINST_BASELINE[equal(tests[stem])]
    verdict = "worse by more than δ" if worse_by_delta(tests[stem]) else verdict
    lines.append(f"kn {groups[stem].kn}: {format_test(tests[stem], kind)}: {verdict}")
  return "<br>".join(lines)


def _decide_d1(groups: dict[str, Group], tests: dict[str, Welch | None]) -> Claim:
  """Decides whether the error is flat."""
  stems = [stem for stem in OTHERS if SWEEP[stem] <= 32]
  verdict = pending(groups, (BASELINE, *stems), 3)
  if not verdict:
    each = {equal(tests[stem]) for stem in stems}
    first = (NOT_REPRODUCED, NOT_DECIDABLE, REPRODUCED)
    verdict = next(possible for possible in first if possible in each)
  paper = "23.48 to 23.74 vs 23.60 ± 0.12"
  claim = "the error is flat from 2 to 32 times the baseline's minibatch"
  ours, differences = _list_results(groups, stems), _list_tests(groups, tests, stems, "equal")
  return Claim("d1", claim, paper, ours, differences, "equal(each kn, 16)", verdict)


def _decide_d2(
  groups: dict[str, Group], tests: dict[str, Welch | None], missing: str | None
) -> Claim:
  """Decides whether there is a break."""
  stems, verdict = [stem for stem in OTHERS if SWEEP[stem] > 32], missing
  if not verdict and any(worse_by_delta(tests[stem]) for stem in stems):
    verdict = REPRODUCED
  elif not verdict:
    all_equal = all(equal(tests[stem]) == REPRODUCED for stem in OTHERS)
    verdict = NOT_REPRODUCED if all_equal else NOT_DECIDABLE
  paper = "64 times: 24.79 ± 0.27 vs 23.60 ± 0.12"
  claim = "some minibatch above 32 times the baseline's is worse"
  ours, differences = _list_results(groups, stems), _list_tests(groups, tests, stems, "beyond")
  return Claim("d2", claim, paper, ours, differences, "worse by more than δ", verdict)


def _decide_d3(beyond_break: list[Group], missing: str | None) -> Claim:
  """Decides whether the error grows beyond the break."""
  verdict, ours, difference = missing or NOT_DECIDABLE, "", ""
  if not missing:
    ours = f"{len(beyond_break)} minibatches from the break on"
  if len(beyond_break) > 1:
    means = [statistics.fmean(group.errors) for group in beyond_break]
    ours = ", ".join(map(format_points, means))
    test = welch(beyond_break[-1].errors, beyond_break[0].errors)
    difference = format_test(test, "worse")
    grows = test is None or all(a < b for a, b in itertools.pairwise(means))
    verdict = worse(test) if grows else NOT_REPRODUCED
  claim = "beyond the break the error grows with each doubling"
  test_name = "means grow, and worse(the largest, the first beyond)"
  return Claim("d3", claim, "24.79, 27.55, 33.96", ours, difference, test_name, verdict)


def _decide_e(groups: dict[str, Group]) -> Claim:
  """Decides whether the known number is reached."""
  verdict, ours, difference = pending(groups, (KNOWN,), 1), "", ""
  if not verdict:
    result = groups[KNOWN].results[0]
    diverged = ", diverged" if result.diverged else ""
    ours = f"{format_points(result.last_error)} % (seed {result.seed}{diverged})"
    gap = result.last_error - KNOWN_ERROR
    difference = format_signed_points(gap)
    within = abs(gap) <= DELTA + comparison.ROUNDING
    verdict = REPRODUCED if within else NOT_REPRODUCED
  paper = f"{format_points(KNOWN_ERROR)} (He et al. 2016)"
  claim = "ResNet-20 on CIFAR-10 reaches He et al.'s error by their schedule"
  return Claim("e", claim, paper, ours, difference, "within δ, no statistics", verdict)
