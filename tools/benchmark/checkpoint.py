"""Measures how long a checkpoint delays training, and how large it is.

  python -m tools.benchmark.checkpoint --network=resnet50 --image_size=224 --repeats=5

Runs the package's own training steps on random images. Each repeat times a step alone, then the
start of a save, which copies the state and leaves the writing to a thread, and the next step, which
shares the cores with that thread. The stall is the excess of the last two over the step alone.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time

from absl import flags

from tf_largebatch.recipe import Recipe
from tools import program


def define_flags():
  flags.DEFINE_string("network", "resnet50", "As in the recipe.")
  flags.DEFINE_integer("image_size", 224, "Height and width in pixels.")
  flags.DEFINE_integer("workers", 1, "k, as in the recipe.")
  flags.DEFINE_integer("per_worker_batch_size", 32, "n, as in the recipe.")
  flags.DEFINE_string("dtype", "float32", "As in the recipe.")
  flags.DEFINE_integer("repeats", 5, "Timed steps of each kind.", lower_bound=1)


def measure(recipe: Recipe, repeats: int, directory: str) -> dict:
  """The figures, in seconds and bytes, by name.

  Args:
    recipe: of the synthetic data set.
    repeats: timed steps of each kind.
    directory: for the checkpoints.
  """
  import tensorflow as tf

  from tf_largebatch.data import sources
  from tf_largebatch.models.networks import build_model
  from tf_largebatch.optim.optimizers import build_optimizer
  from tf_largebatch.training import step
  from tf_largebatch.training.batches import distribute_train_dataset
  from tf_largebatch.training.checkpoint import Checkpoints
  from tf_largebatch.training.resolution import resolve

  recipe = resolve(recipe, 1, "")
  strategy = tf.distribute.get_strategy()
  source = sources.open_source("synthetic", recipe.train_split, "", recipe.image_size)
  model = build_model(recipe, source.num_classes)
  optimizer = build_optimizer(recipe, source.num_examples)
  optimizer.build(model.trainable_variables)
  train_step = step.make_train_step(strategy, model, optimizer, recipe)
  batch = next(iter(distribute_train_dataset(strategy, recipe, source, 0)))
  checkpoints = Checkpoints(directory, model, optimizer)

  def one_step():
    float(train_step(batch)["loss"])  # Waits for the device.

  def whole_save(number: int):
    checkpoints.save(number, 0.0)
    checkpoints.wait()

  for _ in range(2):
    one_step()
  alone, beside, copies, saves = [], [], [], []
  for repeat in range(repeats):
    alone.append(_seconds(one_step))
    copies.append(_seconds(checkpoints.save, 2 * repeat + 1, 0.0))
    beside.append(_seconds(one_step))
    checkpoints.wait()
    saves.append(_seconds(whole_save, 2 * repeat + 2))
  files = [os.path.join(directory, name) for name in os.listdir(directory)]
  stall = statistics.median(copies) + statistics.median(beside) - statistics.median(alone)
  return {
    "step_seconds": statistics.median(alone),
    "copy_seconds": statistics.median(copies),
    "step_beside_the_writing_seconds": statistics.median(beside),
    "stall_seconds": stall,
    "stall_share_of_a_step": stall / statistics.median(alone),
    "whole_save_seconds": statistics.median(saves),
    "bytes": max(map(os.path.getsize, files)),
    "values": sum(int(v.value.shape.num_elements()) for v in model.variables + optimizer.variables),
  }


def _seconds(function, *arguments) -> float:
  began = time.perf_counter()
  function(*arguments)
  return time.perf_counter() - began


def main():
  values = flags.FLAGS
  recipe = Recipe(
    dataset="synthetic",
    network=values.network,
    image_size=values.image_size,
    workers=values.workers,
    per_worker_batch_size=values.per_worker_batch_size,
    dtype=values.dtype,
  )
  recipe = dataclasses.replace(recipe, train_split=f"train[:{recipe.global_batch_size}]")
  with tempfile.TemporaryDirectory() as directory:
    print(json.dumps(measure(recipe, values.repeats, directory), indent=2))


if __name__ == "__main__":
  program.run(main, define_flags)
