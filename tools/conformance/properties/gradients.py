"""Aggregation, batch normalisation and weight decay, each where the others cannot hide it."""

import numpy as np

from tools.conformance import reference
from tools.conformance.comparison import (
  distance,
  expected_updates,
  norm,
  reference_steps,
  scaled,
)
from tools.conformance.observation import observe
from tools.conformance.problem import make_recipe
from tools.conformance.properties.result import Result

# The update must outweigh the rounding of the weights that it is read from, hence the high rate.
_PLAIN_SGD = {
  "momentum": 0.0,
  "nesterov": False,
  "warmup": "none",
  "reference_learning_rate": 1.0,
}


def check_aggregation(strategy) -> list[Result]:
  """Checks on a network without BN that plain SGD steps by η times the mean over kn (remark 3)."""
  recipe = make_recipe(strategy.num_replicas_in_sync, **_PLAIN_SGD)
  seen = observe(strategy, recipe, "plain", 3)
  rates = seen.scalars["learning_rate"]
  deviations = []
  for step, (before, _, after) in enumerate(reference_steps(seen, recipe, "plain", rates)):
    expected = expected_updates(before, after)
    deviations.append(distance(seen.updates(step, expected), expected))
  meaning = "gradient that moved the weights, against the mean over kn images; relative"
  return [Result("aggregation", float(np.max(deviations)), 1e-5, meaning)]


def check_normalization(strategy) -> list[Result]:
  """Checks that each worker normalises over its own n images, and the moving averages (§2.3)."""
  recipe = make_recipe(strategy.num_replicas_in_sync, **_PLAIN_SGD)
  seen = observe(strategy, recipe, "small_residual", 4)
  rates = seen.scalars["learning_rate"]
  groups, averages = [], []
  for step, (_, batch, after) in enumerate(reference_steps(seen, recipe, "small_residual", rates)):
    # Only the direction: a wrong factor is the fault of the aggregation.
    update = seen.updates(step, batch.gradients)
    direction = scaled(batch.gradients, 1 / norm(batch.gradients))
    groups.append(distance(scaled(update, 1 / norm(update)), direction))
    averages.append(distance(seen.variables[step + 1], after.statistics))
  meaning = f"direction of the gradient, BN over n = {recipe.per_worker_batch_size}; relative"
  return [
    Result("BN groups", float(np.max(groups)), 1e-4, meaning),
    Result(
      "moving statistics",
      float(np.max(averages)),
      1e-5,
      "moving averages, against those of the mean over the k workers; relative",
    ),
  ]


def check_weight_decay(strategy) -> list[Result]:
  """Checks remark 1 with a constant loss: eq. 9 with g = λ·w on kernels and 0 elsewhere."""
  recipe = make_recipe(strategy.num_replicas_in_sync, weight_decay=0.5, warmup="none")
  seen = observe(strategy, recipe, "small_residual", 6, logit_scale=0.0)
  state = reference.initial_state(seen.parameters(0), {})
  zeros = {name: np.zeros_like(value) for name, value in state.parameters.items()}
  nothing = reference.Minibatch(loss=0.0, error=0.0, gradients=zeros, means={}, variances={})
  for rate in seen.scalars["learning_rate"]:
    state = reference.sgd_step(
      state, nothing, rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
  deviations = [
    distance(seen.variables[-1], {name: value}) for name, value in state.parameters.items()
  ]
  meaning = "weights after 6 steps of weight decay alone, the worst variable; relative"
  return [Result("weight decay", float(np.max(deviations)), 1e-5, meaning)]
