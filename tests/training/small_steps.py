"""A small network and batches for single steps."""

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.recipe import Recipe

_CLASSES, _SIDE = 3, 6


def make_recipe(workers=4, n=5, dtype="float32"):
  return Recipe(
    dataset="synthetic", network="resnet8", workers=workers, per_worker_batch_size=n, dtype=dtype
  )


def make_model(n, dtype):
  keras.utils.set_random_seed(0)
  variable_dtype = keras.dtype_policies.get(dtype).variable_dtype
  return keras.Sequential(
    [
      keras.Input((_SIDE, _SIDE, 2), dtype=variable_dtype),
      keras.layers.Rescaling(1 / 100.0, dtype=variable_dtype),
      keras.layers.Conv2D(4, 3, use_bias=False, dtype=dtype),
      PerWorkerBatchNormalization(n, dtype=dtype),
      keras.layers.ReLU(dtype=dtype),
      keras.layers.GlobalAveragePooling2D(dtype=variable_dtype),
      keras.layers.Dense(_CLASSES, dtype=variable_dtype),
    ]
  )


def make_batches(recipe, count=3):
  rng = np.random.default_rng(0)
  shape = (recipe.workers, recipe.per_worker_batch_size)
  for _ in range(count):
    images = rng.integers(0, 256, (*shape, _SIDE, _SIDE, 2), dtype=np.uint8)
    yield tf.constant(images), tf.constant(rng.integers(0, _CLASSES, shape, dtype=np.int32))
