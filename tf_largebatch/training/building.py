"""Stage 3 of a run: networks, optimizer and loss scale, made in the strategy's scope."""

import dataclasses

import keras
import tensorflow as tf

from tf_largebatch.models.networks import build_model
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.optim.optimizers import build_optimizer
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Networks:
  """What a run trains.

  Attributes:
    model: the network that is trained.
    precise: the same network, computing in the weights' dtype; has weights of its own.
    evaluated: the one of these two that is evaluated.
    optimizer: built for `model`.
    loss_scale: for float16; else None.
  """

  model: keras.Model
  precise: keras.Model
  evaluated: keras.Model
  optimizer: MomentumCorrectedSGD
  loss_scale: LossScale | None

  def update_evaluated(self) -> None:
    """Copies the trained weights to `evaluated`, unless it is the trained network itself."""
    if self.evaluated is not self.model:
      self.evaluated.set_weights(self.model.get_weights())


def build(strategy: tf.distribute.Strategy, recipe: Recipe, source, jit_compile: bool) -> Networks:
  """Builds what the recipe trains on the source's classes.

  Args:
    strategy: in whose scope the variables are made.
    recipe: resolved.
    source: of the training examples.
    jit_compile: whether XLA compiles the update.
  """
  with strategy.scope():
    model = build_model(recipe, source.num_classes)
    precise = build_model(recipe, source.num_classes, "evaluation")
    optimizer = build_optimizer(recipe, source.num_examples, jit_compile)
    optimizer.build(model.trainable_variables)
    loss_scale = LossScale() if recipe.dtype == "float16" else None
  evaluated = model if recipe.evaluation_dtype == "training" else precise
  return Networks(model, precise, evaluated, optimizer, loss_scale)
