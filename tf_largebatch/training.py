"""A run: resolve the recipe, build, restore, then epochs of steps, evaluations and checkpoints."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
import time
import zlib

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch import checkpoint, input_pipeline, preparation, resnet, sources, step
from tf_largebatch.bad_examples import BadExamples
from tf_largebatch.cluster import Cluster, describe, make_strategy
from tf_largebatch.errors import UserError
from tf_largebatch.metrics import MetricsWriter
from tf_largebatch.normalization import PerWorkerBatchNormalization
from tf_largebatch.optimizer import MomentumCorrectedSGD
from tf_largebatch.recipe import Recipe
from tf_largebatch.schedule import LinearScalingSchedule

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float64": "float64"}


def train_and_evaluate(
  recipe: Recipe,
  *,
  data_dir: str,
  work_dir: str,
  cluster: Cluster | None = None,
  communication: str = "auto",
  log_every_steps: int = 10,
  evaluation_batch_size: int = 128,
  index_dir: str | None = None,
  cache: bool = False,
  bad_examples: str = "fail",
  run_flags: str = "",
) -> dict:
  """Trains by the recipe, or continues, and leaves the run in its work directory.

  Args:
    recipe: fields that are None are chosen by the data set and the cluster.
    data_dir: TensorFlow Datasets' data directory.
    work_dir: where the run leaves everything; the same for all tasks.
    cluster: the tasks, which decide where the workers run, not what they compute; None: one task.
    communication: "auto", "nccl" or "ring", see `cluster.make_strategy`.
    log_every_steps: steps between two train records (loss and error are means over them).
    evaluation_batch_size: images a replica evaluates at once.
    index_dir, cache: see `sources.open_source`.
    bad_examples: "fail", or "skip": an example that cannot be read is left out, of which the
      metrics and `bad_examples.jsonl` tell (see `input_pipeline.train_dataset`).
    run_flags: the flags beside the recipe's, for `flags.txt`.

  Returns:
    On the chief, what `result.json` holds: status, steps, val_error, val_error_median_last_5
    (fractions), images_per_second, seconds, weights_sha256.

  Raises:
    UserError: the recipe, the data or the work directory do not fit; one line.
  """
  cluster = cluster or Cluster()
  # First of all: TensorFlow takes no cluster after its first operation.
  strategy = make_strategy(cluster, communication)
  if recipe.dataset != "synthetic":
    preparation.prepare(recipe.dataset, data_dir)
  replicas = strategy.num_replicas_in_sync
  recipe = resolve(recipe, replicas, data_dir)
  result = find_run(work_dir, recipe)
  if cluster.num_tasks > 1:
    facts = (recipe, evaluation_batch_size, log_every_steps, bad_examples, result is None)
    _require_agreement(
      strategy, facts, "the flags, the data or the work_dir differ; it must be one that all see"
    )
  if result is not None:
    logging.info("The run in %s is complete; nothing is left to do.", work_dir)
    return result

  source, validation = (
    sources.open_source(
      recipe.dataset, split, data_dir, recipe.image_size, index_dir=index_dir, cache=cache
    )
    for split in (recipe.train_split, recipe.validation_split)
  )
  derived = derive(recipe, source.num_examples, replicas)
  environment = {"versions": versions(), "cluster": describe(strategy, cluster, communication)}
  _make_writable(work_dir)
  _log_arithmetic(recipe, derived, source, validation, environment["cluster"])
  if recipe.dtype == "bfloat16" and "CPU:0" in environment["cluster"]["devices_per_task"]:
    _warn_of_slow_bfloat16()
  if cluster.is_chief:
    facts = {"recipe": recipe.to_dict(), "derived": derived, **environment}
    _write_json(os.path.join(work_dir, "recipe.json"), facts)
    _write_text(os.path.join(work_dir, "flags.txt"), recipe.to_flagfile() + run_flags)

  with strategy.scope():
    model = build_model(recipe, source.num_classes)
    evaluated_model = build_model(recipe, source.num_classes, "evaluation")
    optimizer = build_optimizer(recipe, source.num_examples)
    optimizer.build(model.trainable_variables)
  checkpoints = os.path.join(work_dir, "checkpoints")
  done, seconds = checkpoint.restore_newest(checkpoints, model, optimizer)
  if cluster.num_tasks > 1:
    facts = (done, source.num_examples, validation.num_examples)
    _require_agreement(strategy, facts, f"this one restored step {done} from {work_dir}")
  if done:
    logging.info("Continuing from step %d of %d.", done, derived["total_steps"])

  bad = BadExamples(work_dir, cluster.task_index) if bad_examples == "skip" else None
  train_batches = _train_batches(strategy, cluster, recipe, source, done, bad)
  train_step = step.make_train_step(strategy, model, optimizer, recipe)
  evaluate = make_evaluation(
    strategy, evaluated_model, recipe, validation, evaluation_batch_size, bad
  )
  steps_per_epoch = derived["steps_per_epoch"]

  # Only the chief's metrics last; the other tasks write theirs where nobody looks.
  with tempfile.TemporaryDirectory() as elsewhere:
    metrics_dir = work_dir if cluster.is_chief else elsewhere
    shown = recipe.to_dict() | derived
    with MetricsWriter(metrics_dir, shown, done, derived["total_steps"]) as metrics:
      for epoch in range(done // steps_per_epoch, recipe.epochs):
        last = (epoch + 1) * steps_per_epoch
        seconds += _train_epoch(
          train_step,
          train_batches,
          metrics,
          recipe,
          done,
          last,
          steps_per_epoch,
          log_every_steps,
          bad,
        )
        done = last
        evaluated_model.set_weights(model.get_weights())
        scalars = evaluate()
        _require_finite(scalars["loss"], "validation loss", done, recipe)
        if bad is not None:
          scalars["bad_examples"] = bad.write()
        metrics.evaluation(done, epoch + 1, scalars)
        if cluster.is_chief:
          checkpoint.save(checkpoints, done, seconds, model, optimizer)
      errors = [record["error"] for record in metrics.evaluations]

  result = {
    "status": "complete",
    "steps": done,
    "val_error": errors[-1] if errors else None,  # None where metrics.jsonl was lost.
    "val_error_median_last_5": statistics.median(errors[-5:]) if errors else None,
    "images_per_second": done * recipe.global_batch_size / seconds if seconds else None,
    "seconds": seconds,
    "weights_sha256": weights_sha256(model),
  }
  logging.info("weights_sha256 %s", result["weights_sha256"])
  if cluster.is_chief:
    _export(model, recipe, source.num_classes, os.path.join(work_dir, "model.keras"))
    # Last, for it says that the run is complete.
    _write_json(os.path.join(work_dir, "result.json"), result)
  return result


def resolve(recipe: Recipe, replicas: int, data_dir: str) -> Recipe:
  """Chooses the fields that are None, and checks that the replicas divide the workers.

  Raises:
    UserError: they do not; the message names the values that would do.
  """
  chosen = {}
  workers = recipe.workers
  if workers is None:
    workers = chosen["workers"] = replicas
  if workers % replicas:
    below = workers // replicas * replicas
    values = [str(value) for value in (below, below + replicas) if value]
    raise UserError(
      f"workers={workers} cannot be shared out among {replicas} replicas; a multiple of "
      f"{replicas} would do, such as {' or '.join(values)}."
    )
  known = sources.defaults(recipe.dataset, data_dir, recipe.validation_split)
  shape = known.image_shape
  small = shape is not None and shape[0] == shape[1] <= 64
  if recipe.image_size is None:
    chosen["image_size"] = shape[0] if small else 224
  if recipe.augmentation is None:
    chosen["augmentation"] = "pad_crop" if small else "area_crop"
  for name in ("validation_split", "channel_mean", "channel_std"):
    if getattr(recipe, name) is None:
      chosen[name] = getattr(known, name)
  for name in ("channel_mean", "channel_std"):
    given = chosen.get(name) or getattr(recipe, name)
    if len(given) != len(known.channel_mean):
      raise UserError(
        f"{name}={','.join(map(str, given))} has {len(given)} values, but the images of "
        f"{recipe.dataset} have {len(known.channel_mean)} channels."
      )
  return dataclasses.replace(recipe, **chosen)


def derive(recipe: Recipe, train_examples: int, replicas: int) -> dict:
  """What follows from a resolved recipe, its training split and the number of replicas."""
  return {
    "train_examples": train_examples,
    "global_batch_size": recipe.global_batch_size,
    "peak_learning_rate": recipe.peak_learning_rate,
    "steps_per_epoch": recipe.steps_per_epoch(train_examples),
    "total_steps": recipe.total_steps(train_examples),
    "workers_per_replica": recipe.workers // replicas,
  }


def build_model(recipe: Recipe, num_classes: int, purpose: str = "training") -> keras.Model:
  """The recipe's network, with the same weights in the same order for each purpose.

  Args:
    recipe: resolved.
    num_classes: width of the logits.
    purpose: "training"; "evaluation", which computes in the weights' dtype whatever the training's;
      or "export": as for evaluation, of plain Keras layers.
  """
  layer = PerWorkerBatchNormalization if purpose != "export" else keras.layers.BatchNormalization
  policy = keras.dtype_policies.get(_POLICIES[recipe.dtype])
  return resnet.build(
    recipe.network,
    input_shape=(recipe.image_size, recipe.image_size, len(recipe.channel_mean)),
    num_classes=num_classes,
    normalization=functools.partial(
      layer, momentum=recipe.batch_norm_momentum, epsilon=recipe.batch_norm_epsilon
    ),
    channel_mean=recipe.channel_mean,
    channel_std=recipe.channel_std,
    last_gamma=recipe.last_gamma,
    dtype=policy.name if purpose == "training" else policy.variable_dtype,
    seed=recipe.seed,
  )


def build_optimizer(recipe: Recipe, train_examples: int) -> MomentumCorrectedSGD:
  """The recipe's optimizer with its schedule."""
  schedule = LinearScalingSchedule(
    steps_per_epoch=recipe.steps_per_epoch(train_examples),
    global_batch_size=recipe.global_batch_size,
    reference_learning_rate=recipe.reference_learning_rate,
    reference_batch_size=recipe.reference_batch_size,
    scaling=recipe.learning_rate_scaling,
    warmup=recipe.warmup,
    warmup_epochs=recipe.warmup_epochs,
    decay_epochs=recipe.decay_epochs,
    decay_factor=recipe.decay_factor,
  )
  return MomentumCorrectedSGD(
    schedule,
    momentum=recipe.momentum,
    nesterov=recipe.nesterov,
    momentum_correction=recipe.momentum_correction,
    weight_decay=recipe.weight_decay,
  )


