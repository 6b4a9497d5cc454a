"""What the reference computes for observed steps, and how far the two are apart."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from tf_largebatch.recipe import Recipe
from tools.conformance import reference
from tools.conformance.observation import Observation
from tools.conformance.problem import MEAN, STD, STEPS_PER_EPOCH, make_examples


def reference_rates(recipe: Recipe, steps: int) -> np.ndarray:
  """Returns the reference's η_t of the first steps."""
  schedule = reference.Schedule(
    steps_per_epoch=STEPS_PER_EPOCH,
    batch=recipe.global_batch_size,
    reference_rate=recipe.reference_learning_rate,
    reference_batch=recipe.reference_batch_size,
    scaling=recipe.learning_rate_scaling,
    warmup=recipe.warmup,
    warmup_epochs=recipe.warmup_epochs,
    decay_epochs=recipe.decay_epochs,
    decay_factor=recipe.decay_factor,
  )
  return np.array([reference.rate(t, schedule) for t in range(steps)])


def reference_step(
  state: reference.State, recipe: Recipe, network: str, ids: np.ndarray, rate: float
) -> tuple[reference.Minibatch, reference.State]:
  """Returns the reference's sums for a step's examples `[k, n]`, and its state after the step."""
  images, labels = make_examples(recipe)
  batch = reference.minibatch(
    network,
    state.parameters,
    images[ids],
    labels[ids],
    mean=MEAN,
    std=STD,
    epsilon=recipe.batch_norm_epsilon,
    label_smoothing=recipe.label_smoothing,
  )
  return batch, reference.sgd_step(
    state,
    batch,
    rate,
    momentum=recipe.momentum,
    nesterov=recipe.nesterov,
    momentum_correction=recipe.momentum_correction,
    weight_decay=recipe.weight_decay,
    batch_norm_momentum=recipe.batch_norm_momentum,
  )


def reference_steps(
  seen: Observation, recipe: Recipe, network: str, rates: np.ndarray
) -> Iterator[tuple[reference.State, reference.Minibatch, reference.State]]:
  """Yields (state before, sums, state after) of the reference for each observed step.

  Each step starts from the weights and statistics that were observed before it, so that errors do
  not accumulate. The momentum is the reference's own throughout.
  """
  state = reference.initial_state(seen.parameters(0), {})
  for step, rate in enumerate(rates):
    state = dataclasses.replace(
      state, parameters=seen.parameters(step), statistics=seen.statistics(step)
    )
    batch, after = reference_step(state, recipe, network, seen.ids[step], rate)
    yield state, batch, after
    state = after


def expected_updates(before: reference.State, after: reference.State) -> dict[str, np.ndarray]:
  """Returns what the reference's step subtracted from each weight."""
  return {name: value - after.parameters[name] for name, value in before.parameters.items()}


def distance(measured: dict, expected: dict) -> float:
  """Returns ‖measured − expected‖ / ‖expected‖ over all expected names together.

  If ‖expected‖ is 0: 0 if the two are equal, else ∞.
  """
  difference = norm({name: measured[name] - expected[name] for name in expected})
  scale = norm(expected)
  if scale == 0:
    return math.inf if difference else 0.0
  return difference / scale


def scaled(values: dict, factor: float) -> dict:
  return {name: factor * value for name, value in values.items()}


def norm(values: dict) -> float:
  return float(np.sqrt(sum(np.sum(value**2) for value in values.values())))
