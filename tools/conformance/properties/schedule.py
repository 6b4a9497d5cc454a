"""The learning rate, the momentum correction and the shuffle over a whole run."""

import dataclasses

import numpy as np

from tf_largebatch.recipe import Recipe
from tools.conformance.comparison import (
  distance,
  expected_updates,
  norm,
  reference_rates,
  reference_steps,
  scaled,
)
from tools.conformance.observation import Observation, observe
from tools.conformance.problem import STEPS_PER_EPOCH, make_examples, make_recipe
from tools.conformance.properties.result import Result
from tools.conformance.properties.shuffle import shuffle_results


def check_schedule(strategy) -> list[Result]:
  """Checks §2.1, §2.2 and remarks 2 and 4 on a run with a warmup, two decays and three epochs."""
  recipe = make_recipe(strategy.num_replicas_in_sync)
  steps = 3 * STEPS_PER_EPOCH
  seen = observe(strategy, recipe, "plain", steps)
  rates = seen.scalars["learning_rate"]
  deviations = abs(rates / reference_rates(recipe, steps) - 1)
  warm, decayed = 15, 27
  ratio = recipe.global_batch_size / recipe.reference_batch_size
  return [
    Result(
      "scaling rule",
      float(deviations[warm:decayed].max()),
      1e-6,
      f"rate after the warmup, against {ratio:.3g} η; relative",
    ),
    Result(
      "warmup",
      float(np.max([deviations[:warm].max(), _small_minibatch_deviation(recipe)])),
      1e-6,
      "rate of each of its steps, and no warmup for a small minibatch; relative",
    ),
    Result("step decay", float(deviations[decayed:].max()), 1e-6, "rate after it; relative"),
    _momentum_result(seen, recipe, rates),
    *shuffle_results(seen.ids, recipe),
  ]


def _small_minibatch_deviation(recipe: Recipe) -> float:
  """Deviation of the first rate below the reference minibatch, where there is no warmup (§5.3)."""
  from tf_largebatch.optim.optimizers import build_optimizer

  small = dataclasses.replace(recipe, reference_batch_size=2 * recipe.global_batch_size)
  optimizer = build_optimizer(small, len(make_examples(small)[0]))
  return abs(float(optimizer.learning_rate) / reference_rates(small, 1)[0] - 1)


def _momentum_result(seen: Observation, recipe: Recipe, rates: np.ndarray) -> Result:
  """Compares each update with eq. 9 at the rates that were used, up to one factor for all steps.

  A wrong factor is the fault of the aggregation.
  """
  factor, deviations = None, []
  for step, (before, _, after) in enumerate(reference_steps(seen, recipe, "plain", rates)):
    if rates[step] == 0:
      continue
    expected = expected_updates(before, after)
    measured = seen.updates(step, expected)
    if factor is None:
      factor = sum(np.sum(measured[name] * value) for name, value in expected.items())
      factor /= norm(expected) ** 2
    deviations.append(distance(measured, scaled(expected, factor)))
  meaning = "update of each step against eq. 9, across warmup and decay; relative"
  return Result("momentum correction", float(np.max(deviations)), 1e-4, meaning)
