"""Compares the curves of a group of runs with those of a baseline.

final error: the median validation error of a run's last 5 epochs (§5). For a group, the mean ±
  sample standard deviation over its complete runs, or over all its runs while none is complete.
training error of an epoch: the mean over its steps. An unfinished epoch has none.
difference: a group's mean error minus the baseline's, each over the seeds that have reached the
  epoch.
band: 2 s sqrt(1/a + 1/b) for groups of a and b seeds, two standard errors of the difference, where
  s is their pooled sample standard deviation at that epoch. There is no band if both groups have
  one seed. Pooling lends the scatter of a group of several seeds to a group of one. s is rough
  when there are few seeds, but the factor stays 2: a t quantile (12.7 for two seeds) would let
  almost any curve match.
match: |difference| is at most the larger of the band and --tolerance. The default tolerance, one
  point, separates the cases in the paper's Table 1: gradual warmup ends 0.14 points above the
  baseline, no warmup 1.24 and constant warmup 2.28.
follows: from some epoch on, all epochs that both groups have reached match. leaves: from some epoch
  on, none matches. meets: only the last epoch matches. The verdict is about the validation error.
  If the training error matches but the validation error does not, the running averages of batch
  normalisation, which are noisier for large kn (§5.2), may be the cause.
"""

import dataclasses
import math
import statistics

from tools.studies.curves import Group, format_mean, format_points

ROUNDING = 1e-9  # In floats, 0.31 - 0.30 is a little more than 0.01.


@dataclasses.dataclass(frozen=True)
class Difference:
  """A group's mean error minus the baseline's at an epoch; they match up to the limit."""

  epoch: float
  difference: float
  band: float | None
  limit: float
  match: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The differences at all epochs that both a group and the baseline have reached."""

  differences: list[Difference]
  tolerance: float

  @property
  def tail(self) -> list[Difference]:
    """The longest sequence of last epochs that all match, or that all do not."""
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
    """The first epoch from which on all epochs match; None if the last does not."""
    return self.tail[0].epoch if self.verdict == "follows" else None

  @property
  def side(self) -> str:
    """On which side of the baseline's curve the group's lies in the tail."""
    signs = {math.copysign(1, each.difference) for each in self.tail}
    sides = {(1,): "above", (-1,): "below"}
    return sides.get(tuple(signs), "sometimes above, sometimes below,")

  def describe(self) -> str:
    """Completes the sentence "Its … error"."""
    if self.verdict == "follows":
      return self._describe_match()
    tail, first, last = self.tail, self.tail[0], self.tail[-1]
    sizes = [abs(each.difference) for each in tail]
    end = f"({format_points(sizes[-1])} at epoch {last.epoch:g}; {self._limits()})"
    if self.verdict == "never matches":
      return f"is {self.side} by at least {format_points(min(sizes))} points {end}"
    matches = [each.epoch for each in self.differences if each.match]
    before = f"matched through epoch {matches[-1]:g}"
    if len(matches) + len(tail) < len(self.differences):
      before = f"matched at {len(matches)} of {len(self.differences)} epochs, last {matches[-1]:g}"
    size = f"{format_points(max(sizes))} points"
    if len(tail) == 1:
      return f"{before}, and at epoch {last.epoch:g} is {self.side} by {size} ({self._limits()})"
    return f"{before}, and from epoch {first.epoch:g} on is {self.side} by up to {size} {end}"

  def _describe_match(self) -> str:
    tail, first, last = self.tail, self.tail[0], self.tail[-1]
    where = f"from epoch {first.epoch:g} on"
    if len(tail) == len(self.differences):
      where = f"at every epoch, {first.epoch:g} to {last.epoch:g}"
    if len(tail) == 1:
      only = "the only one" if len(self.differences) == 1 else "the last"
      where = f"only at epoch {last.epoch:g}, {only} compared"
    widest = format_points(max(abs(each.difference) for each in tail))
    return f"matches {where} (within {widest} points; {self._limits()})"

  def _limits(self) -> str:
    widest = max(each.limit for each in self.tail)
    band = f", seeds' band up to {format_points(widest)}" if widest > self.tolerance else ""
    return f"tolerance {100 * self.tolerance:g}{band}"


def seeds_band(errors: list[float], baseline: list[float]) -> float | None:
  """Returns two standard errors of the difference of two means, by the pooled deviation."""
  degrees = len(errors) + len(baseline) - 2
  if not degrees:
    return None
  groups = [group for group in (errors, baseline) if len(group) > 1]
  squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
  return 2 * math.sqrt(squares / degrees * (1 / len(errors) + 1 / len(baseline)))


def compare(group: Group, baseline: Group, kind: str, tolerance: float) -> Comparison:
  """Compares "training" or "validation" errors at the epochs that both groups have reached."""
  theirs = baseline.errors(kind)
  differences = []
  for epoch, errors in group.errors(kind).items():
    if epoch in theirs:
      difference = statistics.fmean(errors) - statistics.fmean(theirs[epoch])
      band = seeds_band(errors, theirs[epoch])
      limit = max(tolerance, band or 0.0)
      match = abs(difference) <= limit + ROUNDING
      differences.append(Difference(epoch, difference, band, limit, match))
  return Comparison(differences, tolerance)


def describe(group: Group, baseline: Group, comparisons: dict[str, Comparison]) -> str:
  """Returns a group's verdict in words; `comparisons` are by kind of error."""
  validation, training = comparisons["validation"], comparisons["training"]
  epochs = [each.epoch for each in validation.differences]
  if not epochs:
    return f"{group.label} and its baseline {baseline.label} have no evaluated epoch in common."
  verdict = validation.verdict
  if verdict == "follows" and len(validation.tail) == 1:
    verdict = "meets"  # One epoch is not a curve.
  text = (
    f"{group.label} {verdict} its baseline {baseline.label}: its validation error "
    f"{validation.describe()}."
  )
  if not training.differences:
    text += " They have no finished epoch of training in common."
  else:
    agree = (training.verdict == "follows") == (validation.verdict == "follows")
    text += f" {'Its' if agree else 'But its'} training error {training.describe()}."
  if group.complete and baseline.complete:
    ours, theirs = (format_mean(each.final_errors) for each in (group, baseline))
    text += f" Final error {ours} against {theirs}."
  planned = sorted({group.recipe.epochs, baseline.recipe.epochs})
  if len(epochs) < planned[-1]:
    which = f"epochs {epochs[0]:g} to {epochs[-1]:g}" if len(epochs) > 1 else f"epoch {epochs[0]:g}"
    text += f" Only {which} of {' and '.join(map(str, planned))} could be compared."
  warmup_ends = max(group.warmup_ends, baseline.warmup_ends)
  if epochs[-1] <= warmup_ends:
    text += f" That is within the warmup ({warmup_ends:g} epochs), during which curves may differ."
  return text
