r"""How long a checkpoint holds training up, and how large it is.

  python -m tools.benchmark.checkpoint --network=resnet50 --image_size=224 --turns=5

Takes the package's own training steps on random images: in turns a step alone, and a step right
after a save was begun, which copies the state and leaves the rest to a thread that shares the
cores with the step. The stall is what the two cost more than the step alone.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time

from absl import app, flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe


def define_flags():
  flags.DEFINE_string("network", "resnet50", "As in the recipe.")
  flags.DEFINE_integer("image_size", 224, "Height and width.")
  flags.DEFINE_integer("workers", 1, "k.")
  flags.DEFINE_integer("per_worker_batch_size", 32, "n.")
  flags.DEFINE_string("dtype", "float32", "As in the recipe.")
  flags.DEFINE_integer("turns", 5, "Steps of each kind.", lower_bound=1)


def measure(recipe: Recipe, turns: int, directory: str) -> dict:
  """The figures, in seconds and bytes, by name.

  Args:
    recipe: of the synthetic data set.
    turns: steps of each kind.
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

  def timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began

  def one_step():
    float(train_step(batch)["loss"])  # Waits for the device.

  for _ in range(2):
    one_step()
  alone, beside, copies, saves = [], [], [], []
  for turn in range(turns):
    alone.append(timed(one_step))
    copies.append(timed(lambda turn=turn: checkpoints.save(2 * turn + 1, 0.0)))
    beside.append(timed(one_step))
    checkpoints.wait()
    began = time.perf_counter()
    checkpoints.save(2 * turn + 2, 0.0)
    checkpoints.wait()
    saves.append(time.perf_counter() - began)
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


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  try:
    if len(argv) > 1:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
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
      print(json.dumps(measure(recipe, values.turns, directory), indent=2))
    return 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  define_flags()
  app.run(main)
