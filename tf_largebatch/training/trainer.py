"""A run, stage by stage: 1 resolve, 2 open the data, 3 build, 4 restore, 5 loop, 6 finish."""

import contextlib
import dataclasses
import functools
import os
import tempfile
from typing import Any

import tensorflow as tf
from absl import logging

from tf_largebatch.data import sources
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.distributed.collectives import make_task_gather, meet, require_agreement
from tf_largebatch.distributed.lost_tasks import report_lost_tasks
from tf_largebatch.distributed.strategy import describe, make_strategy
from tf_largebatch.errors import UserError
from tf_largebatch.foreign_settings import keras_defaults
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest
from tf_largebatch.training import (
  batches,
  building,
  environment,
  reporting,
  step,
  trainjob_status,
  work_directory,
)
from tf_largebatch.training.agreement import restore_newest_of_all
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.checkpoint import Checkpoints, Manifest
from tf_largebatch.training.curvature import make_curvature
from tf_largebatch.training.evaluation import make_evaluation
from tf_largebatch.training.finishing import finish
from tf_largebatch.training.loop import Loop
from tf_largebatch.training.metrics import MetricsWriter
from tf_largebatch.training.noise_scale import NoiseScale
from tf_largebatch.training.resolution import resolve_run
from tf_largebatch.training.workers_per_pass import check_workers_per_pass, with_workers_per_pass


@keras_defaults()
def train_and_evaluate(
  recipe: Recipe,
  options: RunOptions,
  cluster: Cluster | None = None,
  stop: StopRequest | None = None,
) -> dict:
  """Trains by the recipe, or continues, and leaves the run in its work directory.

  Args:
    recipe: the data set and the cluster choose the fields that are None (workers: the run that is
      continued, if there is one).
    options: where and how the run goes; work_dir must be set, the same for all tasks.
    cluster: the tasks, which decide where the workers run, not what they compute; None: one task.
    stop: on request, the run saves after a step and raises InterruptedRunError.

  Returns:
    What `result.json` holds: status, steps, val_error, val_error_median_last_5 (fractions),
    images_per_second, seconds, weights_sha256.

  Raises:
    UserError: recipe, data and work directory do not fit, or training diverged; one line.
    InterruptedRunError: the run was asked to stop or lost a task; it can be continued.
  """
  cluster, stop = cluster or Cluster(), stop or StopRequest()
  if not options.work_dir:
    raise UserError("No work_dir was given; name a directory for what the run leaves.")
  environment.require_clock()
  if options.deterministic:
    tf.config.experimental.enable_op_determinism()
  loop = None
  with contextlib.ExitStack() as stack:
    stack.enter_context(report_lost_tasks(cluster, lambda: loop and loop.done))
    # First of all: TensorFlow accepts no cluster after its first operation.
    strategy = make_strategy(
      cluster,
      options.communication,
      options.cluster_timeout_minutes,
      options.heartbeat_timeout_seconds,
    )
    recipe, data, result = resolve_run(recipe, options, cluster, strategy)
    if result is not None:
      logging.info("The run in %s is complete; nothing is left to do.", options.work_dir)
      return result
    run = _open(recipe, options, cluster, strategy, data)
    stack.enter_context(_work_directory(run))
    networks = building.build(strategy, recipe, run.source, step.uses_xla(options))
    checkpoints, restored = _restore(run, networks)
    stack.callback(checkpoints.wait)
    evaluated = _evaluated_epochs(run, restored)
    metrics = stack.enter_context(_metrics(run, restored, evaluated))
    loop = _make_loop(run, networks, checkpoints, metrics, restored, stop)
    with stop.deferring_signals():
      complete = loop.run_epochs(evaluated + 1)
      meet(strategy)  # Wait until the chief has saved and all tasks have left the last step.
      if not complete:
        raise loop.interruption()
    return finish(loop, run.source.num_classes, cluster.is_chief)


@dataclasses.dataclass(frozen=True)
class _Run:
  """What a run works on: all that is fixed before the network is built.

  Attributes:
    recipe: resolved.
    options, cluster, strategy: where and how the run goes.
    source, validation: of the training and of the validation examples.
    facts: identity of the data, derived values, versions and cluster, for `recipe.json`.
  """

  recipe: Recipe
  options: RunOptions
  cluster: Cluster
  strategy: tf.distribute.Strategy
  source: Any
  validation: Any
  facts: dict


def _open(recipe: Recipe, options: RunOptions, cluster: Cluster, strategy, data: dict) -> _Run:
  """Opens the data and derives the run's numbers."""
  source, validation = (
    sources.open_source(
      recipe.dataset,
      split,
      options.data_dir,
      recipe.image_size,
      index_dir=None if options.index_dir.startswith("~") else options.index_dir,
      cache=options.cache,
    )
    for split in (recipe.train_split, recipe.validation_split)
  )
  data = _with_fingerprints(data, source, validation, options.work_dir, cluster, strategy)
  derived = recipe.derived(source.num_examples, strategy.num_replicas_in_sync)
  check_workers_per_pass(options.workers_per_pass or 1, derived["workers_per_replica"])
  facts = {
    "data": data,
    "derived": derived,
    "versions": environment.versions(),
    "cluster": describe(strategy, cluster, options.communication),
  }
  return _Run(recipe, options, cluster, strategy, source, validation, facts)


