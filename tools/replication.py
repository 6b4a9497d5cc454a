r"""What our runs reproduce of Goyal et al. 2017: a report from their committed results alone.

  python -m tools.replication

It reads RESULTS_DIR/STUDY/FLAGFILE_seedN.json, as `tools.study` leaves them, and writes
docs/replication.md and the pictures in docs/replication/. The same files give the same bytes.
Runs of one flagfile, from whatever study, are one group, and all that are there count: the numbers
of seeds are the least. What follows was fixed before the studies' runs, after the pilots':

An error of a run is the median of its last 5 epochs' validation errors (the paper's §5), a result
the mean ± sample standard deviation over seeds. A run that diverged counts as chance, 90 % (10
classes). Differences are tested by Welch's t-test (variances need not be equal, degrees of freedom
by Satterthwaite) at alpha = 0.05. The margin delta is 0.5 points of error, a little under half of
the paper's smallest failure in Table 1 (no warmup ends 1.10 points above gradual warmup). "The
interval" is the 90 % Welch interval of the difference of two means, the first less the second.

equal(A, B): two one-sided tests. The interval lies within ±delta: reproduced. It lies wholly
  outside: not reproduced. Else: not decidable at this scale.
worse(A, B): a one-sided test that A's error is higher. p < alpha: reproduced. Else, if the opposite
  test has p < alpha or the interval lies within ±delta (no effect worth the name): not reproduced.
  Else: not decidable at this scale.
worse by more than delta: the lower end of the interval, a one-sided 95 % bound, is above delta.
No test is possible where neither group has any scatter: not decidable. pending: runs are missing.

a1-a4 (Table 1; 5 seeds each): as the table of claims says, gradual, constant and none at 32 times
  the baseline's minibatch.
a5 (Figure 2; 5 seeds each): the mean training error of gradual comes within 1 point of the
  baseline's, or within two standard errors of the difference if they are larger, and stays there
  from some epoch in the first half of the run on: reproduced. Else, or if a run of the two groups
  diverged: not reproduced.
d1 (Figures 1 and 3; 3 seeds each, as d2 and d3): equal(kn, baseline) for every minibatch kn from 2
  to 32 times the baseline's: reproduced if all are; not reproduced if one is; else not decidable.
d2: some minibatch above 32 times the baseline's is worse by more than delta: reproduced. All of 2
  to 256 times are equal: not reproduced. Else: not decidable. The break lies above the largest kn
  such that it and all smaller ones are equal, and at or below the smallest that is worse by more
  than delta.
d3: from the break on, mean errors grow with each doubling: if not, not reproduced; if so, as
  worse(the largest kn, the smallest beyond the break). Not decidable with fewer than two beyond.
f1, f2 (remark 2; 3 seeds each): without and with the momentum correction at 32 times the baseline's
  minibatch, for gradual and constant warmup.
e (a known number: He et al. 2016, arXiv 1512.03385, Table 6, 8.75 %): one run's error after
  the last epoch is within delta of theirs: reproduced. Else: not reproduced. No statistics.
"""

import dataclasses
import glob
import io
import itertools
import json
import math
import os
import statistics
import sys

from absl import app, flags
from scipy.stats import mannwhitneyu
from scipy.stats import t as student_t

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import compare_runs

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_DECIDABLE, PENDING = "not decidable at this scale", "pending"

