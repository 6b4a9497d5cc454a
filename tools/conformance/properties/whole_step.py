"""The whole step, and the equality of the replicas after it."""

import numpy as np

from tools.conformance.comparison import (
  distance,
  expected_updates,
  reference_rates,
  reference_steps,
)
from tools.conformance.observation import observe
from tools.conformance.problem import STEPS_PER_EPOCH, make_recipe
from tools.conformance.properties.result import Result


def check_step(strategy) -> list[Result]:
  """Checks all parts of the recipe at once, on a residual network, step by step."""
  replicas = strategy.num_replicas_in_sync
  recipe = make_recipe(replicas, weight_decay=1e-2, label_smoothing=0.1)
  steps = 3 * STEPS_PER_EPOCH
  seen = observe(strategy, recipe, "small_residual", steps)
  rates, deviations = reference_rates(recipe, steps), []
  compared = reference_steps(seen, recipe, "small_residual", rates)
  for step, (before, batch, after) in enumerate(compared):
    expected = expected_updates(before, after)
    deviations.append(distance(seen.updates(step, expected), expected))
    deviations.append(abs(seen.scalars["loss"][step] / batch.loss - 1))
    deviations.append(abs(seen.scalars["error"][step] - batch.error))
  compares = f"on {replicas} replicas" if replicas > 1 else "(one replica: nothing to compare)"
  return [
    Result(
      "whole step",
      float(np.max(deviations)),
      1e-4,
      f"update, loss and error of {steps} steps with all parts at once; relative",
    ),
    Result(
      "replicas identical",
      seen.spread,
      0,
      f"weights, statistics and momentum {compares}; largest difference",
    ),
  ]
