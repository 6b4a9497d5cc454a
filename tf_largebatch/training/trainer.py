"""A run: resolve the recipe, build, restore, then epochs of steps, evaluations and checkpoints."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import math
import os
import platform
import shutil
import signal
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch import files
from tf_largebatch.data import input_pipeline, preparation, sources
from tf_largebatch.distributed.cluster import Cluster, describe, make_strategy, telling_lost_tasks
from tf_largebatch.errors import LOST_TASK, InterruptedRunError, UserError, first_line
from tf_largebatch.models import resnet
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.optim.schedule import LinearScalingSchedule
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest
from tf_largebatch.training import step
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.checkpoint import Checkpoints
from tf_largebatch.training.metrics import MetricsWriter

# What a run writes over in its work directory.
_WRITTEN = ("flags.txt", "metrics.jsonl", "model.keras", "result.json", "checkpoints")
_REMEDIES = (
  "A gradual warmup (--warmup), a longer one (--warmup_epochs), a lower "
  "--reference_learning_rate or a smaller minibatch would do, in another work_dir."
)
# What Linux calls the instructions for them, on x86 and ARM.
_CPU_FEATURES = {
  "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
  "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
_POLICIES = {
  "float32": "float32",
  "bfloat16": "mixed_bfloat16",
  "float16": "mixed_float16",
  "float64": "float64",
}


@dataclasses.dataclass
class Run:
  """What the steps of a run use, and how far it has come.

  Attributes:
    done: steps done.
    seconds: time trained, of earlier sittings too; evaluation is not counted.
    asked: whether the last step that was looked at told of a request to stop.
  """

  recipe: Recipe
  steps_per_epoch: int
  train_step: Callable
  batches: Iterator
  stop: StopRequest
  alone: bool
  log_every_steps: int
  checkpoint_every_steps: int
  checkpoint_every_minutes: float
  bad: BadExamples | None
  checkpoints: Checkpoints | None = None
  metrics: MetricsWriter | None = None
  done: int = 0
  seconds: float = 0.0
  asked: bool = False


def train_and_evaluate(
  recipe: Recipe,
  *,
  data_dir: str,
  work_dir: str,
  cluster: Cluster | None = None,
  communication: str = "auto",
  cluster_timeout_minutes: float = 10.0,
  log_every_steps: int = 10,
  evaluation_batch_size: int = 128,
  checkpoint_every_steps: int = 0,
  checkpoint_every_minutes: float = 10.0,
  deterministic: bool = False,
  index_dir: str | None = None,
  cache: bool = False,
  bad_examples: str = "fail",
  step_options: step.StepOptions = step.StepOptions(),  # noqa: B008 (it is frozen)
  run_flags: str = "",
  stop: StopRequest | None = None,
) -> dict:
  """Trains by the recipe, or continues, and leaves the run in its work directory.

  Args:
    recipe: fields that are None are chosen by the data set and the cluster (workers: by the run
      that is continued, if there is one).
    data_dir: TensorFlow Datasets' data directory.
    work_dir: where the run leaves everything; the same for all tasks.
    cluster: the tasks, which decide where the workers run, not what they compute; None: one task.
    communication: "auto", "nccl" or "ring", see `cluster.make_strategy`.
    cluster_timeout_minutes: how long the tasks may take to come up.
    log_every_steps: steps between two train records (loss and error are means over them).
    evaluation_batch_size: images a replica evaluates at once.
    checkpoint_every_steps, checkpoint_every_minutes: between two checkpoints within an epoch; 0:
      none. There is one at each epoch's end anyway.
    deterministic: use TensorFlow's deterministic kernels, slower on GPUs, where a run's bytes
      otherwise differ from one run to the next.
    index_dir, cache: see `sources.open_source`.
    bad_examples: "fail", or "skip": an example that cannot be read is left out, of which the
      metrics and `bad_examples.jsonl` tell (see `input_pipeline.train_dataset`).
    step_options: how a step is computed.
    run_flags: the flags beside the recipe's, for `flags.txt`.
    stop: asked, the run saves at a step's end and raises InterruptedRunError.

  Returns:
    On the chief, what `result.json` holds: status, steps, val_error, val_error_median_last_5
    (fractions), images_per_second, seconds, weights_sha256.

  Raises:
    UserError: the recipe, the data or the work directory do not fit, or training diverged; one
      line.
    InterruptedRunError: the run was asked to stop or lost a task; it can be continued.
  """
  cluster, stop = cluster or Cluster(), stop or StopRequest()
  if deterministic:
    tf.config.experimental.enable_op_determinism()
  run = None
  with contextlib.ExitStack() as held:
    held.enter_context(telling_lost_tasks(cluster, lambda: run and run.done))
    # First of all: TensorFlow takes no cluster after its first operation.
    strategy = make_strategy(cluster, communication, cluster_timeout_minutes)
    if recipe.dataset != "synthetic":
      preparation.prepare(recipe.dataset, data_dir)
    replicas = strategy.num_replicas_in_sync
    recipe = resolve(_with_workers_of_the_run(recipe, work_dir), replicas, data_dir)
    data = sources.identify(recipe.dataset, recipe.train_split, recipe.validation_split, data_dir)
    result = find_run(work_dir, recipe, data)
    if cluster.num_tasks > 1:
      facts = (recipe, data, evaluation_batch_size, log_every_steps, bad_examples, result is None)
      facts += (step_options.allreduce_dtype, step_options.bytes_per_pack)
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
    step.check_workers_per_pass(step_options.workers_per_pass or 1, derived["workers_per_replica"])
    environment = {"versions": versions(), "cluster": describe(strategy, cluster, communication)}
    _make_writable(work_dir)
    if cluster.is_chief:
      held.enter_context(_only_run_in(work_dir))
    _log_arithmetic(recipe, derived, source, validation, environment["cluster"])
    if "CPU:0" in environment["cluster"]["devices_per_task"]:
      _warn_of_slow_dtype(recipe.dtype)

    with strategy.scope():
      model = build_model(recipe, source.num_classes)
      evaluated_model = build_model(recipe, source.num_classes, "evaluation")
      optimizer = build_optimizer(recipe, source.num_examples, step_options.jit)
      optimizer.build(model.trainable_variables)
      loss_scale = LossScale() if recipe.dtype == "float16" else None
    step_options = with_workers_per_pass(step_options, strategy, model, recipe)
    directory = os.path.join(work_dir, "checkpoints")
    checkpoints = Checkpoints(directory, model, optimizer, loss_scale, saves=cluster.is_chief)
    held.callback(checkpoints.wait)
    restored = checkpoints.restore_newest()
    done = restored.step if restored else 0
    if cluster.num_tasks > 1:
      _require_agreement(strategy, restored, f"this one restored step {done} from {work_dir}")
    if done > derived["total_steps"]:
      raise UserError(
        f"work_dir={work_dir} has a checkpoint of step {done}, past the {derived['total_steps']} "
        "of this run: it is another run's; choose another work_dir."
      )
    begins = "Continuing from" if restored else "Beginning at"
    logging.info("%s step %d of %d.", begins, done, derived["total_steps"])

    bad = None
    if bad_examples == "skip":
      bad = BadExamples(work_dir, cluster.task_index, len(recipe.channel_mean))
    run = Run(
      recipe=recipe,
      steps_per_epoch=derived["steps_per_epoch"],
      train_step=step.make_train_step(strategy, model, optimizer, recipe, step_options, loss_scale),
      batches=_train_batches(strategy, cluster, recipe, source, done, bad),
      stop=stop,
      alone=cluster.num_tasks == 1,
      log_every_steps=log_every_steps,
      checkpoint_every_steps=checkpoint_every_steps,
      checkpoint_every_minutes=checkpoint_every_minutes,
      bad=bad,
      checkpoints=checkpoints,
      done=done,
      seconds=restored.seconds if restored else 0.0,
    )
    evaluate = make_evaluation(
      strategy, evaluated_model, recipe, validation, evaluation_batch_size, bad, stop
    )

    def evaluate_epoch() -> bool:
      """Whether it was evaluated to the end."""
      evaluated_model.set_weights(model.get_weights())
      scalars = evaluate()
      if scalars is None:
        return False
      if not math.isfinite(scalars["loss"]):
        # These weights are no good, although they are finite.
        raise _divergence(f"validation loss is {scalars['loss']}", run.done, run, run.done)
      if bad is not None:
        scalars["bad_examples"] = bad.write()
      epoch = run.done // run.steps_per_epoch
      run.metrics.evaluation(run.done, epoch, scalars)
      if cluster.is_chief:
        _warn_of_guessing(scalars["error"], source.num_classes, validation.num_examples, epoch)
      checkpoints.evaluated(run.done, scalars["error"])
      return True

    # Only the chief's metrics last; the other tasks write theirs where nobody looks.
    elsewhere = held.enter_context(tempfile.TemporaryDirectory())
    evaluated = done // run.steps_per_epoch
    if restored and done % run.steps_per_epoch == 0 and restored.validation_error is None:
      evaluated -= 1  # Cut off between this epoch's last step and the end of its evaluation.
    run.metrics = MetricsWriter(
      work_dir if cluster.is_chief else elsewhere,
      recipe.to_dict() | derived,
      done,
      derived["total_steps"],
      evaluated_epochs=evaluated,
    )
    if cluster.is_chief:  # Only now, that nothing is wrong with what is there.
      facts = {"recipe": recipe.to_dict(), "data": data, "derived": derived, **environment}
      with _telling_unwritable(work_dir):
        files.write_json(os.path.join(work_dir, "recipe.json"), facts)
        files.write_text(os.path.join(work_dir, "flags.txt"), recipe.to_flagfile() + run_flags)
    held.enter_context(run.metrics)
    with stop.deferring_signals():
      for epoch in range(evaluated + 1, recipe.epochs + 1):
        if train_to(run, epoch * run.steps_per_epoch):
          checkpoints.save(run.done, run.seconds)  # While it is evaluated.
          if evaluate_epoch():
            continue
        checkpoints.save(run.done, run.seconds)
        checkpoints.wait()
        _meet(strategy)  # Until the chief has saved, and all have left the last step.
        raise _interruption(run, derived["total_steps"])
      if cluster.num_tasks > 1:
        _meet(strategy)
    errors = [record["error"] for record in run.metrics.evaluations]
    result = {
      "status": "complete",
      "steps": run.done,
      "val_error": errors[-1] if errors else None,  # None where metrics.jsonl was lost.
      "val_error_median_last_5": statistics.median(errors[-5:]) if errors else None,
      "images_per_second": run.done * recipe.global_batch_size / run.seconds
      if run.seconds
      else None,
      "seconds": run.seconds,
      "weights_sha256": weights_sha256(model),
    }
    logging.info("weights_sha256 %s", result["weights_sha256"])
    if cluster.is_chief:
      checkpoints.wait()
      try:
        _export(model, recipe, source.num_classes, os.path.join(work_dir, "model.keras"))
        # Last, for it says that the run is complete.
        files.write_json(os.path.join(work_dir, "result.json"), result)
      except files.FAILURES as error:
        raise UserError(
          f"All {run.done} steps are done, but work_dir={work_dir} cannot be written "
          f"({first_line(error)}); make room there and run the same command again."
        ) from error
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
  layer = keras.layers.BatchNormalization
  if purpose != "export":
    layer = functools.partial(
      PerWorkerBatchNormalization, per_worker_batch_size=recipe.per_worker_batch_size
    )
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


def build_optimizer(
  recipe: Recipe, train_examples: int, jit_compile: bool = False
) -> MomentumCorrectedSGD:
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
    jit_compile=jit_compile,
  )


def with_workers_per_pass(
  options: step.StepOptions, strategy, model: keras.Model, recipe: Recipe
) -> step.StepOptions:
  """The options with g chosen, the same one by all tasks."""
  if options.workers_per_pass is not None:
    return options
  replicas = strategy.num_replicas_in_sync
  g = step.choose_workers_per_pass(model, recipe, options, recipe.workers // replicas)
  if replicas > 1:
    g = int(min(_gather(strategy, g)))
  logging.info("%d workers go through the network at once.", g)
  return dataclasses.replace(options, workers_per_pass=g)


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
    yield _next(batches, recipe, recipe.train_split, source, ids(number), bad is not None)


def _next(batches, recipe: Recipe, split: str, source, ids, skips: bool):
  """The next batch; where it fails, the first of its examples (`ids`) with a fault is told."""
  try:
    return next(batches)
  except sources.FAULTS as error:
    channels = len(recipe.channel_mean)
    faults = (sources.fault(source, int(index), channels) for index in ids)
    found = next(filter(None, faults), None)
    if found is None:
      raise InterruptedRunError(
        f"Reading {split} failed ({first_line(error)}), but all of its examples read well now; "
        "run again to continue.",
        LOST_TASK,
      ) from error
    rest = ", or leave such examples out by --bad_examples=skip"
    if skips:
      rest = ": too many examples behind it are bad, too, for another one to take its place"
    raise UserError(f"{split} cannot be read: {found}. Prepare the data again{rest}.") from error


def train_to(run: Run, last: int) -> bool:
  """Steps until `last` are done, or until after a task was asked to stop; whether `last` came."""
  since, saved = time.perf_counter(), time.monotonic()
  waited, losses, errors = 0.0, [], []
  previous, stops = None, False

  def fetch(number, scalars):
    """Waits for a step, and checks it; whether a task was asked to stop before it."""
    loss = float(scalars["loss"])
    if not math.isfinite(loss):
      rate = float(scalars["learning_rate"])
      raise _divergence(f"loss is {loss} (rate {rate:g})", number, run, number - 1)
    losses.append(loss)
    errors.append(float(scalars["error"]))
    return float(scalars["stop"]) > 0

  while run.done < last and not stops:
    before = time.perf_counter()
    batch = next(run.batches)
    waited += time.perf_counter() - before
    number = run.done + 1
    scalars = run.train_step(batch, tf.constant(float(run.stop.signal is not None)))
    run.done = number
    # The step before is looked at while the device works on this one, if it was not at once, for a
    # record. All tasks learn of a request from the same sum and stop after the step that follows
    # it, whenever each of them looked; one that is alone need not ask.
    if previous is not None:
      run.asked = fetch(number - 1, previous)
    stops = run.asked or (run.alone and run.stop.signal is not None)
    previous = scalars
    minutes = (time.monotonic() - saved) / 60
    save = (
      (run.checkpoint_every_steps and number % run.checkpoint_every_steps == 0)
      or (0 < run.checkpoint_every_minutes <= minutes)
    ) and not run.checkpoints.busy
    # A checkpoint is a record's end, so that a run that goes on from it records each step once.
    if not (stops or save or number == last or number % run.log_every_steps == 0):
      continue
    run.asked = fetch(number, scalars)
    previous = None
    now = time.perf_counter()
    record = {name: float(value) for name, value in scalars.items() if name != "stop"}
    if not math.isfinite(record["gradient_norm"]):
      del record["gradient_norm"]  # Of a step that the loss scale had skipped.
    record["loss"], record["error"] = float(np.mean(losses)), float(np.mean(errors))
    record["images_per_second"] = len(losses) * run.recipe.global_batch_size / (now - since)
    record["input_wait_share"] = waited / (now - since)
    if run.bad is not None:
      record["bad_examples"] = run.bad.write()
    run.metrics.train(number, number / run.steps_per_epoch, record)
    run.seconds += now - since
    if save:
      run.metrics.flush()
      run.checkpoints.save(number, run.seconds)
      saved = time.monotonic()
    since, waited, losses, errors = time.perf_counter(), 0.0, [], []
  run.metrics.flush()
  return run.done == last and not stops


def _divergence(what: str, number: int, run: Run, bad_from: int) -> UserError:
  """Of a loss after step `number` that is not finite, for the weights after `bad_from` steps."""
  run.checkpoints.discard_from(bad_from)
  newest = run.checkpoints.newest_step()
  recipe = run.recipe
  return UserError(
    f"Training diverged: the {what} at step {number}, epoch {number / run.steps_per_epoch:.2f}, "
    f"with kn = {recipe.workers} x {recipe.per_worker_batch_size} = {recipe.global_batch_size} and "
    f"a peak rate of {recipe.peak_learning_rate:g}; the last good checkpoint is "
    f"{'none' if newest is None else f'that of step {newest}'}. {_REMEDIES}"
  )


def _warn_of_guessing(error: float, num_classes: int, num_examples: int, epoch: int):
  """Says so where an evaluation's error is no better than guessing, within its noise.

  Guessing errs on p = 1 - 1/C of the examples, give or take σ = √(p (1 - p) / N). A rate that is
  too high for the network can leave it there for good, with losses that stay finite.
  """
  guessing = 1 - 1 / num_classes
  chance = 3 * math.sqrt(guessing * (1 - guessing) / num_examples)
  if error >= guessing - chance:
    logging.warning(
      "Epoch %d ends with a validation error of %.2f%%, no better than guessing one of %d classes "
      "(%.2f%%, by chance up to %.2f points less). If later epochs do, too, the run learns "
      "nothing. %s",
      epoch,
      100 * error,
      num_classes,
      100 * guessing,
      100 * chance,
      _REMEDIES,
    )


def _interruption(run: Run, total_steps: int) -> InterruptedRunError:
  number = signal.SIGTERM if run.stop.signal is None else run.stop.signal
  asked = "another task was asked to" if run.stop.signal is None else signal.Signals(number).name
  newest = run.checkpoints.newest_step()
  saved = "saved" if newest == run.done else f"not saved; the newest checkpoint: step {newest or 0}"
  return InterruptedRunError(
    f"Stopped ({asked}) after step {run.done} of {total_steps}, {saved}; the same command goes on "
    "from there.",
    128 + number,
  )


def make_evaluation(
  strategy,
  model,
  recipe: Recipe,
  source,
  batch_size: int,
  bad: BadExamples | None = None,
  stop: StopRequest | None = None,
):
  """A function that evaluates `model` on every example of `source`.

  It returns {"loss", "error"}, or None where a task was asked to stop.
  """
  replicas = strategy.num_replicas_in_sync
  batch_size = min(batch_size, -(-source.num_examples // replicas))  # More would be padding.
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

  def evaluate() -> dict[str, float] | None:
    batches = iter(distributed)
    sums, previous = np.zeros(4), None
    for number in range(steps):
      batch = _next(batches, recipe, recipe.validation_split, source, ids(number), bad is not None)
      asked = tf.constant(float(stop is not None and stop.signal is not None))
      values = evaluation_step(batch, asked)
      if previous is not None:
        *addends, asked = map(float, previous)
        sums += addends
        if asked:
          return None
      previous = values
    loss, errors, count, unreadable = sums + list(map(float, previous[:4]))
    if count + unreadable != source.num_examples:
      raise AssertionError(f"Evaluated {count + unreadable:g} examples of {source.num_examples}.")
    return {"loss": float(loss / count), "error": float(errors / count)}

  return evaluate


def _with_workers_of_the_run(recipe: Recipe, work_dir: str) -> Recipe:
  """Where k was left out, that of the run that is continued, whatever the devices are now."""
  if recipe.workers is None:
    # What is wrong with the file, `find_run` tells.
    with contextlib.suppress(*files.FAILURES, ValueError, TypeError, KeyError):
      workers = files.read_json(os.path.join(work_dir, "recipe.json"))["recipe"]["workers"]
      return dataclasses.replace(recipe, workers=workers)
  return recipe


def find_run(work_dir: str, recipe: Recipe, data: dict) -> dict | None:
  """The result of the run in the work directory, or None where it is not complete or not begun.

  Args:
    work_dir: the run's directory.
    recipe: resolved.
    data: see `sources.identify`.

  Raises:
    UserError: the directory holds another recipe's run, or one on other data, or files that are no
      run's.
  """
  path = os.path.join(work_dir, "recipe.json")
  if not _exists(path):
    foreign = [name for name in _WRITTEN if _exists(os.path.join(work_dir, name))]
    if foreign:
      raise UserError(
        f"work_dir={work_dir} has no recipe.json, but {' and '.join(foreign)}, which a run would "
        "write over; choose another work_dir."
      )
    return None
  try:
    facts = files.read_json(path)
    there, trained_on = dict(facts["recipe"].items()), facts.get("data", data)
  except (*files.FAILURES, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is no recipe of a run ({first_line(error)}); choose another work_dir."
    ) from error
  now = recipe.to_dict()
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
  if trained_on != data:
    raise UserError(
      f"work_dir={work_dir} holds a run on other data ({trained_on} there, {data} now); choose "
      "another work_dir, or the data_dir that it began with."
    )
  path = os.path.join(work_dir, "result.json")
  if not _exists(path):
    return None
  try:
    result = files.read_json(path)
    if not isinstance(result, dict) or result.get("status") != "complete":
      raise ValueError("its status is not complete")
    return result
  except (*files.FAILURES, ValueError) as error:
    raise UserError(
      f"{path} is no result of a run ({first_line(error)}); remove it to continue the run."
    ) from error


def _exists(path: str) -> bool:
  try:
    return tf.io.gfile.exists(path)
  except files.FAILURES as error:
    raise UserError(
      f"{path} is out of reach ({first_line(error)}); name a work_dir that is not."
    ) from error


def _make_writable(work_dir: str):
  """Makes the directory if it is missing, and checks that it can be written."""
  with _telling_unwritable(work_dir):
    tf.io.gfile.makedirs(work_dir)
    probe = os.path.join(work_dir, f".probe-{os.urandom(8).hex()}")  # In containers all are pid 1.
    files.write_text(probe, "." * 4096)  # An empty file fits on a full disk.
    tf.io.gfile.remove(probe)


@contextlib.contextmanager
def _telling_unwritable(work_dir: str):
  try:
    yield
  except files.FAILURES as error:
    raise UserError(
      f"work_dir={work_dir} cannot be written ({first_line(error)}); name a directory that can."
    ) from error


@contextlib.contextmanager
def _only_run_in(work_dir: str):
  """Refuses a second run in a local or NFS directory; the lock ends with the process.

  Raises:
    UserError: another run is at work there.
  """
  if "://" in work_dir:
    yield  # An object store has no locks.
    return
  with _telling_unwritable(work_dir):
    file = open(os.path.join(work_dir, ".lock"), "a+", errors="replace")  # noqa: SIM115
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(
        f"work_dir={work_dir} is in use by a run ({file.read().strip()}); end that one first, or "
        "choose another work_dir."
      ) from error
    except OSError as error:
      logging.warning("%s cannot be locked (%s).", file.name, first_line(error))
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    yield


def _gather(strategy, value: float) -> np.ndarray:
  """The replicas' values, float64, in order; waits for all."""

  @tf.function
  def gather():
    def replica():
      context = tf.distribute.get_replica_context()
      index, count = context.replica_id_in_sync_group, strategy.num_replicas_in_sync
      # Exact: each place of the sum is one value and zeros.
      mine = tf.one_hot(index, count, tf.constant(value, tf.float64), dtype=tf.float64)
      return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

    return strategy.run(replica)

  return strategy.experimental_local_results(gather())[0].numpy()


