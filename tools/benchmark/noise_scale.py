r"""Checks the gradient noise scale that a run reports, and times what it costs.

  python -m tools.benchmark.noise_scale --flagfile=flags/fashion_mnist_kn256.flags \
    --train_split=train[:8192] --data_dir=data --train_steps=0,64,256 --repeats=40

After each number of training steps the weights are held, and one epoch of batches measures at them

  meter         means over the epoch's steps of what a step reports
  brute force   from small and large batches, without the step's sums: the gradient of each worker
                alone, and of the whole epoch

The standard error of the meter's means is their spread over random divisions of the same workers
into steps. Then steps with the meter and without take turns, two of each, because one build of the
same step can be faster than another. The exit status is 1 if the meter is off by more than four
standard errors. Takes every flag of the trainer; k must be at least 2, and the gradients of all
workers of an epoch must fit in memory.
"""

import dataclasses
import statistics
import time
from unittest import mock

import numpy as np
from absl import flags

from tf_largebatch import command_line
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import output, program

_STANDARD_ERRORS = 4
_DIVISIONS = 400


def define_flags():
  command_line.define_flags()
  flags.DEFINE_list("train_steps", ["0", "64"], "Steps after which to measure, increasing.")
  flags.DEFINE_integer("repeats", 20, "Timed steps of each kind.", lower_bound=1)
  flags.DEFINE_string("json", None, "File for the results, as JSON.")


def measure(recipe: Recipe, data_dir: str, train_steps: list[int], repeats: int) -> dict:
  """The estimates at each number of steps, and the seconds of a step with and without the meter."""
  import tensorflow as tf

  from tf_largebatch.data import sources
  from tf_largebatch.models.networks import build_model
  from tf_largebatch.optim.optimizers import build_optimizer
  from tf_largebatch.training import step
  from tf_largebatch.training.batches import distribute_train_dataset
  from tf_largebatch.training.resolution import resolve

  recipe = resolve(recipe, 1, data_dir)
  source = sources.open_source(recipe.dataset, recipe.train_split, data_dir, recipe.image_size)
  model = build_model(recipe, source.num_classes)
  optimizer = build_optimizer(recipe, source.num_examples)
  optimizer.build(model.trainable_variables)
  strategy = tf.distribute.get_strategy()
  arguments = (strategy, model, optimizer, recipe)
  train_step = step.make_train_step(*arguments, train_examples=source.num_examples)
  timed = {"with": train_step, "with, again": step.make_train_step(*arguments)}
  with mock.patch.object(step, "_count_passes", lambda *_: 1):
    timed |= {name: step.make_train_step(*arguments) for name in ("without", "without, again")}
  batches = iter(distribute_train_dataset(strategy, recipe, source, 0))
  epoch = [next(batches) for _ in range(recipe.steps_per_epoch(source.num_examples))]
  rows, done = [], 0
  for steps in train_steps:
    for _ in range(steps - done):
      train_step(next(batches))
    done = steps
    rows.append({"steps": steps, **_compare(model, recipe, epoch)})
  return {"estimates": rows, "seconds": _time_in_turns(timed, epoch, repeats)}


def _compare(model, recipe: Recipe, epoch: list) -> dict:
  """tr Σ and |G|² at the model's weights: the meter's means and errors, and by brute force."""
  import tensorflow as tf

  from tf_largebatch.options import RunOptions
  from tf_largebatch.training import noise_scale, step
  from tf_largebatch.training.passes import Variables

  k, n, options = recipe.workers, recipe.per_worker_batch_size, RunOptions(workers_per_pass=1)
  sums = tf.function(step.make_paper_sums(model, recipe, options))
  alone = dataclasses.replace(recipe, workers=1)
  one_worker = tf.function(step.make_paper_sums(model, alone, options))
  values = Variables.of(model).values()
  images_in_epoch = k * n * len(epoch)
  meter, workers = [], []
  for images, labels in epoch:
    gradients, _, _, scalars = sums(values, 0, (images, labels))
    squared_norm = float(np.sum(_flat(gradients) ** 2))
    meter.append(noise_scale.estimate(float(scalars[2]), squared_norm, k, k * n, images_in_epoch))
    batches = [(images[i : i + 1], labels[i : i + 1]) for i in range(k)]
    workers += [_flat(one_worker(values, 0, batch)[0]) for batch in batches]
  products = np.array(workers) @ np.array(workers).T  # g_i · g_j
  means, errors = np.mean(meter, axis=0), _errors(products, k, n)
  count = len(workers)
  large = products.mean()
  variance = n * count / (count - 1) * (np.trace(products) / count - large)
  return {
    "variance": [float(x) for x in (means[0], errors[0], variance)],
    "squared_gradient": [float(x) for x in (means[1], errors[1], large)],
    "noise_scale": [float(means[0] / means[1]), float(variance / large)],
  }