def distribute_train_dataset(
  strategy, recipe: Recipe, source, first_step: int, on_bad_example=None
):
  """Each replica's own workers' batches, from a step on (see `input_pipeline.train_dataset`)."""

  def dataset(context):
    workers_per_task = recipe.workers // context.num_input_pipelines
    return input_pipeline.train_dataset(
      recipe,
      source,
      first_worker=context.input_pipeline_id * workers_per_task,
      num_workers=workers_per_task,
      workers_per_replica=recipe.workers // context.num_replicas_in_sync,
      first_step=first_step,
      on_bad_example=on_bad_example,
    )

  return _on_devices(strategy, dataset)


def _on_devices(strategy, dataset):
  """The replicas' batches, each sent to its device before it is asked for."""
  distributed = strategy.distribute_datasets_from_function(dataset)
  if strategy.num_replicas_in_sync == 1 and tf.config.get_visible_devices("GPU"):
    # What strategies of several replicas do by themselves.
    distributed = distributed.apply(tf.data.experimental.prefetch_to_device("/gpu:0"))
  return distributed


def _train_batches(strategy, cluster: Cluster, recipe: Recipe, source, first_step: int, bad):
  """Iterates over the steps' batches, or says which example is to blame that it cannot."""
  workers = recipe.workers // cluster.num_tasks

  def ids(number):
    own = range(cluster.task_index * workers, (cluster.task_index + 1) * workers)
    return (
      index
      for worker in own
      for index in input_pipeline.example_ids(recipe, source.num_examples, number, worker)
    )

  on_bad = None if bad is None else functools.partial(bad.tell, recipe.train_split, source)
  batches = iter(distribute_train_dataset(strategy, recipe, source, first_step, on_bad))
  for number in itertools.count(first_step):
    yield _next(batches, recipe.train_split, source, ids(number))


