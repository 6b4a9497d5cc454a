"""The claims of docs/answers_claims.md, decided from the results of their runs."""

import dataclasses
import math
import statistics

from scipy import stats

from tools.studies import noise, rank_tests
from tools.studies.curves import format_points
from tools.studies.results import Group, Result
from tools.studies.verdicts import (
  ALPHA,
  NOT_DECIDABLE,
  NOT_REPRODUCED,
  PENDING,
  REPRODUCED,
)

SEEDS, SEARCH_SEEDS = range(5, 10), range(10, 12)
_STEM = "fashion_mnist_kn"
SWEEP = {kn: f"{_STEM}{kn}" for kn in (16, 32, 64, 128, 256, 512, 1024, 2048)}
BASELINE = SWEEP[16]
_RATES = ("0.1", "0.2", "0.4", "0.8", "1.6")
RATES = tuple(f"kn1024_rate{rate}" for rate in _RATES)
STEPS_RATES = tuple(f"kn1024_same_steps_rate{rate}" for rate in _RATES)
WARMUPS = ("kn1024_warmup4", "kn1024_warmup8")
SAME_STEPS = "kn1024_same_steps"
NO_MOMENTUM = {kn: f"kn{kn}_no_momentum" for kn in (16, 512, 1024)}
STARTS = {kn: f"kn{kn}_start" for kn in (128, 2048)}
NOISE_KN, NOISE_EPOCHS = 256, range(13, 19)  # Of why.1.
_FAILED = 0.02  # Above the baseline's median.


@dataclasses.dataclass(frozen=True)
class Answer:
  """A claim's row in the report: what it says, what was seen, and the verdict of its test."""

  key: str
  claim: str
  seen: str
  test: str
  verdict: str


class Runs:
  """The results by group, and of each group those of some seeds."""

  def __init__(self, groups: dict[str, Group]):
    self.groups = groups

  def results(self, stem: str, seeds=SEEDS) -> list[Result]:
    members = self.groups[stem].results if stem in self.groups else ()
    return [result for result in members if result.seed in seeds]

  def errors(self, stem: str, seeds=SEEDS) -> list[float]:
    return [result.error for result in self.results(stem, seeds)]

  def missing(self, stems, seeds=SEEDS) -> str | None:
    """The verdict where runs of these groups and seeds are missing, or None."""
    there = sum(len(self.results(stem, seeds)) for stem in stems)
    needed = len(stems) * len(seeds)
    return f"{PENDING} ({there} of {needed} runs)" if there < needed else None

  def best(self, stems) -> str | None:
    """The group with the lowest mean error over the seeds of the search; None if runs miss."""
    if self.missing(stems, SEARCH_SEEDS):
      return None
    return min(stems, key=lambda stem: statistics.fmean(self.errors(stem, SEARCH_SEEDS)))

  def failed(self, stem: str) -> int:
    """How many runs end more than 2 points above the median of the baseline's."""
    limit = statistics.median(self.errors(BASELINE)) + _FAILED
    return sum(error > limit for error in self.errors(stem))

  def find_break(self) -> int | None:
    """The smallest kn from which on all are worse than the baseline."""
    smallest = None
    for kn, stem in sorted(SWEEP.items(), reverse=True):
      if rank_tests.worse(self.errors(stem), self.errors(BASELINE)) != REPRODUCED:
        break
      smallest = kn
    return smallest

  def largest_equal(self) -> int:
    """The largest kn that is equal to the baseline, as are all smaller ones."""
    largest = 16
    for kn, stem in list(SWEEP.items())[1:]:
      if rank_tests.equal(self.errors(stem), self.errors(BASELINE)) != REPRODUCED:
        break
      largest = kn
    return largest

  def describe(self, stem: str) -> str:
    """The errors of a group, and how many of its runs failed."""
    errors = sorted(self.errors(stem))
    text = f"{stem.removeprefix('fashion_mnist_')}: {', '.join(map(format_points, errors))}"
    failed = self.failed(stem) if not self.missing([BASELINE]) else 0
    return f"{text} ({failed} of {len(errors)} failed)" if failed else text

  def describe_all(self, stems) -> str:
    """A line for each of the groups that has runs."""
    return "<br>".join(self.describe(stem) for stem in stems if self.errors(stem))


