"""A task of `multi_task_test`: a tiny network by a small recipe, in float32 and float64.

python -m tools.launch_local --tasks=2 --module=tests.tiny_task -- DIRECTORY
"""

import os
import sys

import keras
import numpy as np

from tf_largebatch import cluster, sources, step, training
from tf_largebatch.normalization import PerWorkerBatchNormalization
from tf_largebatch.recipe import Recipe

EXAMPLES = 200
STEPS = 20


def make_recipe(dtype):
  """k = 4, n = 6, 8 steps an epoch: a warmup over 12 steps, a decay at step 16."""
  return Recipe(
    dataset="test",
    validation_split="validation",
    image_size=8,
    augmentation="pad_crop",
    channel_mean=(120.0, 120.0, 120.0),
    channel_std=(60.0, 60.0, 60.0),
    network="resnet20",
    dtype=dtype,
    workers=4,
    per_worker_batch_size=6,
    reference_batch_size=6,
    epochs=3,
    warmup_epochs=1.5,
    decay_epochs=(2,),
    weight_decay=1e-2,
    label_smoothing=0.1,
  )


def make_source():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (EXAMPLES, 8, 8, 3)).astype(np.uint8)
  # The label is the example's id: it tells which examples a task saw.
  return sources.ArraySource(images, np.arange(EXAMPLES), EXAMPLES)


def tiny_model(dtype):
  """Two convolutions with BN, pooling and a dense layer, of raw pixels."""
  keras.utils.set_random_seed(1)
  inputs = keras.Input((8, 8, 3), dtype=dtype)
  x = keras.layers.Rescaling(1 / 60, offset=-2.0, dtype=dtype)(inputs)
  for filters in (8, 12):
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, dtype=dtype)(x)
    x = keras.layers.ReLU(dtype=dtype)(PerWorkerBatchNormalization(dtype=dtype)(x))
  x = keras.layers.GlobalAveragePooling2D(dtype=dtype)(x)
  return keras.Model(inputs, keras.layers.Dense(EXAMPLES, dtype=dtype)(x))


def train(strategy, dtype):
  """STEPS steps: losses, the state of each local replica, the ids that this task saw."""
  recipe, source = make_recipe(dtype), make_source()
  workers_per_replica = recipe.workers // strategy.num_replicas_in_sync
  with strategy.scope():
    model = tiny_model(dtype)
    optimizer = training.build_optimizer(recipe, source.num_examples)
    optimizer.build(model.trainable_variables)
  batches = iter(training.distribute_train_dataset(strategy, recipe, source, first_step=0))
  train_step = step.make_train_step(strategy, model, optimizer, recipe)
  losses, ids = [], []
  for _ in range(STEPS):
    images, labels = next(batches)
    local = strategy.experimental_local_results(labels)
    assert all(x.shape == (workers_per_replica, 6) for x in local)
    ids.append(np.concatenate([x.numpy() for x in local]))
    losses.append(float(train_step((images, labels))["loss"]))
  copies = [
    np.concatenate(
      [
        np.ravel(strategy.experimental_local_results(variable.value)[replica].numpy())
        for variable in model.weights + optimizer.variables
      ]
    )
    for replica in range(len(local))
  ]
  return {"losses": np.array(losses), "copies": np.array(copies), "ids": np.array(ids)}


def main(directory):
  this = cluster.read_cluster()
  strategy = cluster.make_strategy(this)
  for dtype in ("float32", "float64"):
    name = f"{dtype}_{this.num_tasks}_{this.task_index}.npz"
    np.savez(os.path.join(directory, name), **train(strategy, dtype))


if __name__ == "__main__":
  main(sys.argv[-1])