def _next(batches, split: str, source, ids):
  """The next batch; where it fails, the first of its examples (`ids`) with a fault is told."""
  try:
    return next(batches)
  except sources.FAULTS as error:
    found = next(filter(None, (sources.fault(source, int(index)) for index in ids)), None)
    if found is None:
      raise UserError(
        f"Reading {split} failed ({_first_line(error)}), but all of its examples read well now; "
        "run again to continue."
      ) from error
    raise UserError(
      f"{split} cannot be read: {found}. Prepare the data again, or leave such examples out by "
      "--bad_examples=skip."
    ) from error


def _train_epoch(
  train_step, batches, metrics, recipe, done, last, steps_per_epoch, log_every_steps, bad
) -> float:
  """Steps `done` to `last`, recorded every `log_every_steps` and at the end; the seconds taken."""
  began = since = time.perf_counter()
  waited, pending = 0.0, []
  for number in range(done + 1, last + 1):
    before = time.perf_counter()
    batch = next(batches)
    waited += time.perf_counter() - before
    pending.append(train_step(batch))
    if number % log_every_steps and number != last:
      continue
    # Fetching waits for the device, so it is done once for all the steps since the last record.
    scalars = {name: float(value) for name, value in pending[-1].items()}
    for name in ("loss", "error"):
      scalars[name] = float(np.mean([values[name].numpy() for values in pending]))
    now = time.perf_counter()
    scalars["images_per_second"] = len(pending) * recipe.global_batch_size / (now - since)
    scalars["input_wait_share"] = waited / (now - since)
    if bad is not None:
      scalars["bad_examples"] = bad.write()
    _require_finite(scalars["loss"], "loss", number, recipe)
    metrics.train(number, number / steps_per_epoch, scalars)
    since, waited, pending = now, 0.0, []
  return time.perf_counter() - began


