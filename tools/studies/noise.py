"""The gradient noise scale of a run by epoch, and what it says about its minibatch."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Epoch:
  """The noise of an epoch.

  Attributes:
    epoch: its number, from 1.
    variance, squared_gradient: means of tr Σ and |G|² over its steps.
    error: standard error of B, by a jackknife over the epoch's records; None if it is not known.
  """

  epoch: int
  variance: float
  squared_gradient: float
  error: float | None

  @property
  def noise_scale(self) -> float:
    """B; infinite if no gradient is seen above the noise."""
    return _ratio(self.variance, self.squared_gradient)


def _ratio(variance, squared_gradient) -> float:
  return max(variance, 0.0) / squared_gradient if squared_gradient > 0 else math.inf


def critical_batch(noise_scale: float, per_worker_batch_size: int, share: float) -> float:
  """The largest kn at which AdaScale's gain is still this share of k.

  From (B + n) / (B + kn) = s.

  Args:
    noise_scale: B.
    per_worker_batch_size: n.
    share: s, above 0 and at most 1.
  """
  return (noise_scale * (1 - share) + per_worker_batch_size) / share


def epochs_of(records: list[dict]) -> Iterator[Epoch]:
  """The epochs that training records with `gradient_variance` tell of, in order."""
  spans, last = {}, 0
  for record in records:
    if record["kind"] != "train":
      continue
    steps, last = record["step"] - last, record["step"]
    if "gradient_variance" in record:
      row = (steps, record["gradient_variance"], record["squared_gradient"])
      spans.setdefault(math.ceil(record["epoch"] - 1e-9), []).append(row)
  for epoch, rows in sorted(spans.items()):
    steps, variances, squares = np.array(rows, np.float64).T
    without = np.sum(steps) - steps
    with np.errstate(divide="ignore", invalid="ignore"):
      jackknife = [
        _ratio(v, s)
        for v, s in zip(
          (np.sum(steps * variances) - steps * variances) / without,
          (np.sum(steps * squares) - steps * squares) / without,
          strict=True,
        )
      ]
    means = np.average([variances, squares], axis=1, weights=steps)
    yield Epoch(epoch, *map(float, means), _spread(jackknife))


def _spread(jackknife: list[float]) -> float | None:
  count = len(jackknife)
  if count < 2 or not all(map(math.isfinite, jackknife)):
    return None
  return math.sqrt((count - 1) * np.var(jackknife))
