"""The small problem on which `tools.verify` checks the recipe: values, images and weights.

Imports no TensorFlow: `tools.verify` reports a user's mistake before TensorFlow starts. For the
same reason the modules beside this one import TensorFlow and Keras inside their functions.
"""

import functools
import math

import numpy as np

from tf_largebatch.recipe import Recipe

CLASSES = 10
SIDE = 8
PER_WORKER_BATCH_SIZE = 5
STEPS_PER_EPOCH = 12
MEAN, STD = (120.0, 125.0, 130.0), (60.0, 65.0, 70.0)
# The first pixel of an image holds the number of its example, in three bytes.
ID_BYTES = np.array([1, 256, 65536])


def make_recipe(replicas: int, **changes) -> Recipe:
  """Returns a recipe of k = 4 workers, or two per replica if that is more, of n = 5 images.

  A run has 3 epochs of 12 steps. The peak rate is 10/3 η; the warmup ends within an epoch, at step
  15, and the rate decays at steps 27 and 33. k, n and kn over the reference minibatch differ, so
  that a mix-up of two of them shows. Every value is written out, so that the reference cannot share
  a wrong default of `Recipe`.

  Args:
    replicas: number of replicas that share the workers.
    **changes: fields of `Recipe` that differ.
  """
  workers = replicas * max(2, math.ceil(4 / replicas))
  values = {
    "dataset": "verify",
    "validation_split": "none",
    "image_size": SIDE,
    "augmentation": "none",
    "channel_mean": MEAN,
    "channel_std": STD,
    "last_gamma": 0.0,
    "batch_norm_momentum": 0.9,
    "batch_norm_epsilon": 1e-5,
    "dtype": "float32",
    "workers": workers,
    "per_worker_batch_size": PER_WORKER_BATCH_SIZE,
    "reference_batch_size": workers * PER_WORKER_BATCH_SIZE * 3 // 10,
    "reference_learning_rate": 0.2,
    "learning_rate_scaling": "linear",
    "epochs": 3,
    "warmup": "gradual",
    "warmup_epochs": 1.25,
    "decay_epochs": (2.25, 2.75),
    "decay_factor": 0.3,
    "momentum": 0.9,
    "nesterov": True,
    "momentum_correction": True,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "seed": 7,
  }
  return Recipe(**values | changes)


@functools.cache  # All steps of a run use the same examples.
def make_examples(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
  """Returns images uint8 `[N, H, W, 3]` that hold their numbers, and labels int32 `[N]`.

  N is not a multiple of kn.
  """
  count = recipe.global_batch_size * STEPS_PER_EPOCH + 3
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (count, recipe.image_size, recipe.image_size, 3)).astype(np.uint8)
  images[:, 0, 0] = np.arange(count)[:, None] // ID_BYTES % 256
  return images, rng.integers(0, CLASSES, count).astype(np.int32)


# Kernel shapes by layer.
_SHAPES = {
  "plain": {"conv1": (3, 3, 3, 8), "conv2": (3, 3, 8, 12), "logits": (12, CLASSES)},
  "small_residual": {
    "stem": (3, 3, 3, 8),
    "block1_1": (1, 1, 8, 6),
    "block1_2": (3, 3, 6, 6),
    "block1_3": (1, 1, 6, 12),
    "block1_shortcut": (1, 1, 8, 12),
    "block2_1": (3, 3, 12, 12),
    "block2_2": (3, 3, 12, 12),
    "logits": (12, CLASSES),
  },
}


def make_parameters(network: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns initial weights and moving statistics by name: float32 values, as float64 arrays.

  None of them has the value that the package initialises it to. Both are empty for the package's
  own networks, which keep the weights that `build_model` gave them.
  """
  rng = np.random.default_rng(2)
  weights, statistics = {}, {}
  for name, shape in _SHAPES.get(network, {}).items():
    normalized = network != "plain" and name != "logits"
    kernel = f"{name}_conv/kernel" if normalized else f"{name}/kernel"
    weights[kernel] = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
    if name == "logits":
      weights["logits/bias"] = rng.normal(0, 0.3, CLASSES)
    if normalized:
      weights[f"{name}_bn/gamma"] = rng.uniform(0.5, 1.5, shape[-1])
      weights[f"{name}_bn/beta"] = rng.normal(0, 0.3, shape[-1])
      statistics[f"{name}_bn/moving_mean"] = rng.normal(0, 0.3, shape[-1])
      statistics[f"{name}_bn/moving_variance"] = rng.uniform(0.5, 1.5, shape[-1])
  weights, statistics = (
    {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}
    for values in (weights, statistics)
  )
  return weights, statistics