def combine(verdicts: list[str]) -> str:
  """The verdict of a claim that needs each of its tests."""
  first = (NOT_REPRODUCED, NOT_DECIDABLE, REPRODUCED)
  return next(possible for possible in first if possible in verdicts)


def late_noise_scale(result: Result) -> float:
  """B of a run over the epochs of why.1; infinite if no gradient is seen above the noise."""
  epochs = [each for each in result.noise if each.epoch in NOISE_EPOCHS]
  variance, squared = (
    statistics.fmean(getattr(each, name) for each in epochs)
    for name in ("variance", "squared_gradient")
  )
  return noise.Epoch(0, variance, squared, None).noise_scale


def nesterov_bound(momentum: float, rate: float) -> float:
  """The eigenvalue up to which Nesterov's SGD is stable on a quadratic (Cohen et al. 2021)."""
  return (2 + 2 * momentum) / (rate * (1 + 2 * momentum))


def decide(runs: Runs) -> list[Answer]:
  """Decides all claims of (d1) and (why), in their order."""
  return [
    _decide_flat(runs),
    _decide_pair(runs, "d1.2", "kn = 2048 is worse than the baseline", "worse", SWEEP[2048]),
    _decide_noise(runs),
    _decide_pair(
      runs, "why.2", "as many steps as kn = 128 takes mend kn = 1024", "equal", SAME_STEPS
    ),
    _decide_search(runs, "why.3", "a searched rate mends kn = 1024", RATES),
    _decide_search(
      runs, "why.4", "a searched rate and as many steps as kn = 128 takes mend it", STEPS_RATES
    ),
    _decide_search(runs, "why.5", "a warmup of 4 or 8 epochs mends it", WARMUPS),
    _decide_momentum(runs),
    _decide_eigenvalue(runs),
  ]


def _decide_flat(runs: Runs) -> Answer:
  stems = [SWEEP[kn] for kn in (32, 64, 128, 256, 512)]
  verdict = runs.missing([BASELINE, *stems])
  test, present = "equal(kn, 16) for each", [BASELINE, *stems]
  if not verdict:
    pairs = {stem: (runs.errors(stem), runs.errors(BASELINE)) for stem in stems}
    verdict = combine([rank_tests.equal(*pair) for pair in pairs.values()])
    p = ", ".join(f"{rank_tests.p_equal(*pair):.3f}" for pair in pairs.values())
    test = f"{test}: p = {p}"
  seen = runs.describe_all(present)
  return Answer("d1.1", "the error is flat from kn = 32 to 512", seen, test, verdict)


def _decide_pair(runs: Runs, key: str, claim: str, kind: str, stem: str, other=BASELINE) -> Answer:
  """Decides equal or worse of two groups."""
  verdict = runs.missing([stem, other])
  names = [each.removeprefix("fashion_mnist_") for each in (stem, other)]
  test = f"{kind}({', '.join(names)})"
  if not verdict:
    pair = runs.errors(stem), runs.errors(other)
    verdict = getattr(rank_tests, kind)(*pair)
    test += f": p = {getattr(rank_tests, f'p_{kind}')(*pair):.3f}"
  seen = runs.describe_all([stem, other])
  return Answer(key, claim, seen, test, verdict)


def _decide_search(runs: Runs, key: str, claim: str, stems: tuple[str, ...]) -> Answer:
  """Decides equal(the best of several by the seeds of the search, the baseline)."""
  best = runs.best(stems)
  if best is None:
    verdict = runs.missing(stems, SEARCH_SEEDS)
    return Answer(key, claim, "", "equal(the best by seeds 10 and 11, kn16)", verdict)
  answer = _decide_pair(runs, key, claim, "equal", best)
  means = [
    f"{stem.removeprefix('kn1024_')} {format_points(statistics.fmean(errors))}"
    for stem in stems
    if (errors := runs.errors(stem, SEARCH_SEEDS))
  ]
  searched = f"seeds 10 and 11: {', '.join(means)}"
  return dataclasses.replace(answer, seen=f"{searched}<br>{answer.seen}")