def _require_agreement(strategy, facts: tuple, otherwise: str):
  """All tasks must have come to the same facts, or they would wait for each other for ever."""
  if len(set(_gather(strategy, zlib.crc32(repr(facts).encode())))) > 1:
    raise UserError(f"The tasks do not agree: {otherwise}.")


def _meet(strategy):
  """Waits for all tasks, for one that ends early takes what the others still fetch from it."""
  with contextlib.suppress(tf.errors.OpError):  # One that has gone on already is no loss.
    _gather(strategy, 0.0)


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
    with open(local, "rb") as saved, files.replacing(path, "wb") as file:
      shutil.copyfileobj(saved, file)


def _log_arithmetic(recipe: Recipe, derived: dict, source, validation, cluster: dict):
  warmup = f"{recipe.warmup} for {recipe.warmup_epochs:g} epochs" if recipe.warms_up else "none"
  if recipe.warmup != "none" and not recipe.warms_up:
    warmup += f" (kn is not above {recipe.reference_batch_size})"
  decays = ", ".join(f"{epoch:g}" for epoch in recipe.decay_epochs) or "none"
  late = sum(epoch >= recipe.epochs for epoch in recipe.decay_epochs)
  if late:
    decays += f" ({late} of them after the end)"
  for line in (
    f"{recipe.network} on {recipe.dataset}: {source.num_examples} training images, "
    f"{validation.num_examples} to validate on, {recipe.image_size}x{recipe.image_size}, "
    f"{recipe.dtype}",
    f"minibatch kn = {recipe.workers} workers x {recipe.per_worker_batch_size} images = "
    f"{recipe.global_batch_size}",
    f"peak rate = {recipe.reference_learning_rate:g} -> {recipe.peak_learning_rate:g} "
    f"({recipe.learning_rate_scaling} scaling from {recipe.reference_batch_size}); warmup: "
    f"{warmup}; x{recipe.decay_factor:g} at epochs {decays}",
    f"steps = {recipe.epochs} epochs x {derived['steps_per_epoch']} = {derived['total_steps']}",
    f"{derived['workers_per_replica']} workers a replica; "
    + ", ".join(f"{name} {value}" for name, value in cluster.items()),
  ):
    logging.info("%s", line)


def _warn_of_slow_dtype(dtype: str, cpuinfo: str = "/proc/cpuinfo"):
  """Says so where the CPU must emulate 16 bits, as far as Linux tells."""
  if dtype not in _CPU_FEATURES or not os.path.exists(cpuinfo):
    return
  with open(cpuinfo) as file:
    features = file.read().split()
  if not _CPU_FEATURES[dtype] & set(features):
    logging.warning(
      "This CPU has no %s instructions, which makes dtype=%s many times slower than "
      "dtype=float32 (another recipe, in another work_dir).",
      dtype,
      dtype,
    )


def versions() -> dict[str, str]:
  """Of what decides a run beside its recipe, by package."""
  packages = ("tensorflow", "keras", "tensorflow-datasets", "numpy")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"python": platform.python_version(), **found}
