"""The networks of the small problem in Keras, with the layer names of `reference_networks`."""

import dataclasses

import keras
import numpy as np

from tf_largebatch.models.networks import build_model
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.recipe import Recipe
from tools.conformance.problem import CLASSES, MEAN, SIDE, STD


@dataclasses.dataclass(frozen=True)
class _Layers:
  recipe: Recipe

  def convolution(self, x, filters: int, size: int, strides: int, name: str):
    dtype = self.recipe.dtype
    if strides > 1 and size > 1:
      x = keras.layers.ZeroPadding2D((size - 1) // 2, dtype=dtype)(x)
    padding = "same" if strides == 1 else "valid"
    layer = keras.layers.Conv2D(
      filters, size, strides, padding=padding, use_bias=False, dtype=dtype, name=name
    )
    return layer(x)

  def normalized(self, x, filters: int, size: int, strides: int, name: str):
    x = self.convolution(x, filters, size, strides, f"{name}_conv")
    return PerWorkerBatchNormalization(
      momentum=self.recipe.batch_norm_momentum,
      epsilon=self.recipe.batch_norm_epsilon,
      dtype=self.recipe.dtype,
      name=f"{name}_bn",
    )(x)

  def tanh(self, x):
    return keras.layers.Activation("tanh", dtype=self.recipe.dtype)(x)

  def add(self, x, y):
    return keras.layers.Add(dtype=self.recipe.dtype)([x, y])


def _plain(layers: _Layers, x):
  x = layers.tanh(layers.convolution(x, 8, 3, 1, "conv1"))
  return layers.tanh(layers.convolution(x, 12, 3, 2, "conv2"))


def _small_residual(layers: _Layers, x):
  x = layers.tanh(layers.normalized(x, 8, 3, 1, "stem"))
  y = layers.tanh(layers.normalized(x, 6, 1, 1, "block1_1"))
  y = layers.tanh(layers.normalized(y, 6, 3, 2, "block1_2"))
  y = layers.normalized(y, 12, 1, 1, "block1_3")
  x = layers.tanh(layers.add(y, layers.normalized(x, 12, 1, 2, "block1_shortcut")))
  y = layers.tanh(layers.normalized(x, 12, 3, 1, "block2_1"))
  y = layers.normalized(y, 12, 3, 1, "block2_2")
  return layers.tanh(layers.add(x, y))


_BODIES = {"plain": _plain, "small_residual": _small_residual}


def build_network(network: str, recipe: Recipe, logit_scale: float = 1.0) -> keras.Model:
  """Builds a network whose layers have the names that the reference uses.

  Args:
    network: "plain", "small_residual" or the recipe's own.
    recipe: supplies the dtype and the arguments of the batch normalisation.
    logit_scale: multiplies the logits of a small network; at 0 the loss has no gradient.
  """
  if network == recipe.network:
    return build_model(recipe, CLASSES)
  dtype = recipe.dtype
  inputs = keras.Input((SIDE, SIDE, 3), dtype=dtype)
  scale, offset = 1 / np.array(STD), -np.array(MEAN) / np.array(STD)
  x = keras.layers.Rescaling(scale, offset, dtype=dtype)(inputs)
  x = _BODIES[network](_Layers(recipe), x)
  x = keras.layers.GlobalAveragePooling2D(dtype=dtype)(x)
  x = keras.layers.Dense(CLASSES, dtype=dtype, name="logits")(x)
  if logit_scale != 1:
    x = keras.layers.Rescaling(logit_scale, dtype=dtype)(x)
  return keras.Model(inputs, x)
