"""One random shuffle of the training set per epoch, divided among the workers (remark 4)."""

import dataclasses
import itertools

import numpy as np

from tf_largebatch.recipe import Recipe
from tools.conformance.problem import STEPS_PER_EPOCH, make_examples
from tools.conformance.properties.result import Result


def shuffle_results(ids: np.ndarray, recipe: Recipe) -> list[Result]:
  """Checks the examples of a run of three epochs, ids `[steps, k, n]`."""
  total = len(make_examples(recipe)[0])
  epochs = ids.reshape(3, STEPS_PER_EPOCH, *ids.shape[1:])
  return [
    Result(
      "every image once",
      _repeated_or_missing(epochs, total),
      0,
      "images repeated within an epoch, or missing from every epoch",
    ),
    Result(
      "reshuffled each epoch",
      _correlation(epochs),
      6,
      "correlation of an epoch's order with another's or the data set's; standard errors",
    ),
    Result(
      "shared shuffle",
      _overlap(epochs, total),
      5,
      "images that stay with their worker from epoch to epoch, against chance; standard errors",
    ),
    Result(
      "sample order",
      _strays(ids, recipe, total),
      0,
      "examples of first and last step unlike those on one device, or alike with another seed",
    ),
  ]


def _repeated_or_missing(epochs: np.ndarray, total: int) -> int:
  """Counts images repeated within an epoch, or missing from every epoch."""
  faults = 0
  for epoch in epochs:
    inside = set(epoch.ravel()) & set(range(total))
    faults += epoch.size - len(inside)
  # The remainder below kn is left out, but a different one in each epoch.
  left_out = [frozenset(range(total)) - frozenset(epoch.ravel().tolist()) for epoch in epochs]
  if len(set(left_out)) == 1:
    faults += len(left_out[0])
  return faults


def _correlation(epochs: np.ndarray) -> float:
  """Largest correlation of two epochs' orders, or of one with the data set's; standard errors."""
  orders = [np.arange(epochs[0].size), *(epoch.ravel() for epoch in epochs)]
  correlations = [abs(np.corrcoef(orders[a], orders[b])[0, 1]) for b in range(4) for a in range(b)]
  return float(np.max(correlations) * np.sqrt(epochs[0].size))


def _overlap(epochs: np.ndarray, total: int) -> float:
  """How far the overlap of a worker's shares of two epochs is from chance, in standard errors.

  By chance, the overlap of each worker is hypergeometric. The workers of an epoch are independent
  up to a term of order 1/k.
  """
  _, steps, workers, n = epochs.shape
  share = steps * n
  expected = share**2 / total
  variance = expected * (1 - share / total) * (total - share) / (total - 1)
  overlaps = []
  for a, b in itertools.combinations(range(3), 2):
    shared = [
      len(np.intersect1d(epochs[a][:, worker], epochs[b][:, worker])) for worker in range(workers)
    ]
    overlaps.append(abs(sum(shared) - workers * expected))
  return float(np.max(overlaps) / np.sqrt(workers * variance))


def _strays(ids: np.ndarray, recipe: Recipe, total: int) -> int:
  """Counts examples of the first and last step that are not those of the recipe on one device.

  If another seed gives the same examples, all of them count.
  """
  from tf_largebatch.data import input_pipeline

  def alone(seed: int) -> np.ndarray:
    seeded = dataclasses.replace(recipe, seed=seed)
    return np.array(
      [
        [input_pipeline.example_ids(seeded, total, step, j) for j in range(recipe.workers)]
        for step in (0, len(ids) - 1)
      ]
    )

  expected = alone(recipe.seed)
  strays = int(np.sum(expected != ids[[0, -1]]))
  if np.array_equal(expected, alone(recipe.seed + 1)):
    strays += expected.size
  return strays
