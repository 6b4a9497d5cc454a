"""The recipe's optimizer with its schedule."""

import functools

from tf_largebatch.optim.lars import LARS
from tf_largebatch.optim.schedule import LinearScalingSchedule
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.recipe import Recipe


def build_optimizer(
  recipe: Recipe, train_examples: int, jit_compile: bool = False
) -> MomentumCorrectedSGD:
  """Builds the recipe's optimizer for a training split of so many examples."""
  schedule = LinearScalingSchedule(
    steps_per_epoch=recipe.steps_per_epoch(train_examples),
    global_batch_size=recipe.global_batch_size,
    reference_learning_rate=recipe.reference_learning_rate,
    reference_batch_size=recipe.reference_batch_size,
    scaling=recipe.learning_rate_scaling,
    warmup=recipe.warmup,
    warmup_epochs=recipe.warmup_epochs,
    decay_epochs=recipe.decay_epochs,
    decay_factor=recipe.decay_factor,
    decay=recipe.decay,
    decay_power=recipe.decay_power,
    epochs=recipe.epochs,
  )
  optimizer = MomentumCorrectedSGD
  if recipe.optimizer == "lars":
    optimizer = functools.partial(LARS, trust_coefficient=recipe.trust_coefficient)
  return optimizer(
    schedule,
    momentum=recipe.momentum,
    nesterov=recipe.nesterov,
    momentum_correction=recipe.momentum_correction,
    weight_decay=recipe.weight_decay,
    jit_compile=jit_compile,
  )