def _require_finite(loss: float, name: str, step_number: int, recipe: Recipe):
  if not math.isfinite(loss):
    raise UserError(
      f"The {name} is {loss} after step {step_number} (peak rate {recipe.peak_learning_rate:g}, kn "
      f"{recipe.global_batch_size}): training diverged; a longer warmup or a lower "
      "reference_learning_rate would do."
    )


def make_evaluation(
  strategy, model, recipe: Recipe, source, batch_size: int, bad: BadExamples | None = None
):
  """A function that evaluates `model` on every example of `source`: {"loss", "error"}."""
  replicas = strategy.num_replicas_in_sync
  steps = input_pipeline.evaluation_steps(source, batch_size, replicas)

  def dataset(context):
    local = replicas // context.num_input_pipelines
    return input_pipeline.evaluation_dataset(
      recipe,
      source,
      batch_size=batch_size,
      first_replica=context.input_pipeline_id * local,
      num_replicas=local,
      replicas=replicas,
      on_bad_example=on_bad,
    )

  def ids(number):
    """Of all replicas, as which of them are this task's is not known here."""
    first = number * replicas * batch_size
    return range(first, min(first + replicas * batch_size, source.num_examples))

  on_bad = None if bad is None else functools.partial(bad.tell, recipe.validation_split, source)
  evaluation_step = step.make_evaluation_step(strategy, model)
  distributed = _on_devices(strategy, dataset)

  def evaluate() -> dict[str, float]:
    batches = iter(distributed)
    sums = [
      evaluation_step(_next(batches, recipe.validation_split, source, ids(number)))
      for number in range(steps)
    ]
    loss, errors, count, unreadable = (sum(float(values[i]) for values in sums) for i in range(4))
    if count + unreadable != source.num_examples:
      raise AssertionError(f"Evaluated {count + unreadable:g} examples of {source.num_examples}.")
    return {"loss": loss / count, "error": errors / count}

  return evaluate


def find_run(work_dir: str, recipe: Recipe) -> dict | None:
  """The result of the run in the work directory, or None where it is not complete or not begun.

  Raises:
    UserError: the directory holds another recipe's run.
  """
  path = os.path.join(work_dir, "recipe.json")
  if not tf.io.gfile.exists(path):
    return None
  try:
    there = _read_json(path)["recipe"].items()
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is no recipe of a run ({_first_line(error)}); choose another work_dir."
    ) from error
  there, now = dict(there), recipe.to_dict()
  differences = [
    f"{name} is {there.get(name)} there and {now.get(name)} now"
    for name in sorted(there.keys() | now.keys())
    if there.get(name) != now.get(name)
  ]
  if differences:
    raise UserError(
      f"work_dir={work_dir} holds another recipe's run ({'; '.join(differences)}); choose another "
      "work_dir, or that recipe to continue it."
    )
  path = os.path.join(work_dir, "result.json")
  if not tf.io.gfile.exists(path):
    return None
  try:
    return dict(_read_json(path))
  except (ValueError, TypeError) as error:
    raise UserError(
      f"{path} is no result of a run ({_first_line(error)}); remove it to continue the run."
    ) from error