def _decide_noise(runs: Runs) -> Answer:
  claim = f"the break lies within a factor of 2 of B, late in runs of kn = {NOISE_KN}"
  test = "90 % t-interval of log₂(break / B) within ±1"
  verdict, seen = runs.missing(SWEEP.values()), ""
  if not verdict:
    scales = [late_noise_scale(result) for result in runs.results(SWEEP[NOISE_KN])]
    mean, where = statistics.geometric_mean(scales), runs.find_break()
    seen = f"B = {', '.join(f'{b:.0f}' for b in scales)}: {mean:.0f}; the break: {where}"
    if where is None:
      return Answer("why.1", claim, seen, test, NOT_DECIDABLE)
    low, high = ratio_interval(where, scales)
    seen += f"; log₂ {math.log2(where / mean):+.2f} [{low:+.2f}, {high:+.2f}]"
    inside, outside = low >= -1 and high <= 1, high < -1 or low > 1
    verdict = REPRODUCED if inside else NOT_REPRODUCED if outside else NOT_DECIDABLE
  return Answer("why.1", claim, seen, test, verdict)


def ratio_interval(where: int, scales: list[float]) -> tuple[float, float]:
  """The 90 % t-interval of the mean of log₂(where / B)."""
  logs = [math.log2(where / scale) for scale in scales]
  half = stats.t.ppf(1 - ALPHA, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
  return statistics.fmean(logs) - half, statistics.fmean(logs) + half


def _decide_momentum(runs: Runs) -> Answer:
  claim = "without momentum, kn = 1024 does not break"
  large, small = NO_MOMENTUM[1024], NO_MOMENTUM[16]
  answer = _decide_pair(runs, "why.6", claim, "equal", large, small)
  missing = runs.missing([large, small, SWEEP[1024], BASELINE])
  if missing:
    return dataclasses.replace(answer, verdict=missing)
  breaks = rank_tests.worse(runs.errors(SWEEP[1024]), runs.errors(BASELINE)) == REPRODUCED
  verdict = answer.verdict if breaks else NOT_DECIDABLE
  if rank_tests.worse(runs.errors(large), runs.errors(small)) == REPRODUCED:
    verdict = NOT_REPRODUCED
  seen = f"{answer.seen}<br>{runs.describe(NO_MOMENTUM[512])}"
  return dataclasses.replace(answer, seen=seen, verdict=verdict)


def _decide_eigenvalue(runs: Runs) -> Answer:
  claim = "at the end of warmup, the largest eigenvalue is above Nesterov's bound in broken runs"
  test = "above in all 5 seeds of kn = 2048, in none of kn = 128"
  verdict, found = runs.missing(STARTS.values()), over_bound(runs)
  if not verdict:
    above = {kn: sum(ratio > 1 for ratio in ratios) for kn, ratios in found.items()}
    verdict = REPRODUCED if above == {128: 0, 2048: len(SEEDS)} else NOT_REPRODUCED
  shown = {kn: ", ".join(f"{ratio:.2f}" for ratio in ratios) for kn, ratios in found.items()}
  lines = [f"kn {kn}: eigenvalue / bound = {each}" for kn, each in shown.items() if each]
  return Answer("why.7", claim, "<br>".join(lines), test, verdict)


def over_bound(runs: Runs) -> dict[int, list[float]]:
  """The eigenvalues at the end of the warmup over Nesterov's bound, of each seed by kn."""
  return {kn: [_over_bound(each) for each in runs.results(stem)] for kn, stem in STARTS.items()}


def _over_bound(result: Result) -> float:
  """The largest eigenvalue in the last step of the warmup, over Nesterov's bound."""
  recipe = result.run.recipe
  step = round(recipe.warmup_epochs * recipe.steps_per_epoch(result.train_examples))
  record = next(each for each in result.curvature if each["step"] == step)
  bound = nesterov_bound(recipe.momentum, record["learning_rate"])
  return record["largest_eigenvalue"] / bound


def failed_share(runs: Runs) -> str:
  """How many runs of each kn failed, in words."""
  counts = {kn: runs.failed(stem) for kn, stem in SWEEP.items() if runs.errors(stem)}
  found = [f"{n} of {len(SEEDS)} at kn = {kn}" for kn, n in counts.items() if n]
  return ", ".join(found) or "none"
