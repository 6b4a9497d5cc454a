"""ResNet-50 of §5.1 as the package builds it: forward pass, initial weights and one step."""

import itertools
import math
from collections.abc import Iterable

import numpy as np

from tf_largebatch.recipe import Recipe
from tools.conformance import reference
from tools.conformance.comparison import (
  distance,
  expected_updates,
  reference_rates,
  reference_steps,
)
from tools.conformance.observation import observe
from tools.conformance.problem import CLASSES, MEAN, STD, make_recipe
from tools.conformance.properties.result import Result
from tools.conformance.reference_networks import last_batch_norms

_LAST_BATCH_NORMS = last_batch_norms("resnet50")


def check_network(strategy) -> list[Result]:
  """Checks the network that `build_model` builds, on this task's first device."""
  from tf_largebatch.models.networks import build_model

  recipe = make_recipe(1, network="resnet50", image_size=64, per_worker_batch_size=4)
  with strategy.scope():
    model = build_model(recipe, CLASSES)
  start = {variable.path: variable.numpy().astype(np.float64) for variable in model.weights}
  deviation, weights = _compare_worker_pass(model, recipe, start)
  trainable = {variable.path for variable in model.trainable_variables}
  return [
    Result(
      "network",
      deviation,
      1e-4,
      "logits and moving averages of ResNet-50 for one worker, at random γ; relative",
    ),
    Result(
      "variables",
      len(trainable ^ weights),
      0,
      "weights that only ours or only the paper's ResNet-50 has",
    ),
    Result("initial γ", _initial_offset(start), 0, "γ, β and biases; largest difference"),
    Result(
      "initial kernels",
      _abnormality(_standardised_kernels(start)),
      6,
      "from independent normal draws of He's variance; standard errors",
    ),
  ]


def _compare_worker_pass(model, recipe: Recipe, start: dict) -> tuple[float, set[str]]:
  """Runs one worker's forward pass; returns its deviation, and the names of the paper's weights."""
  import keras

  # Weights at which no block is idle and rounding errors grow little from block to block.
  rng = np.random.default_rng(3)
  moved = start | {
    f"{name}/gamma": rng.uniform(0.2, 0.6, start[f"{name}/gamma"].shape)
    for name in _LAST_BATCH_NORMS
  }
  for variable in model.weights:
    variable.assign(moved[variable.path])
    moved[variable.path] = variable.numpy()
  images = rng.integers(0, 256, (recipe.per_worker_batch_size, 64, 64, 3))
  logits = keras.ops.convert_to_numpy(model(images.astype(np.float32), training=True))
  expected = reference.forward("resnet50", moved, images, mean=MEAN, std=STD)
  worker = reference.worker_pass(
    "resnet50", moved, images, np.zeros(len(images), int), mean=MEAN, std=STD
  )
  m, averages = recipe.batch_norm_momentum, {}
  for kind, values in (("mean", worker.means), ("variance", worker.variances)):
    for layer, value in values.items():
      name = f"{layer}/moving_{kind}"
      averages[name] = m * start[name] + (1 - m) * value
  after = {variable.path: variable.numpy() for variable in model.weights}
  deviation = float(np.max([distance({"": logits}, {"": expected}), distance(after, averages)]))
  return deviation, set(worker.gradients)


def _initial_offset(start: dict[str, np.ndarray]) -> float:
  """Returns the largest difference of an initial γ, β or bias from the paper's."""
  offsets, constants = [], {"gamma": 1.0, "beta": 0.0, "bias": 0.0}
  for name, value in start.items():
    layer, _, kind = name.rpartition("/")
    if kind in constants:
      is_last = layer in _LAST_BATCH_NORMS and kind == "gamma"
      offsets.append(np.max(abs(value - (0.0 if is_last else constants[kind]))))
  return float(max(offsets))


def _standardised_kernels(start: dict[str, np.ndarray]) -> Iterable[np.ndarray]:
  """Yields each initial kernel, divided by the standard deviation that it should have."""
  for name, value in start.items():
    layer, _, kind = name.rpartition("/")
    if kind == "kernel":
      # He et al. 2015: variance 2 / fan-out; the last layer's standard deviation is 0.01 (§5.1).
      fan_out = np.prod(value.shape[:2]) * value.shape[-1]
      yield value / (np.sqrt(2 / fan_out) if layer != "logits" else 0.01)


def _abnormality(samples: Iterable[np.ndarray]) -> float:
  """Returns how far samples are from independent draws of N(0, 1).

  The largest deviation of a variance, a kurtosis or a correlation of two samples of the same shape,
  in standard errors.
  """
  figures, of_shape = [], {}
  for sample in samples:
    variance = np.mean(sample**2)
    figures.append((variance - 1) * np.sqrt(sample.size / 2))
    figures.append((np.mean(sample**4) / variance**2 - 3) * np.sqrt(sample.size / 24))
    of_shape.setdefault(sample.shape, []).append(sample.ravel())
  for alike in of_shape.values():
    for one, other in itertools.pairwise(alike):
      figures.append(np.corrcoef(one, other)[0, 1] * np.sqrt(one.size))
  return float(np.max(np.abs(figures)))


def check_resnet50(strategy) -> list[Result]:
  """Checks the update of every variable in one step of ResNet-50 at 64×64, n = 8.

  η is so high that the update outweighs the rounding of the weights that it is read from. In
  float64 the last γ is 1, so that every variable has a gradient. In float32 it is the paper's 0,
  and up to six batches are tried: among a batch's millions of ReLU inputs one may lie within
  rounding of 0, where there is no derivative, which moves the gradients by up to 1 %. A wrong
  formula is wrong on every batch.
  """
  return [
    _one_step(strategy, "float64", last_gamma=1.0, limit=1e-11, batches=1),
    _one_step(strategy, "float32", last_gamma=0.0, limit=1e-4, batches=6),
  ]


def _one_step(strategy, dtype: str, last_gamma: float, limit: float, batches: int) -> Result:
  from tf_largebatch.distributed.collectives import gather

  recipe = make_recipe(
    strategy.num_replicas_in_sync,
    network="resnet50",
    image_size=64,
    dtype=dtype,
    per_worker_batch_size=8,
    last_gamma=last_gamma,
    weight_decay=1e-4,
    reference_learning_rate=1000.0,
    warmup="none",
  )
  rates = reference_rates(recipe, 1)
  best = (math.inf, "none")
  for first_step in range(batches):
    seen = observe(strategy, recipe, "resnet50", 1, first_step=first_step)
    ((before, _, after),) = reference_steps(seen, recipe, "resnet50", rates)
    expected = expected_updates(before, after)
    measured = seen.updates(0, expected)
    worst = max(
      ((distance(measured, {name: value}), name) for name, value in expected.items()),
      key=lambda item: (math.isnan(item[0]), item[0]),  # NaN counts as the largest.
    )
    best = min(best, worst)
    # All tasks must take the same decision, or they would wait for each other.
    if gather(strategy, best[0]).max() <= limit:
      break
  meaning = f"update of {len(expected)} variables, last γ {last_gamma:g}; largest: {best[1]}"
  return Result(f"ResNet-50 {dtype}", best[0], limit, meaning)
