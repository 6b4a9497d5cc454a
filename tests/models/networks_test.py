"""`build_model` passes the recipe's values to the network."""

import dataclasses

import numpy as np

from tf_largebatch.models.networks import build_model
from tf_largebatch.recipe import Recipe

RECIPE = Recipe(
  dataset="synthetic",
  image_size=8,
  channel_mean=(123.675, 116.28, 103.53),
  channel_std=(58.395, 57.12, 57.375),
  network="resnet8",
  dtype="bfloat16",
  workers=2,
  per_worker_batch_size=10,
)


def test_the_network_has_the_recipes_values():
  """The values differ from every default."""
  values = {"batch_norm_momentum": 0.5, "batch_norm_epsilon": 0.01, "last_gamma": 0.25, "seed": 3}
  recipe = dataclasses.replace(RECIPE, **values)
  kernels = {}
  for purpose in ("training", "evaluation", "export"):
    model = build_model(recipe, 10, purpose)
    norms = [layer for layer in model.layers if hasattr(layer, "gamma")]
    assert {(layer.momentum, layer.epsilon) for layer in norms} == {(0.5, 0.01)}
    dtype = "bfloat16" if purpose == "training" else "float32"
    assert {layer.compute_dtype for layer in norms} == {dtype}
    gammas = {layer.name: float(layer.gamma.numpy()[0]) for layer in norms}
    assert gammas == {name: 0.25 if name.endswith("_2_bn") else 1.0 for name in gammas}
    assert list(gammas.values()).count(0.25) == 3
    kernels[purpose] = model.get_layer("stem_conv").kernel.numpy()
    np.testing.assert_array_equal(kernels[purpose], kernels["training"])
  other = build_model(dataclasses.replace(recipe, seed=4), 10)
  assert not np.any(other.get_layer("stem_conv").kernel.numpy() == kernels["training"])