def _errors(products: np.ndarray, k: int, n: int) -> np.ndarray:
  """Spread of the meter's means over random divisions of an epoch's workers into steps."""
  from tf_largebatch.training.noise_scale import estimate

  rng, found, count = np.random.default_rng(0), [], len(products)
  for _ in range(_DIVISIONS):
    steps = rng.permutation(count).reshape(-1, k)
    blocks = products[steps[:, :, None], steps[:, None, :]]  # [steps, k, k]
    squared_norms = np.trace(blocks, axis1=1, axis2=2) / k**2
    squared_norm = blocks.sum(axis=(1, 2)) / k**2
    found.append(np.mean(estimate(squared_norms, squared_norm, k, k * n, count * n), axis=1))
  return np.std(found, axis=0, ddof=1)


def _flat(gradients) -> np.ndarray:
  return np.concatenate([gradient.numpy().astype(np.float64).ravel() for gradient in gradients])


def _time_in_turns(functions: dict, epoch: list, repeats: int) -> dict[str, list[float]]:
  seconds = {name: [] for name in functions}
  for function in functions.values():
    float(function(epoch[0])["loss"])
  order, shuffle = list(functions), np.random.default_rng(0).shuffle
  for repeat in range(repeats):
    shuffle(order)
    for name in order:
      began = time.perf_counter()
      float(functions[name](epoch[repeat % len(epoch)])["loss"])  # Waits for the device.
      seconds[name].append(time.perf_counter() - began)
  return seconds


def _table(found: dict) -> str:
  lines = [
    f"{'steps':>6}  {'quantity':<17}{'meter':>12}{'± s.e.':>12}{'brute force':>14}{'off':>7}"
  ]
  for row in found["estimates"]:
    for name in ("variance", "squared_gradient"):
      mean, error, brute = row[name]
      off = (mean - brute) / error
      lines.append(
        f"{row['steps']:6d}  {name:<17}{mean:12.5g}{error:12.2g}{brute:14.5g}{off:6.1f}σ"
      )
    meter, brute = row["noise_scale"]
    lines.append(f"{row['steps']:6d}  {'noise_scale':<17}{meter:12.4g}{'':12}{brute:14.4g}")
  medians = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
  pooled = [medians[name] + medians[f"{name}, again"] for name in ("with", "without")]
  lines.append(
    f"a step: {500 * pooled[0]:.2f} ms with the meter, {500 * pooled[1]:.2f} ms without: "
    f"{pooled[0] / pooled[1] - 1:+.2%} (the same step built twice: with "
    f"{medians['with, again'] / medians['with'] - 1:+.2%}, without "
    f"{medians['without, again'] / medians['without'] - 1:+.2%})"
  )
  return "\n".join(lines)


def main() -> bool:
  values = flags.FLAGS
  recipe, options = command_line.recipe_from_flags(), command_line.options_from_flags()
  path = output.output_path("--json", values.json)
  if (recipe.workers or 1) < 2:
    raise UserError("The noise scale needs several workers; give --workers=2 or more.")
  try:
    steps = [int(step) for step in values.train_steps]
  except ValueError:
    steps = []
  if not steps or steps != sorted(set(steps)) or steps[0] < 0:
    raise UserError(f"--train_steps={','.join(values.train_steps)}: give increasing whole numbers.")
  found = measure(recipe, options.data_dir, steps, values.repeats)
  print(_table(found))
  if path:
    output.write_json("--json", path, found)
  return any(
    abs(row[name][0] - row[name][2]) > _STANDARD_ERRORS * row[name][1]
    for row in found["estimates"]
    for name in ("variance", "squared_gradient")
  )


if __name__ == "__main__":
  program.run(main, define_flags)
