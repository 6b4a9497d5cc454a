"""The recipe's network."""

import functools

import keras

from tf_largebatch.models import resnet
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.recipe import Recipe

_POLICIES = {
  "float32": "float32",
  "bfloat16": "mixed_bfloat16",
  "float16": "mixed_float16",
  "float64": "float64",
}


def build_model(recipe: Recipe, num_classes: int, purpose: str = "training") -> keras.Model:
  """Builds the recipe's network, with the same weights in the same order for each purpose.

  Args:
    recipe: resolved.
    num_classes: width of the logits.
    purpose: "training"; "evaluation", which computes in the weights' dtype; or "export", the same
      made of plain Keras layers.
  """
  layer = keras.layers.BatchNormalization
  if purpose != "export":
    layer = functools.partial(
      PerWorkerBatchNormalization, per_worker_batch_size=recipe.per_worker_batch_size
    )
  policy = keras.dtype_policies.get(_POLICIES[recipe.dtype])
  layers = resnet.Layers(
    functools.partial(
      layer, momentum=recipe.batch_norm_momentum, epsilon=recipe.batch_norm_epsilon
    ),
    last_gamma=recipe.last_gamma,
    dtype=policy.name if purpose == "training" else policy.variable_dtype,
    seed=recipe.seed,
  )
  return resnet.build(
    recipe.network,
    layers,
    input_shape=(recipe.image_size, recipe.image_size, len(recipe.channel_mean)),
    num_classes=num_classes,
    channel_mean=recipe.channel_mean,
    channel_std=recipe.channel_std,
  )
