"""`LARS` against algorithm 1 of You et al. 2017, written in NumPy float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch.optim.lars import LARS
from tf_largebatch.optim.optimizers import build_optimizer
from tf_largebatch.recipe import Recipe

STEPS, MOMENTUM, DECAY, TRUST = 60, 0.9, 0.01, 0.02


def problem():
  """Initial weights and gradients of a kernel, a bias and a kernel of zeros."""
  rng = np.random.default_rng(0)
  shapes = {"kernel": (4, 3), "bias": (3,), "zero_kernel": (2, 2)}
  weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  weights["zero_kernel"][:] = 0
  gradients = [{n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(STEPS)]
  gradients[5]["kernel"][:] = 0
  return weights, gradients


def algorithm_1(weights, gradients, rates):
  """v ← m·v + γ·λ·(g + β·w), w ← w − v, with λ = η·‖w‖ / (‖g‖ + β·‖w‖) on kernels."""
  w = {name: value.copy() for name, value in weights.items()}
  v = {name: np.zeros_like(value) for name, value in weights.items()}
  for step, gradient in enumerate(gradients):
    for name in w:
      g, local = gradient[name], 1.0
      if name.endswith("kernel"):
        norms = np.sqrt(np.sum(w[name] ** 2)), np.sqrt(np.sum(g**2))
        if norms[0] and norms[1]:
          local = TRUST * norms[0] / (norms[1] + DECAY * norms[0])
        g = g + DECAY * w[name]
      # γ in the buffer is that of this step, as momentum correction has it.
      scale = rates[step] / rates[step - 1] if step else 1.0
      v[name] = MOMENTUM * scale * v[name] + rates[step] * local * g
      w[name] = w[name] - v[name]
  return w


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize("changes", [False, True])
def test_equals_algorithm_1(dtype, tolerance, changes):
  weights, gradients = problem()
  rates = np.full(STEPS, 0.5)
  if changes:
    rates *= np.random.default_rng(1).uniform(0.5, 2, STEPS)
  optimizer = LARS(0.5, MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST)
  variables = [keras.Variable(value, name=name, dtype=dtype) for name, value in weights.items()]
  optimizer.build(variables)
  for rate, gradient in zip(rates, gradients, strict=True):
    optimizer.learning_rate = rate
    optimizer.apply([tf.constant(g, dtype) for g in gradient.values()], variables)
  # The optimizer's own rate is float32.
  expected = algorithm_1(weights, gradients, rates.astype(np.float32).astype(float))
  for variable, value in zip(variables, expected.values(), strict=True):
    np.testing.assert_allclose(
      variable.numpy(), value, rtol=0, atol=tolerance * np.abs(value).max()
    )


def test_config_round_trip():
  optimizer = LARS(0.25, 0.8, True, 0.02, 0.003, momentum_correction=False, clipnorm=1.0)
  clone = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
  assert isinstance(clone, LARS) and clone.get_config() == optimizer.get_config()
  assert clone.trust_coefficient == 0.003


@pytest.mark.parametrize("bad", [{"trust_coefficient": 0}, {"momentum": 1}, {"weight_decay": -1}])
def test_rejects_bad_arguments(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    LARS(**bad)
  with pytest.raises(TypeError):
    LARS(learning_rte=1)


def test_the_recipe_chooses_the_optimizer_and_the_decay():
  recipe = Recipe(
    workers=16, optimizer="lars", trust_coefficient=0.01, decay="polynomial", epochs=10,
    warmup_epochs=2, weight_decay=1e-3,
  )  # fmt: skip
  optimizer = build_optimizer(recipe, 5120)
  assert isinstance(optimizer, LARS) and optimizer.trust_coefficient == 0.01
  assert optimizer.coupled_weight_decay == 1e-3 and optimizer.nesterov
  optimizer.build([keras.Variable([1.0])])
  optimizer.iterations.assign(60)  # Half of the 80 steps after the warmup.
  assert float(optimizer.learning_rate) == pytest.approx(0.2 / 4, rel=1e-12)
  assert type(build_optimizer(Recipe(workers=8), 5120)) is not LARS