def _make_writable(work_dir: str):
  """Makes the directory if it is missing, and checks that it can be written."""
  try:
    tf.io.gfile.makedirs(work_dir)
    probe = os.path.join(work_dir, f".probe-{os.getpid()}")
    _write_text(probe, "")
    tf.io.gfile.remove(probe)
  except (OSError, tf.errors.OpError) as error:
    raise UserError(
      f"work_dir={work_dir} cannot be written ({_first_line(error)}); name a directory that can."
    ) from error


def _require_agreement(strategy, facts: tuple, otherwise: str):
  """All tasks must have come to the same facts, or they would wait for each other for ever."""
  digest = zlib.crc32(repr(facts).encode())

  @tf.function
  def gather():
    def replica():
      context = tf.distribute.get_replica_context()
      index, count = context.replica_id_in_sync_group, strategy.num_replicas_in_sync
      # Exact: each place of the sum is one digest and zeros.
      mine = tf.one_hot(index, count, tf.constant(digest, tf.float64), dtype=tf.float64)
      return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

    return strategy.run(replica)

  found = strategy.experimental_local_results(gather())[0].numpy()
  if len(set(found)) > 1:
    raise UserError(f"The tasks do not agree: {otherwise}.")


def weights_sha256(model: keras.Model) -> str:
  """SHA-256 over all weights in `model.weights` order as float32 little-endian bytes."""
  digest = hashlib.sha256()
  for weight in model.weights:
    digest.update(weight.numpy().astype("<f4").tobytes())
  return digest.hexdigest()


def _export(model: keras.Model, recipe: Recipe, num_classes: int, path: str):
  """Saves the network of plain Keras layers, made outside the strategy's scope."""
  plain = build_model(recipe, num_classes, "export")
  plain.set_weights(model.get_weights())
  with tempfile.TemporaryDirectory() as directory:
    local = os.path.join(directory, "model.keras")
    plain.save(local)
    tf.io.gfile.copy(local, f"{path}.partial", overwrite=True)
  tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)


def _log_arithmetic(recipe: Recipe, derived: dict, source, validation, cluster: dict):
  warmup = f"{recipe.warmup} for {recipe.warmup_epochs:g} epochs" if recipe.warms_up else "none"
  for line in (
    f"{recipe.network} on {recipe.dataset}: {source.num_examples} training images, "
    f"{validation.num_examples} to validate on, {recipe.image_size}x{recipe.image_size}, "
    f"{recipe.dtype}",
    f"minibatch kn = {recipe.workers} workers x {recipe.per_worker_batch_size} images = "
    f"{recipe.global_batch_size}",
    f"peak rate = {recipe.reference_learning_rate:g} -> {recipe.peak_learning_rate:g} "
    f"({recipe.learning_rate_scaling} scaling from {recipe.reference_batch_size}); warmup: "
    f"{warmup}; x{recipe.decay_factor:g} at epochs "
    f"{', '.join(f'{epoch:g}' for epoch in recipe.decay_epochs) or 'none'}",
    f"steps = {recipe.epochs} epochs x {derived['steps_per_epoch']} = {derived['total_steps']}",
    f"{derived['workers_per_replica']} workers a replica; "
    + ", ".join(f"{name} {value}" for name, value in cluster.items()),
  ):
    logging.info("%s", line)


def _warn_of_slow_bfloat16(cpuinfo: str = "/proc/cpuinfo"):
  """Says so where the CPU must emulate bfloat16, as far as Linux tells."""
  if not os.path.exists(cpuinfo):
    return
  with open(cpuinfo) as file:
    features = file.read().split()
  if not {"avx512_bf16", "amx_bf16", "bf16"} & set(features):
    logging.warning(
      "This CPU has no bfloat16 instructions, which makes dtype=bfloat16 many times slower than "
      "dtype=float32 (another recipe, in another work_dir)."
    )


def versions() -> dict[str, str]:
  """Of what decides a run beside its recipe, by package."""
  packages = ("tensorflow", "keras", "tensorflow-datasets", "numpy")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"python": platform.python_version(), **found}


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


def _read_json(path: str):
  with tf.io.gfile.GFile(path) as file:
    return json.loads(file.read())


def _write_json(path: str, value):
  _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: str, text: str):
  with tf.io.gfile.GFile(f"{path}.partial", "w") as file:
    file.write(text)
  tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)
