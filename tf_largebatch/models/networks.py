"""The recipe's network."""

import functools

import keras

from tf_largebatch.models import other_networks, resnet
from tf_largebatch.models.conversion import per_worker_batch_normalization
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.recipe import NETWORKS, Recipe

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

  Raises:
    UserError: the network is not one of ours and cannot be built or trained.
  """
  policy = keras.dtype_policies.get(_POLICIES[recipe.dtype])
  dtype = policy.name if purpose == "training" else policy.variable_dtype
  if recipe.network not in NETWORKS:
    model = other_networks.build(recipe, num_classes, dtype)
    if purpose == "export":
      return model
    return per_worker_batch_normalization(model, recipe.per_worker_batch_size)
  layer = keras.layers.BatchNormalization
  if purpose != "export":
    layer = functools.partial(
      PerWorkerBatchNormalization, per_worker_batch_size=recipe.per_worker_batch_size
    )
  layers = resnet.Layers(
    functools.partial(
      layer, momentum=recipe.batch_norm_momentum, epsilon=recipe.batch_norm_epsilon
    ),
    last_gamma=recipe.last_gamma,
    dtype=dtype,
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