_ALPHA = 0.05
_DELTA = 0.005
_CHANCE = 0.9
_TOLERANCE = 0.01  # a5's.
_STEM = "fashion_mnist_kn"
# Stem → how many times the baseline's its minibatch is.
_SWEEP = {f"{_STEM}{16 * ratio}": ratio for ratio in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
_BASELINE, *_OTHERS = _SWEEP
_GRADUAL, _NONE, _CONSTANT = f"{_STEM}512", f"{_STEM}512_none", f"{_STEM}512_constant"
_UNCORRECTED = (f"{_STEM}512_uncorrected", f"{_STEM}512_constant_uncorrected")
_TABLE_1 = (_BASELINE, _GRADUAL, _NONE, _CONSTANT)
_CORRECTION = (_GRADUAL, _UNCORRECTED[0], _CONSTANT, _UNCORRECTED[1])
_FASHION = tuple(dict.fromkeys((*_SWEEP, *_TABLE_1, *_CORRECTION)))
_KNOWN, _KNOWN_ERROR = "cifar10_resnet20_he", 0.0875  # He et al. 2016, Table 6.
# The paper's Table 1, %.
_PAPER_TABLE_1 = {
  **{_BASELINE: "23.60 ± 0.12", _GRADUAL: "23.74 ± 0.09"},
  **{_NONE: "24.84 ± 0.37", _CONSTANT: "25.88 ± 0.56"},
}
# Claims about two groups: key, claim, kind of test, first, second, seeds.
_PAIRS = (
  ("a1", "gradual warmup ends where the baseline does", "equal", _GRADUAL, _BASELINE, 5),
  ("a2", "no warmup is worse than gradual", "worse", _NONE, _GRADUAL, 5),
  ("a3", "constant warmup is worse than gradual", "worse", _CONSTANT, _GRADUAL, 5),
  ("a4", "constant warmup is worse than none", "worse", _CONSTANT, _NONE, 5),
  ("f1", "gradual warmup needs the correction", "worse", _UNCORRECTED[0], _GRADUAL, 3),
  ("f2", "constant warmup needs the correction", "worse", _UNCORRECTED[1], _CONSTANT, 3),
)
# The paper's Figures 1 and 3: kn → top-1 validation error, mean and standard deviation, %.
_PAPER = {
  **{128: (23.49, 0.12), 256: (23.60, 0.12), 512: (23.48, 0.09), 1024: (23.53, 0.08)},
  **{2048: (23.49, 0.11), 4096: (23.56, 0.12), 8192: (23.74, 0.09), 16384: (24.79, 0.27)},
  **{32768: (27.55, 0.28), 65536: (33.96, 0.80)},
}
_PAPER_BASELINE = 256
# Okabe and Ito's, as in compare_runs: by group in the curves, by verdict in Figure 1.
_BLACK, _BLUE, _ORANGE, _GREEN, _PINK = compare_runs._COLOURS[:5]
_points, _mean = compare_runs._points, compare_runs._mean_error
_VERDICT_COLOURS = {REPRODUCED: _BLUE, NOT_REPRODUCED: _ORANGE, NOT_DECIDABLE: "0.5"}
# What the verdicts of equal(kn, baseline) mean for a minibatch.
_AGAINST_BASELINE = {
  REPRODUCED: "equal to the baseline",
  NOT_REPRODUCED: "outside of ±δ",
  NOT_DECIDABLE: "not decidable",
}


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_string("results_dir", "docs/results", "Directory of the studies' results.")
  flags.DEFINE_string(
    "output", "docs/replication.md", "The report; pictures go in a folder beside."
  )


@dataclasses.dataclass(frozen=True)
class Result:
  """A run's file: its curves, and the errors that count (fractions; chance where it diverged)."""

  run: compare_runs.Run
  stem: str
  error: float
  last_error: float
  facts: dict

  @property
  def diverged(self) -> bool:
    return not self.run.complete


@dataclasses.dataclass(frozen=True)
class Group:
  """The runs of one flagfile, by seed."""

  stem: str
  results: tuple[Result, ...]

  @property
  def recipe(self) -> Recipe:
    """With the first run's seed."""
    return self.results[0].run.recipe

  @property
  def kn(self) -> int:
    return self.recipe.global_batch_size

  @property
  def errors(self) -> list[float]:
    return [result.error for result in self.results]

  @property
  def curves(self) -> compare_runs.Group:
    return compare_runs.Group(self.stem, tuple(result.run for result in self.results))

  @property
  def label(self) -> str:
    """kn, and the ablation if it is one."""
    warmup = {"gradual": "", "constant": " constant warmup", "none": " no warmup"}
    corrected = "" if self.recipe.momentum_correction else " uncorrected"
    size = f"kn {self.kn}"
    if self.kn <= self.recipe.reference_batch_size:  # Nothing to warm up.
      return size + corrected
    return size + warmup[self.recipe.warmup] + corrected

  @property
  def told(self) -> str:
    """Mean ± standard deviation, how many seeds, and how many diverged."""
    diverged = sum(result.diverged for result in self.results)
    note = f", {diverged} diverged, counted as {100 * _CHANCE:g} %" if diverged else ""
    return f"{_mean(self.errors)} ({len(self.results)} seeds{note})".replace("(1 seeds", "(1 seed")


@dataclasses.dataclass(frozen=True)
class Welch:
  """Welch 1947's test of two means: their difference, its standard error, degrees of freedom."""

  difference: float
  standard_error: float
  degrees: float

  def p_above(self, margin: float = 0.0) -> float:
    """One-sided p of the alternative that the difference is above the margin."""
    return float(student_t.sf((self.difference - margin) / self.standard_error, self.degrees))

  def p_below(self, margin: float = 0.0) -> float:
    """The opposite."""
    return 1 - self.p_above(margin)

  @property
  def interval(self) -> tuple[float, float]:
    """The 90 % interval, whose ends are one-sided 95 % bounds."""
    half = float(student_t.isf(_ALPHA, self.degrees)) * self.standard_error
    return self.difference - half, self.difference + half


def welch(first: list[float], second: list[float]) -> Welch | None:
  """Standard error √(a + b), a = s₁²/n₁, b = s₂²/n₂; ν = (a + b)² / (a²/(n₁-1) + b²/(n₂-1)).

  None where neither has any scatter, so that no test is possible.
  """
  a, b = (statistics.variance(each) / len(each) for each in (first, second))
  if a + b == 0:
    return None
  degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
  return Welch(statistics.fmean(first) - statistics.fmean(second), math.sqrt(a + b), degrees)


def equal(test: Welch | None) -> str:
  """The verdict of equal(A, B); see the module's docstring."""
  if test is None:
    return NOT_DECIDABLE
  low, high = test.interval
  if low > -_DELTA and high < _DELTA:
    return REPRODUCED
  return NOT_REPRODUCED if low > _DELTA or high < -_DELTA else NOT_DECIDABLE


def worse(test: Welch | None) -> str:
  """The verdict of worse(A, B); see the module's docstring."""
  if test is None:
    return NOT_DECIDABLE
  if test.p_above() < _ALPHA:
    return REPRODUCED
  no_effect = test.p_below() < _ALPHA or equal(test) == REPRODUCED
  return NOT_REPRODUCED if no_effect else NOT_DECIDABLE


def worse_by_delta(test: Welch | None) -> bool:
  return test is not None and test.interval[0] > _DELTA


def _against_first(groups: list[Group]) -> list[tuple[Group, Welch | None]]:
  """Each of the others with its test against the first."""
  return [(group, welch(group.errors, groups[0].errors)) for group in groups[1:]]


def find_break(groups: list[Group]) -> tuple[Group, Group | None]:
  """The ends of the interval that the break lies in; groups by kn, the baseline first.

  Returns:
    The last group such that it and all smaller ones are equal to the baseline, and the first that
    is worse by more than delta, or None.
  """
  tests = _against_first(groups)
  equals = itertools.takewhile(lambda pair: equal(pair[1]) == REPRODUCED, tests)
  largest_equal = [groups[0], *(group for group, _ in equals)][-1]
  return largest_equal, next((group for group, test in tests if worse_by_delta(test)), None)


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


def decide(groups: dict[str, Group]) -> list[Claim]:
  """All claims, in the report's order."""
  pairs = [_decide_pair(groups, *pair) for pair in _PAIRS]
  return [*pairs[:4], _decide_curves(groups), *_decide_sweep(groups), *pairs[4:], _known(groups)]


def _pending(groups: dict[str, Group], stems: tuple[str, ...], seeds: int) -> str | None:
  """Which runs are missing, or None."""
  there = {stem: len(groups[stem].results) if stem in groups else 0 for stem in stems}
  short = [f"{count} of {seeds} of {stem}" for stem, count in there.items() if count < seeds]
  return f"{PENDING} (runs: {', '.join(short)})" if short else None


def _decide_pair(groups, key, claim, kind, first, second, seeds) -> Claim:
  ours = [groups[stem] for stem in (first, second) if stem in groups]
  told = "<br>".join(f"{group.label}: {group.told}" for group in ours)
  test_name = f"{kind}({first.removeprefix(_STEM)}, {second.removeprefix(_STEM)})"
  known = first in _PAPER_TABLE_1
  paper = f"{_PAPER_TABLE_1[first]} v {_PAPER_TABLE_1[second]}" if known else "no figure"
  difference, verdict = "", _pending(groups, (first, second), seeds)
  if not verdict:
    test = welch(*(group.errors for group in ours))
    difference = _difference(test, kind)
    verdict = (equal if kind == "equal" else worse)(test)
  return Claim(key, claim, paper, told, difference, test_name, verdict)


def _decide_curves(groups) -> Claim:
  verdict, ours = _pending(groups, (_GRADUAL, _BASELINE), 5), ""
  if not verdict:
    gradual, baseline = groups[_GRADUAL], groups[_BASELINE]
    found = compare_runs.compare(gradual.curves, baseline.curves, "training", _TOLERANCE)
    ours = "no epoch in common"
    if found.differences:
      above = sum(each.difference > 0 for each in found.tail)
      last = f"the last {len(found.tail)} epochs"
      ours = f"the training error {found.tell()}; above the baseline's at {above} of {last}"
    diverged = any(result.diverged for group in (gradual, baseline) for result in group.results)
    ours += "; a run diverged" if diverged else ""
    since = math.inf if found.matches_from_epoch is None else found.matches_from_epoch
    good = not diverged and since <= gradual.recipe.epochs / 2
    verdict = REPRODUCED if good else NOT_REPRODUCED
  claim = "Figure 2: the training curves of gradual and the baseline match after the warmup"
  return Claim("a5", claim, "match (no figure)", ours, "", "compare_runs, 1 point", verdict)


def _decide_sweep(groups) -> list[Claim]:
  """d1, d2 and d3."""
  flat = [stem for stem in _OTHERS if _SWEEP[stem] <= 32]
  beyond = [stem for stem in _OTHERS if _SWEEP[stem] > 32]
  there = [groups[stem] for stem in _SWEEP if stem in groups]
  baseline = groups.get(_BASELINE)
  tests = {}
  if baseline and len(baseline.results) > 1:
    others = [group for group in there[1:] if len(group.results) > 1]
    tests = {group.stem: test for group, test in _against_first([baseline, *others])}

  def listed(stems, kind):
    told = [f"{groups[stem].label}: {groups[stem].told}" for stem in stems if stem in groups]
    lines = []
    for stem in (stem for stem in stems if stem in tests):
      verdict = _AGAINST_BASELINE[equal(tests[stem])]
      verdict = "worse by more than δ" if worse_by_delta(tests[stem]) else verdict
      lines.append(f"kn {groups[stem].kn}: {_difference(tests[stem], kind)}: {verdict}")
    return "<br>".join(told), "<br>".join(lines)

  verdict = _pending(groups, (_BASELINE, *flat), 3)
  if not verdict:
    each = [equal(tests[stem]) for stem in flat]
    if NOT_REPRODUCED in each:
      verdict = NOT_REPRODUCED
    else:
      verdict = NOT_DECIDABLE if NOT_DECIDABLE in each else REPRODUCED
  paper = "23.48 to 23.74 v 23.60 ± 0.12"
  claim = "the error is flat from 2 to 32 times the baseline's minibatch"
  claims = [Claim("d1", claim, paper, *listed(flat, "equal"), "equal(each kn, 16)", verdict)]

  verdict = pending = _pending(groups, tuple(_SWEEP), 3)
  smallest = None
  if not pending:
    _, smallest = find_break(there)
    if any(worse_by_delta(tests[stem]) for stem in beyond):
      verdict = REPRODUCED
    else:
      none = all(equal(tests[stem]) == REPRODUCED for stem in _OTHERS)
      verdict = NOT_REPRODUCED if none else NOT_DECIDABLE
  paper = "64 times: 24.79 ± 0.27 v 23.60 ± 0.12"
  claim = "some minibatch above 32 times the baseline's is worse"
  claims.append(
    Claim("d2", claim, paper, *listed(beyond, "beyond"), "worse by more than δ", verdict)
  )

  verdict, ours, difference = pending, "", ""
  if not pending:
    after = there[there.index(smallest) :] if smallest else []
    ours = ", ".join(f"{_points(statistics.fmean(group.errors))}" for group in after)
    verdict = NOT_DECIDABLE
    if len(after) > 1:
      means = [statistics.fmean(group.errors) for group in after]
      test = welch(after[-1].errors, smallest.errors)
      difference = _difference(test, "worse")
      grows = test is None or all(a < b for a, b in itertools.pairwise(means))
      verdict = worse(test) if grows else NOT_REPRODUCED
    else:
      ours = f"{len(after)} minibatches from the break on"
  claim = "beyond the break the error grows with each doubling"
  test = "means grow, and worse(the largest, the first beyond)"
  claims.append(Claim("d3", claim, "24.79, 27.55, 33.96", ours, difference, test, verdict))
  return claims


def _known(groups) -> Claim:
  verdict, ours, difference = _pending(groups, (_KNOWN,), 1), "", ""
  if not verdict:
    result = groups[_KNOWN].results[0]
    seed = result.run.recipe.seed
    ours = f"{_points(result.last_error)} % (seed {seed}{', diverged' * result.diverged})"
    gap = result.last_error - _KNOWN_ERROR
    difference = _signed(gap)
    verdict = REPRODUCED if abs(gap) <= _DELTA + 1e-9 else NOT_REPRODUCED  # As compare_runs rounds.
  paper = f"{_points(_KNOWN_ERROR)} (He et al. 2016)"
  claim = "ResNet-20 on CIFAR-10 reaches He et al.'s error by their schedule"
  return Claim("e", claim, paper, ours, difference, "within δ, no statistics", verdict)


def _signed(fraction: float) -> str:
  return f"{100 * fraction:+.2f}"


def _difference(test: Welch | None, kind: str) -> str:
  """In points, with its interval and the p of the kind's test."""
  if test is None:
    return "no test is possible: no scatter in either"
  p = {
    # Both one-sided tests must reject, so the larger p decides.
    "equal": max(test.p_above(-_DELTA), test.p_below(_DELTA)),
    "worse": test.p_above(),
    "beyond": test.p_above(_DELTA),
  }[kind]
  low, high = (_signed(end) for end in test.interval)
  return f"{_signed(test.difference)} [{low}, {high}], p {'< 0.001' if p < 1e-3 else f'= {p:.3g}'}"


def read_groups(results_dir: str) -> dict[str, Group]:
  """All results, by stem.

  Raises:
    UserError: there is none, one is damaged, there twice, or does not belong to its group.
  """
  paths = sorted(glob.glob(os.path.join(glob.escape(results_dir), "*", "*.json")))
  if not paths:
    raise UserError(f"{results_dir} holds no STUDY/*.json; give a --results_dir of tools.study.")
  found = {}
  for path in paths:
    result = read_result(path)
    members = found.setdefault(result.stem, {})
    seed = result.run.recipe.seed
    if seed in members:
      raise UserError(f"{members[seed].run.work_dir} and {path} are the same run; take one away.")
    members[seed] = result
    first = next(iter(members.values())).run
    if dataclasses.replace(result.run.recipe, seed=first.recipe.seed) != first.recipe:
      raise UserError(
        f"{first.work_dir} and {path} differ in more than the seed; mend one of them."
      )
  groups = {}
  for stem in (*_FASHION, *sorted(found)):
    if stem in found:
      groups[stem] = Group(stem, tuple(found[stem][seed] for seed in sorted(found[stem])))
  if _BASELINE in groups:
    for stem, ratio in _SWEEP.items():
      if stem in groups and groups[stem].kn != ratio * groups[_BASELINE].kn:
        path = groups[stem].results[0].run.work_dir
        raise UserError(f"{path}: kn is {groups[stem].kn}, not {ratio} times the baseline's.")
  return groups


def read_result(path: str) -> Result:
  """A run's file.

  Raises:
    UserError: it cannot be read, or a field is missing or of a wrong type.
  """
  try:
    with open(path, encoding="utf-8") as file:
      data = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({error}); mend it or take it away.") from error

  def field(name, kinds, low=-math.inf, high=math.inf):
    value = data
    for part in name.split("."):
      value = value.get(part) if isinstance(value, dict) else None
    good = type(value) in kinds and (type(value) not in (int, float) or low <= value <= high)
    if not good:
      raise UserError(f"{path}: {name} is {value!r}, which will not do; mend it or take it away.")
    return value

  def curve(name):
    for epoch in field(name, [dict]):
      if not (epoch.isdecimal() and int(epoch)):
        raise UserError(f"{path}: {name} has an epoch {epoch!r}; mend it or take it away.")
    return {
      int(epoch): field(f"{name}.{epoch}", [int, float], 0, 1)
      for epoch in sorted(data[name], key=int)
    }

  fields = field("recipe", [dict])
  try:
    recipe = Recipe(**fields)
    recipe.global_batch_size  # noqa: B018 - Raises where k is missing.
  except (ValueError, TypeError) as error:
    raise UserError(f"{path}: recipe will not do ({error}); mend it or take it away.") from error
  complete = field("status", [str]) == "complete"
  if not complete and data["status"] != "diverged":
    raise UserError(f"{path}: status is {data['status']!r}; it must be complete or diverged.")
  stem = os.path.splitext(os.path.basename(field("flagfile", [str])))[0]
  if field("seed", [int]) != recipe.seed:
    raise UserError(f"{path}: seed is {data['seed']}, the recipe's {recipe.seed}; mend one.")
  names = ("val_error_median_last_5", "val_error")
  errors = [field(name, [int, float], 0, 1) if complete else _CHANCE for name in names]
  for name in ("python", "tensorflow", "keras"):
    field(f"versions.{name}", [str])
  facts = {
    "study": field("study", [str]),
    "train_examples": field("derived.train_examples", [int], 1),
    "hardware": f"{field('hardware.cpu', [str])} (cores: {field('hardware.cores', [int], 1)})",
    "versions": ", ".join(
      f"{name} {field(f'versions.{name}', [str])}" for name in data["versions"]
    ),
    "seconds": field("seconds", [int, float], 0, 1e12) if complete else 0.0,
    "sha": field("weights_sha256", [str])[:12] if complete else "",
    "reason": "" if complete else field("reason", [str]),
  }
  training, validation = curve("training_error"), curve("validation_error")
  return Result(
    compare_runs.Run(path, recipe, complete, training, validation), stem, *errors, facts
  )


def to_markdown(groups: dict[str, Group], claims: list[Claim], pictures: dict[str, str]) -> str:
  """The report; pictures maps a picture's name to its path from the report, in Markdown."""

  def table(head, rows):
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{' --- |' * len(head)}", *lines[1:]])

  def shown(title, *names):
    return [f"![{title}]({pictures[name]})" for name in names if name in pictures]

  def section(title, stems, *names):
    head = ["runs", "kn", "times the baseline's", "peak rate", "warmup", "momentum correction"]
    head += ["seeds", "error of each, %", "mean ± std", "last training error"]
    rows = []
    for group in (groups[stem] for stem in stems if stem in groups):
      recipe = group.recipe
      last = [each.run.training for each in group.results if each.run.complete]
      last = [curve[max(curve)] for curve in last if curve]
      each = ", ".join(
        _points(result.error) + " (diverged)" * result.diverged for result in group.results
      )
      warmup = f"{recipe.warmup}, {recipe.warmup_epochs:g} epochs" if recipe.warms_up else "none"
      corrected = "on" if recipe.momentum_correction else "off"
      ratio = f"{_ratio(group, groups):g}" if _BASELINE in groups else ""
      row = [f"`{group.stem}`", group.kn, ratio, f"{recipe.peak_learning_rate:g}", warmup]
      row += [corrected, len(group.results), each, _mean(group.errors), _mean(last) if last else ""]
      rows.append(row)
    return [f"## {title}", table(head, rows) if rows else "No run yet.", *shown(title, *names)]

  results = [result for group in groups.values() for result in group.results]
  facts = {
    name: "; ".join(sorted({result.facts[name] for result in results}))
    for name in ("hardware", "versions")
  }
  seconds = sum(result.facts["seconds"] for result in results)
  rows = [
    (f"**{c.key}** {c.claim}", c.paper, c.ours, c.difference, c.test, _bold(c.verdict))
    for c in claims
  ]
  known = claims[-1]
  runs = [
    (
      f"{result.facts['study']}/{os.path.basename(result.run.work_dir)}",
      f"{_points(result.error)} %{' (diverged: ' * result.diverged}{result.facts['reason']}"
      + ")" * result.diverged,
      "" if result.diverged else f"{result.facts['seconds']:.0f}",
      f"`{result.facts['sha']}`" if result.facts["sha"] else "",
    )
    for result in results
  ]
  blocks = [
    "# What of the paper we reproduce, at a scale we can afford",
    _scale(groups),
    "The learning rate, the epochs and the warmup's length were chosen by pilot runs of the "
    "baseline and of gradual warmup at 32 times its minibatch (seed 0), before the studies were "
    "begun. With the paper's own η = 0.1 gradual warmup left the baseline for good, and with its "
    "share of the epochs, one of 18, warmup was too short (12.3 % at epoch 8 of a pilot, where "
    "1.67 of 20 epochs had 10.9 %). So a1 is not independent of that choice, nor are a2, a3, a5, "
    "d1 and f1 as far as they rest on gradual warmup's group.",
    "```\npython -m tools.study table1 figure1 correction  # Makes the runs;\n"
    "python -m tools.study known_number               # that of (e);\n"
    "python -m tools.replication                      # this report of them.\n```",
    f"{len(results)} runs trained for {seconds:.0f} s ({seconds / 3600:.1f} h) in all, evaluation "
    f"and starting apart, each on {facts['hardware']}; {facts['versions']}.",
    "## The claims",
    table(("claim", "the paper, %", "ours", "difference, points", "test", "verdict"), rows),
    "Differences have their 90 % interval in brackets. In the tests, 512 is gradual warmup. The "
    "paper's figures are for ImageNet and ResNet-50: only the signs of differences are comparable, "
    "not their sizes. No verdict is corrected for there being several claims.",
    *_afterwards(groups),
    *section("(a) Table 1 and Figure 2: warmup", _TABLE_1, "table1"),
    *section("(d) Figures 1 and 3: error by minibatch", _SWEEP, "figure1", "figure3"),
    f"**The break.** {_tell_break(groups)} The paper's lies in (8k, 16k], that is (32, 64] times "
    "the baseline's 256, and its error grows by points with each doubling.",
    *section("(f) Remark 2: the momentum correction", _CORRECTION, "correction"),
    "## (e) A known number",
    f"{known.claim}: theirs {_points(_KNOWN_ERROR)} % (Table 6, arXiv 1512.03385), ours "
    f"{known.ours or 'not there yet'}: {_bold(known.verdict)}.",
    *shown("(e) A known number", "known_number"),
    "## The tests, fixed before the runs",
    f"```text\n{__doc__[__doc__.index('An error of a run') :].strip()}\n```",
    "## Runs",
    table(("run", "error", "seconds", "weights' SHA-256"), runs),
  ]
  return "\n\n".join(blocks) + "\n"


def _bold(verdict: str) -> str:
  return verdict.replace(PENDING, f"**{PENDING}**") if PENDING in verdict else f"**{verdict}**"


def _ratio(group: Group, groups: dict[str, Group]) -> float:
  return group.kn / groups[_BASELINE].kn


def _scale(groups: dict[str, Group]) -> str:
  """What was trained here, and what in the paper."""
  if _BASELINE not in groups:
    return "The baseline has no run yet."
  group = groups[_BASELINE]
  recipe, examples = group.recipe, group.results[0].facts["train_examples"]
  large = dataclasses.replace(recipe, workers=32 * recipe.workers, warmup="none")
  changed = ("workers", "warmup", "momentum_correction")
  fields = recipe.to_dict()
  differ = sorted(
    f"{name} ({stem})"
    for stem in set(_FASHION) & groups.keys()
    for name, value in groups[stem].recipe.to_dict().items()
    if name not in (*changed, "seed") and value != fields[name]
  )
  size = recipe.image_size
  return (
    f"A scale model: {recipe.network} on {recipe.dataset} ({examples} training images"
    f"{f' of {size}×{size}' if size else ''}), n = {recipe.per_worker_batch_size} images a worker, "
    f"{recipe.epochs} epochs, where the paper trains ResNet-50 on ImageNet with n = 32 for 90. "
    f"The baseline has kn = {group.kn} and η = {recipe.peak_learning_rate:g} (the paper's: 256 and "
    f"0.1), and at 32 times that, kn = {large.global_batch_size}, the peak rate is "
    f"{large.peak_learning_rate:g} (the paper's: 8192 and 3.2). Its recipes differ in "
    f"{', '.join(changed)} and seed alone{''.join(f', and in {each}' for each in differ)}."
  )


def _tell_break(groups: dict[str, Group]) -> str:
  missing = _pending(groups, tuple(_SWEEP), 3)
  if missing:
    return f"Ours is {missing}."
  largest, smallest = find_break([groups[stem] for stem in _SWEEP])
  low = f"{_ratio(largest, groups):g}"
  equals = f"All minibatches up to kn {largest.kn} ({low} times the baseline's) are equal to it"
  if largest.stem == _BASELINE:
    equals = "The next minibatch already cannot be called equal to the baseline's"
  if smallest is None:
    return f"{equals}, and none is worse by more than δ: we saw no break."
  high = f"{_ratio(smallest, groups):g}"
  return (
    f"{equals}, and the smallest that is worse by more than δ is kn {smallest.kn} ({high} times): "
    f"ours lies in ({largest.kn}, {smallest.kn}], that is ({low}, {high}] times the baseline's."
  )


def _afterwards(groups: dict[str, Group]) -> list[str]:
  """What was asked only when the results were known, in Markdown; no verdict rests on it."""
  pairs = [pair for pair in _PAIRS if not _pending(groups, pair[3:5], pair[5])]
  errors = {
    key: (groups[first].errors, groups[second].errors)
    for key, _, kind, first, second, _ in pairs
    if kind == "worse"
  }
  tests = {key: welch(*both) for key, both in errors.items()}
  ranks = {k: float(mannwhitneyu(*v, alternative="greater").pvalue) for k, v in errors.items()}
  by_welch = _holm({key: test.p_above() for key, test in tests.items() if test})
  by_ranks = _holm(ranks)
  lines = []
  if ranks:
    told = [
      f"{key} {by_welch.get(key, 1):.3f} and {by_ranks[key]:.3f} ({ranks[key]:.3f} alone)"
      for key in ranks
    ]
    lines.append(
      "Corrected for their number (Holm), p of the claims that something is worse would be, by "
      f"Welch's test and by Mann and Whitney's of ranks, which suits a few wild seeds better: "
      f"{', '.join(told)}."
    )
  for key, _, kind, first, second, _ in pairs:
    later = [[r.error for r in groups[s].results if r.run.recipe.seed] for s in (first, second)]
    if key in ("a1", "a2", "a3") and min(map(len, later)) > 1:
      lines.append(f"Without the pilots' seed 0, {key}: {_difference(welch(*later), kind)}.")
  if not _pending(groups, tuple(_SWEEP), 3):
    sweep = _against_first([groups[stem] for stem in _SWEEP])
    fine = list(itertools.takewhile(lambda pair: pair[1] and pair[1].interval[1] < _DELTA, sweep))
    lower = [f"kn {group.kn}" for group, test in sweep if test and test.interval[1] < 0]
    if fine:
      lines.append(
        f"None up to kn {fine[-1][0].kn} ({_ratio(fine[-1][0], groups):g} times the baseline's) is "
        "worse than the baseline by δ (the interval's upper end)."
      )
    if lower:
      lines.append(f"The whole interval is below the baseline's error for {', '.join(lower)}.")
  text = "**Asked afterwards**, when the results were known; no verdict rests on it:"
  return ["\n".join([text, "", *(f"- {line}" for line in lines)])] if lines else []


def _holm(p: dict[str, float]) -> dict[str, float]:
  """Holm 1979: the i-th smallest of m times m - i + 1, no smaller than those before it."""
  adjusted, largest = {}, 0.0
  for index, key in enumerate(sorted(p, key=p.get)):
    largest = adjusted[key] = max(largest, min(1.0, (len(p) - index) * p[key]))
  return adjusted


def draw(groups: dict[str, Group]) -> dict[str, bytes]:
  """The pictures, PNGs by name, as far as there is something to draw."""
  kinds = ("training", "validation")
  warmups = ((_GRADUAL, "gradual warmup", _BLUE), (_CONSTANT, "constant warmup", _ORANGE))
  curves = [(_BASELINE, "baseline", _BLACK), *warmups, (_NONE, "no warmup", _GREEN)]
  table_1 = [[(kind, "", curves) for kind in kinds]]
  panels = [
    ("training", f"{_SWEEP[stem]} × the baseline's", [(_BASELINE, "", "0.6"), (stem, "", _BLUE)])
    for stem in _OTHERS
  ]
  correction = [
    [(kind, name, [(stem, "corrected", colour), (other, "uncorrected", _PINK)]) for kind in kinds]
    for (stem, name, colour), other in zip(warmups, _UNCORRECTED, strict=True)
  ]
  known = [[(kind, "", [(_KNOWN, "ResNet-20", _BLUE)]) for kind in kinds]]
  pictures = {
    "figure1": _draw_figure_1(groups),
    "table1": _draw_curves(groups, table_1, _TABLE_1),
    "figure3": _draw_curves(groups, [panels[:4], panels[4:]], _OTHERS),
    "correction": _draw_curves(groups, correction, _UNCORRECTED),
    "known_number": _draw_curves(groups, known, (_KNOWN,)),
  }
  return {name: image for name, image in pictures.items() if image}


def _to_png(figure) -> bytes:
  image = io.BytesIO()
  figure.savefig(image, format="png")
  return image.getvalue()


def _draw_curves(groups, rows, needed) -> bytes | None:
  """Rows of panels (kind, title, curves of (stem, label, colour)): mean ± standard deviation."""
  from matplotlib.figure import Figure  # Only now, for mistakes should not wait for it.
  from matplotlib.ticker import MaxNLocator

  if not any(stem in groups for stem in needed):
    return None
  size = (1.5 + 2.6 * len(rows[0]) if len(rows[0]) > 2 else 11, 1.2 + 3 * len(rows))
  figure = Figure(figsize=size, dpi=150, layout="constrained")
  share = "all" if len(rows[0]) > 2 else "col"
  panels = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=share, squeeze=False)
  for panel, (kind, title, curves) in zip(panels.flat, itertools.chain(*rows), strict=True):
    there = [(groups[stem], label, colour) for stem, label, colour in curves if stem in groups]
    for index, (group, label, colour) in enumerate(there):
      errors = group.curves.errors(kind)
      means = [100 * statistics.fmean(each) for each in errors.values()]
      widths = [100 * statistics.stdev(e) if len(e) > 1 else 0.0 for e in errors.values()]
      # On a logarithmic axis the band's lower end must stay above 0.
      lows = [max(mean - width, mean / 10) for mean, width in zip(means, widths, strict=True)]
      highs = [mean + width for mean, width in zip(means, widths, strict=True)]
      name = f"kn {group.kn}{label and ', '}{label}"
      width = 1.5 if index else 3  # The first shows beneath the others.
      panel.plot(list(errors), means, color=colour, label=name, linewidth=width)
      panel.fill_between(list(errors), lows, highs, color=colour, alpha=0.25, linewidth=0)
    ends = max((group.curves.warmup_ends for group, _, _ in there), default=0)
    if ends:
      panel.axvline(ends, color="0.5", linestyle=":", label="end of warmup")
    panel.set_yscale("log")
    panel.minorticks_off()
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    panel.set(title=title, xlabel="epoch", ylabel=f"{kind} error, %")
    if there:
      panel.legend(fontsize=8, frameon=False)
  for panel in panels.flat:  # Only now, for panels that share an axis share its limits.
    low, high = panel.get_ylim()
    low = max(low, 0.01)  # An error of 0 has no place on a logarithmic axis.
    panel.set_ylim(low, high)
    parts = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = (part * 10**power for power in (-2, -1, 0, 1) for part in parts)
    shown = [tick for tick in ticks if low <= tick <= high]
    panel.set_yticks(shown, [f"{tick:g}" for tick in shown])
    if share == "all":
      panel.label_outer()
  return _to_png(figure)


