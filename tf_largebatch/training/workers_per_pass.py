"""g, the workers that a replica takes through the network at once: checked, or measured.

The chief keeps a measured g in the work directory, so that a run that is continued on such devices
does not compile and measure again.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch import files
from tf_largebatch.distributed.collectives import gather
from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training.passes import PASSES_AT_ONCE, Variables
from tf_largebatch.training.step import make_paper_sums, uses_xla

_FILE = "workers_per_pass.json"


def check_workers_per_pass(workers_per_pass: int, workers_on_replica: int) -> None:
  """Raises UserError if g does not divide a replica's workers."""
  if workers_on_replica % workers_per_pass:
    values = [g for g in range(1, workers_on_replica + 1) if workers_on_replica % g == 0]
    raise UserError(
      f"workers_per_pass={workers_per_pass} does not divide the {workers_on_replica} workers of a "
      f"replica; use {', '.join(map(str, values))} or auto."
    )


def with_workers_per_pass(
  options: RunOptions,
  strategy: tf.distribute.Strategy,
  model: keras.Model,
  recipe: Recipe,
  keep: bool = False,
) -> RunOptions:
  """Returns the options with g chosen, the same on all tasks.

  Args:
    options: of these, workers_per_pass, jit_compile, and the work_dir of a kept g.
    strategy: in whose scope the model was made.
    model, recipe: what is trained.
    keep: whether to keep a measured g in work_dir; for one of the tasks.

  Raises:
    UserError: g is above 1 in a network that draws random numbers.
  """
  replicas = strategy.num_replicas_in_sync
  workers_on_replica = recipe.workers // replicas
  g = options.workers_per_pass
  if Variables.of(model).counters:
    if g not in (None, 1):
      raise UserError(
        f"workers_per_pass={g} does not work with network={recipe.network}: workers that share a "
        "pass would share its random numbers; use 1."
      )
    g = 1
  if g is None:
    g = _choose(options, strategy, model, recipe, keep)
  at_once = min(PASSES_AT_ONCE, workers_on_replica // g)
  logging.info(
    "%d worker%s per pass%s.",
    g,
    "s" if g > 1 else "",
    f", {at_once} passes at once" if at_once > 1 else "",
  )
  return dataclasses.replace(options, workers_per_pass=g)


def _choose(
  options: RunOptions,
  strategy: tf.distribute.Strategy,
  model: keras.Model,
  recipe: Recipe,
  keep: bool,
) -> int:
  """Returns the g that was kept or is measured now, the smallest of all tasks'.

  On a CPU it is 1: one worker keeps the cores busy, and its activations are the more likely to fit
  the caches (docs/benchmarks.md). In float16 too: sums over more images overflow sooner, and which
  steps are skipped for that must not depend on a device.
  """
  replicas = strategy.num_replicas_in_sync
  workers_on_replica = recipe.workers // replicas
  path = os.path.join(options.work_dir, _FILE)
  g, kept, conditions = 1, None, None
  if recipe.dtype != "float16" and tf.config.get_visible_devices("GPU"):
    conditions = _conditions(options, workers_on_replica)
    kept = _read(path, conditions) if options.work_dir else None
    g = kept or measure_workers_per_pass(model, recipe, options, workers_on_replica)
  if replicas > 1:
    g = int(min(gather(strategy, g)))
  if keep and conditions and g != kept:
    _write(path, conditions, g)
  return g


def measure_workers_per_pass(
  model: keras.Model, recipe: Recipe, options: RunOptions, workers_on_replica: int
) -> int:
  """Measures which g takes a replica's workers through the network fastest on this GPU.

  Doubles g, on images of zeros, for as long as that is faster, fits into the memory and divides the
  replica's workers.
  """
  shape = (recipe.per_worker_batch_size, *model.input_shape[1:])
  values = Variables.of(model).values()
  best, best_seconds, workers_per_pass = 1, float("inf"), 1
  while workers_on_replica % workers_per_pass == 0:
    images = tf.zeros([workers_per_pass, *shape], tf.uint8)
    labels = tf.zeros([workers_per_pass, shape[0]], tf.int32)
    candidate = dataclasses.replace(options, workers_per_pass=workers_per_pass)
    sums = tf.function(make_paper_sums(model, recipe, candidate), autograph=False)
    try:
      seconds = [
        _seconds(lambda: float(sums(values, 0, (images, labels))[3][0]))  # noqa: B023
        for _ in range(4)
      ]
    except tf.errors.ResourceExhaustedError:
      break
    seconds = float(np.median(seconds[1:])) / workers_per_pass
    if seconds > 0.98 * best_seconds:
      break
    best, best_seconds = workers_per_pass, seconds
    workers_per_pass *= 2
  return best


def _conditions(options: RunOptions, workers_on_replica: int) -> dict:
  """What a run's fastest g depends on: a kept one counts only where all of these are the same."""
  gpu = tf.config.get_visible_devices("GPU")[0]
  return {
    "device": tf.config.experimental.get_device_details(gpu).get("device_name"),
    "tensorflow": tf.__version__,
    "jit_compile": uses_xla(options),
    "workers_on_replica": workers_on_replica,
  }


def _read(path: str, conditions: dict) -> int | None:
  """The g that was kept under these conditions; None if there is none, or the file is damaged."""
  with contextlib.suppress(*files.FAILURES, ValueError, TypeError, KeyError, UserError):
    stored = dict(files.read_json(path))
    g = RunOptions(workers_per_pass=stored.pop("workers_per_pass")).workers_per_pass
    check_workers_per_pass(g, conditions["workers_on_replica"])
    if stored == conditions:
      return g
  return None


def _write(path: str, conditions: dict, g: int) -> None:
  try:
    files.write_json(path, {"workers_per_pass": g, **conditions})
  except files.FAILURES as error:  # The next start measures again.
    logging.warning("Cannot write %s (%s).", path, summary(error))


def _seconds(function: Callable) -> float:
  began = time.perf_counter()
  function()
  return time.perf_counter() - began