def _with_fingerprints(
  data: dict, source, validation, work_dir: str, cluster: Cluster, strategy
) -> dict:
  """Adds the fingerprints of the examples to the identity of the data.

  Raises:
    UserError: the tasks' examples differ, or those that the run in work_dir began with.
  """
  fingerprints = {"train": source.fingerprint, "validation": validation.fingerprint}
  stored = work_directory.stored_fingerprints(work_dir, data)
  if cluster.num_tasks > 1:
    facts = (fingerprints, stored)
    require_agreement(strategy, facts, "their data differ; copy them from one task to the others")
  advice = "choose another work_dir, or the data that the run began with"
  work_directory.require_same_examples(work_dir, stored, fingerprints, advice)
  return data | {"fingerprints": fingerprints} if source.fingerprint else data


@contextlib.contextmanager
def _work_directory(run: _Run):
  """Holds the work directory for this run, and logs what the run will do."""
  work_directory.make_writable(run.options.work_dir)
  with contextlib.ExitStack() as stack:
    if run.cluster.is_chief:
      stack.enter_context(work_directory.locked(run.options.work_dir))
    examples = run.validation.num_examples
    reporting.log_arithmetic(run.recipe, run.facts["derived"], examples, run.facts["cluster"])
    if "CPU:0" in run.facts["cluster"]["devices_per_task"]:
      environment.warn_of_slow_dtype(run.recipe.dtype)
    yield


def _restore(run: _Run, networks: building.Networks) -> tuple[Checkpoints, Manifest | None]:
  """Restores the newest checkpoint, the same on all tasks."""
  work_dir, total_steps = run.options.work_dir, run.facts["derived"]["total_steps"]
  checkpoints = Checkpoints(
    os.path.join(work_dir, "checkpoints"),
    networks.model,
    networks.optimizer,
    networks.loss_scale,
    saves=run.cluster.is_chief,
  )
  if run.cluster.num_tasks > 1:
    gather = make_task_gather(run.strategy, run.cluster.num_tasks)
    restored = restore_newest_of_all(checkpoints, gather)
  else:
    restored = checkpoints.restore_newest()
  done = restored.step if restored else 0
  if done > total_steps:
    raise UserError(
      f"work_dir={work_dir} has a checkpoint of step {done}, past the {total_steps} of this run: "
      "it belongs to another run; choose another work_dir."
    )
  begins = "Continuing from" if restored else "Beginning at"
  logging.info("%s step %d of %d.", begins, done, total_steps)
  return checkpoints, restored


def _evaluated_epochs(run: _Run, restored: Manifest | None) -> int:
  """Epochs that were trained and evaluated in earlier sessions."""
  if restored is None:
    return 0
  epochs, rest = divmod(restored.step, run.facts["derived"]["steps_per_epoch"])
  # Without an error, the run was cut off between the epoch's last step and its evaluation's end.
  return epochs - (rest == 0 and restored.validation_error is None)


@contextlib.contextmanager
def _metrics(run: _Run, restored: Manifest | None, evaluated_epochs: int):
  """Opens the metrics and writes the recipe, once nothing else can be wrong with the directory."""
  kept = contextlib.nullcontext(run.options.work_dir)
  is_chief, total_steps = run.cluster.is_chief, run.facts["derived"]["total_steps"]
  # Only the chief's metrics are kept and reported.
  with (
    kept if is_chief else tempfile.TemporaryDirectory() as directory,
    trainjob_status.reporting(os.environ if is_chief else {}, total_steps) as report,
  ):
    writer = MetricsWriter(
      directory,
      run.recipe.to_dict() | run.facts["derived"],
      restored.step if restored else 0,
      total_steps,
      evaluated_step=evaluated_epochs * run.facts["derived"]["steps_per_epoch"],
      report=report,
    )
    if is_chief:
      work_directory.write_recipe(run.recipe, run.options, run.facts)
    with writer:
      yield writer


def _make_loop(
  run: _Run,
  networks: building.Networks,
  checkpoints: Checkpoints,
  metrics: MetricsWriter,
  restored: Manifest | None,
  stop: StopRequest,
) -> Loop:
  """Builds the training step, its batches and the evaluation."""
  recipe, cluster, strategy = run.recipe, run.cluster, run.strategy
  options = with_workers_per_pass(
    run.options, strategy, networks.model, recipe, keep=cluster.is_chief
  )
  done, seconds = (restored.step, restored.seconds) if restored else (0, 0.0)
  bad = None
  if options.bad_examples == "skip":
    bad = BadExamples(options.work_dir, cluster.task_index, len(recipe.channel_mean))
  check_error = functools.partial(
    reporting.warn_of_guessing, run.source.num_classes, run.validation.num_examples
  )
  restore_recipe = functools.partial(
    work_directory.restore_recipe, run.recipe, run.options, run.facts
  )
  return Loop(
    recipe=recipe,
    options=options,
    steps_per_epoch=run.facts["derived"]["steps_per_epoch"],
    train_step=step.make_train_step(
      strategy,
      networks.model,
      networks.optimizer,
      recipe,
      options,
      networks.loss_scale,
      run.source.num_examples,
    ),
    batches=batches.train_batches(strategy, cluster, recipe, run.source, done, bad),
    evaluate=make_evaluation(
      strategy,
      networks.evaluated,
      recipe,
      run.validation,
      options.evaluation_batch_size,
      bad,
      stop,
    ),
    check_error=check_error if cluster.is_chief else lambda error, epoch: None,
    before_saving=restore_recipe if cluster.is_chief else lambda: None,
    networks=networks,
    checkpoints=checkpoints,
    metrics=metrics,
    bad=bad,
    stop=stop,
    noise=NoiseScale(recipe, metrics.records),
    curvature=make_curvature(strategy, networks.model, networks.precise, recipe, options),
    alone=cluster.num_tasks == 1,
    done=done,
    seconds=seconds,
  )