def _draw_figure_1(groups) -> bytes:
  """The paper's Figure 1 beside ours, the minibatches aligned by their ratio to the baseline's."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
  paper, ours = figure.subplots(1, 2)
  points = [(kn / _PAPER_BASELINE, *point, _BLACK, []) for kn, point in _PAPER.items()]
  _draw_minibatches(paper, points, _PAPER[_PAPER_BASELINE][0], _PAPER_BASELINE)
  paper.set_title("The paper's (ImageNet, ResNet-50; its figures)")
  paper.set_ylabel("validation error, %")
  ours.set_title("Ours")
  if _BASELINE not in groups:
    ours.text(0.5, 0.5, "no baseline yet", ha="center", transform=ours.transAxes)
    return _to_png(figure)
  baseline = groups[_BASELINE]
  recipe, errors = baseline.recipe, baseline.errors
  points = []
  for group in (groups[stem] for stem in _SWEEP if stem in groups):
    scatter = 100 * statistics.stdev(group.errors) if len(group.errors) > 1 else 0.0
    mean, colour = 100 * statistics.fmean(group.errors), _BLACK
    if group is not baseline:
      several = min(len(group.errors), len(errors)) > 1
      test = welch(group.errors, errors) if several else None
      colour = _VERDICT_COLOURS[equal(test)]
    each = [100 * error for error in group.errors]
    points.append((_ratio(group, groups), mean, scatter, colour, each))
  mean = 100 * statistics.fmean(errors)
  delta = 100 * _DELTA
  ours.axhspan(
    mean - delta, mean + delta, color="0.9", zorder=0, label=f"baseline ± {delta:g} points"
  )
  _draw_minibatches(ours, points, mean, baseline.kn)
  for verdict, colour in _VERDICT_COLOURS.items():
    if colour in [point[3] for point in points]:
      ours.plot([], [], "o", color=colour, label=_AGAINST_BASELINE[verdict])
  ours.plot([], [], ".", color="0.5", label="a seed (at the upper edge: off the scale)")
  ours.plot([], [], "^", color="0.5", label="mean off the scale")
  ours.errorbar([], [], [], fmt="o", color="0.5", capsize=3, label="mean ± standard deviation")
  ours.legend(fontsize=9, frameon=False, loc="upper left")
  ours.set_title(f"Ours ({recipe.dataset}, {recipe.network}: scale model)")
  return _to_png(figure)


def _draw_minibatches(panel, points, baseline: float, baseline_kn: int):
  """Error by minibatch; points are (ratio, mean, standard deviation, colour, each seed's error)."""
  # The same share of the baseline in both panels. An error beyond, such as chance, would flatten
  # all others: it is told at the upper edge.
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
      # Where the curve rises it comes from the left and below: the place left of the point is free.
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
  panel.set_xlabel("minibatch kn, and how many times the baseline's")
  panel.grid(axis="y", alpha=0.3)


def replicate(results_dir: str, output: str) -> str:
  """Makes the report and its pictures, and returns the verdicts in words.

  Raises:
    UserError: the results will not do, or the output cannot be written.
  """
  if not output.endswith(".md"):
    raise UserError(f"--output={output} is refused; give a file that ends in .md.")
  groups = read_groups(results_dir)
  claims = decide(groups)
  folder = output.removesuffix(".md")
  images = {os.path.join(folder, f"{name}.png"): image for name, image in draw(groups).items()}
  links = {
    os.path.splitext(os.path.basename(path))[0]: os.path.relpath(
      path, os.path.dirname(output) or "."
    )
    for path in images
  }
  files = {**images, output: to_markdown(groups, claims, links).encode()}
  try:
    os.makedirs(folder, exist_ok=True)
    for path, content in files.items():  # The report last, when all that it shows is there.
      with open(path, "wb") as file:
        file.write(content)
  except OSError as error:
    raise UserError(f"--output={output} cannot be written ({error}); name one that can.") from error
  lines = [f"{claim.key:2}  {claim.verdict:30}  {claim.claim}" for claim in claims]
  return "\n".join([*lines, f"Report: {output}"])


def main(argv: list[str]) -> int:
  """Makes the report, and returns the process' exit status."""
  try:
    if argv[1:]:
      raise UserError(f"{' '.join(argv[1:])} is no flag; give --results_dir and --output alone.")
    print(replicate(flags.FLAGS.results_dir, flags.FLAGS.output))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  define_flags()
  app.run(main)
