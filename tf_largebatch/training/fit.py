"""`fit` and `evaluate` for any Keras model, on one device or on a cluster."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.distributed.collectives import broadcast, gather
from tf_largebatch.distributed.lost_tasks import report_lost_tasks
from tf_largebatch.distributed.place import Place
from tf_largebatch.errors import UserError
from tf_largebatch.training import fit_arrays, fit_checks, fit_data, fit_steps, keras_pass, passes
from tf_largebatch.training.fit_arrays import Arrays
from tf_largebatch.training.fit_data import EvaluationData, TrainingData, Workers

# Stock callbacks that write files: they run on the chief alone.
_WRITERS = tuple(
  getattr(keras.callbacks, name)
  for name in (
    *("BackupAndRestore", "CSVLogger", "ModelCheckpoint", "OrbaxCheckpoint"),
    *("RemoteMonitor", "TensorBoard"),
  )
  if hasattr(keras.callbacks, name)
)
_KERAS_BATCH_SIZE = 32
_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


def fit(
  model: keras.Model,
  x=None,
  y=None,
  *,
  workers: int,
  per_worker_batch_size: int,
  epochs: int = 1,
  verbose="auto",
  callbacks=None,
  validation_split: float = 0.0,
  validation_data=None,
  shuffle: bool = True,
  class_weight: dict | None = None,
  sample_weight=None,
  initial_epoch: int = 0,
  steps_per_epoch: int | None = None,
  validation_steps: int | None = None,
  validation_batch_size: int | None = None,
  validation_freq=1,
  seed: int = 0,
  workers_per_pass: int = 1,
) -> keras.callbacks.History:
  """Trains a compiled Keras model with k workers of n examples, on any cluster.

  Each worker passes its n examples through the model, with Keras' own loss and with random numbers
  of its own. The step takes the mean of the k gradients and moving statistics. The replicas of the
  model's strategy share the workers, which changes only the order in which floats are summed. With
  k = 1 this is `model.fit`, whose arguments mean the same here, except for (docs/keras_fit.md):

  Args:
    model: compiled, and made in its strategy's scope; call `fit` outside of it.
    x: arrays; a `tf.data.Dataset` of batches of any size, whole on every task; or a function from
      the epoch to such a data set, so that a run that continues sees the same examples.
    workers, per_worker_batch_size: k and n. Examples that do not fill a step of kn are dropped.
    shuffle, seed: whether arrays are permuted in each epoch, by seed and epoch.
    callbacks: Keras' that write files run on the chief alone, others on all tasks, which all stop
      if one sets `model.stop_training`.
    validation_batch_size: of arrays; None: n.
    workers_per_pass: g, workers that a replica takes through the model at once.

  Raises:
    UserError: the arguments do not fit, or something would depend on the cluster.
    InterruptedRunError: another task was lost.
  """
  fit_checks.require_supported(model, ("train_step", "train_function"))
  place = Place.of(model.distribute_strategy)
  epochs = fit_data.limit("epochs", epochs, keras.config.max_epochs())
  share = Workers(workers, per_worker_batch_size, workers_per_pass)
  facts = (share, epochs, initial_epoch, steps_per_epoch, shuffle, class_weight, seed)
  fit_checks.require_shares(place, share, facts)
  data, validation_data = _sources((x, y, sample_weight), validation_split, validation_data)
  training = TrainingData(data, place, share, steps_per_epoch, shuffle, class_weight, seed)
  loop = _Fit.make(model, place, training, share, callbacks, verbose, epochs)
  if validation_data is not None:
    size = validation_batch_size or per_worker_batch_size
    loop.validation = EvaluationData(validation_data, place, size, validation_steps)
  with report_lost_tasks(place.cluster, lambda: loop.steps_done):
    return loop.run(initial_epoch, epochs, validation_freq)


def evaluate(
  model: keras.Model,
  x=None,
  y=None,
  *,
  batch_size: int | None = None,
  verbose="auto",
  sample_weight=None,
  steps: int | None = None,
  callbacks=None,
  return_dict: bool = False,
):
  """Evaluates a compiled Keras model; each example counts once, whatever the cluster.

  Takes the batches that `model.evaluate` would take, shared among the replicas, so the results are
  those of one device up to the order in which floats are summed.

  Args:
    model, x, y, batch_size, verbose, sample_weight, steps, callbacks, return_dict: as in
      `model.evaluate`; x is arrays or a `tf.data.Dataset` of batches. All tasks stop if a callback
      of one sets `model.stop_evaluating`.

  Returns:
    The loss, or a list of the loss and the metrics, or, with `return_dict`, both by name.

  Raises:
    UserError: see `fit`.
  """
  fit_checks.require_supported(model, ("test_step", "test_function"))
  place = Place.of(model.distribute_strategy)
  data = fit_arrays.as_arrays(x, y, sample_weight) or x
  data = EvaluationData(data, place, batch_size or _KERAS_BATCH_SIZE, steps)
  chosen = _callback_list(model, place, callbacks, verbose, epochs=1, steps=None)
  evaluation = _Evaluation.make(model, place, data)
  logs = evaluation.run(chosen)
  return logs if return_dict else model._flatten_metrics_in_order(logs)


def _sources(given: tuple, fraction: float, validation) -> tuple:
  """Returns the data of training and of validation: `Arrays`, data sets or a function."""
  data = fit_arrays.as_arrays(*given) or given[0]
  if isinstance(validation, (tuple, list)):
    return data, fit_arrays.as_arrays(*validation, *[None] * (3 - len(validation)))
  if validation is not None:
    return data, fit_arrays.as_arrays(validation, None, None) or validation
  if not fraction:
    return data, None
  if not isinstance(data, Arrays):
    raise UserError("validation_split needs arrays; give validation_data.")
  return fit_arrays.split(data, fraction)


def _callback_list(
  model, place: Place, callbacks, verbose, **params
) -> keras.callbacks.CallbackList:
  """The callbacks that run on this task, with those that Keras adds."""
  if isinstance(callbacks, keras.callbacks.CallbackList):
    return callbacks
  callbacks = [
    callback
    for callback in keras.tree.flatten(callbacks or [])
    if place.cluster.is_chief or not isinstance(callback, _WRITERS)
  ]
  verbose = (1 if verbose == "auto" else verbose) if place.cluster.is_chief else 0
  return keras.callbacks.CallbackList(
    callbacks,
    add_history=True,
    add_progbar=verbose != 0,
    model=model,
    verbose=verbose,
    **params,
  )


def _watches_batches(callbacks) -> bool:
  """Whether a callback is called with each batch, and so could stop there."""
  base = keras.callbacks.Callback
  return any(
    getattr(getattr(callback, hook), "__func__", None) is not getattr(base, hook)
    for callback in keras.tree.flatten(callbacks or [])
    for hook in _BATCH_HOOKS
  )


@dataclasses.dataclass
class _Evaluation:
  """Evaluates on one set of data, any number of times."""

  model: keras.Model
  place: Place
  data: EvaluationData
  reset: list
  step: Callable

  @classmethod
  def make(cls, model: keras.Model, place: Place, data: EvaluationData) -> "_Evaluation":
    first = data.first()
    keras_pass.build(model, first)
    made = keras_pass.untrained(model)
    fit_checks.require_sums(made, first)
    step = fit_steps.make_test_step(made, place)
    return cls(model, place, data, made.reset, step)

  def run(self, callbacks: keras.callbacks.CallbackList) -> dict[str, Any]:
    """Returns the loss and the metrics over all examples."""
    model, place = self.model, self.place
    model.stop_evaluating = False
    callbacks.on_test_begin()
    totals = [tf.convert_to_tensor(value) for value in self.reset]
    for number, (batch, counts, facts) in enumerate(self.data.groups()):
      callbacks.on_test_batch_begin(number)
      sent = tf.constant([float(model.stop_evaluating), *facts], tf.float64)
      new, sums, found = self.step(batch, counts, totals, sent)
      if not place.alone:
        fit_steps.require_equal_facts(sums.numpy(), place.replicas)
        if number and sums.numpy()[0, fit_steps.STOP]:
          # A callback asked to stop before this group, which therefore does not count. The first
          # one always does, because there would be no results.
          break
      totals, logs = new, found
      callbacks.on_test_batch_end(number, logs)
      if place.alone and model.stop_evaluating:
        break
    logs = _to_python(logs)
    callbacks.on_test_end(logs)
    return logs


@dataclasses.dataclass
class _Fit:
  """A call of `fit`.

  Attributes:
    model, place, training: what is trained, where, and on what.
    callbacks: that run on this task.
    step: see `fit_steps`.
    reset: the metrics' state before an epoch.
    stops_inside: whether a task's callbacks may end an epoch early.
    draws: states of random seeds, and by how much a step changes each.
    validation: the data of the evaluation after an epoch.
    steps_done: so far.
  """

  model: keras.Model
  place: Place
  training: TrainingData
  callbacks: keras.callbacks.CallbackList
  step: Callable
  reset: list
  stops_inside: bool
  draws: list[tuple[keras.Variable, np.ndarray]]
  validation: EvaluationData | None = None
  steps_done: int = 0
  _evaluation: _Evaluation | None = None

  @classmethod
  def make(cls, model, place, training, workers: Workers, callbacks, verbose, epochs) -> "_Fit":
    first = training.first_worker_batch()
    keras_pass.build(model, first)
    made = keras_pass.trained(model, first)
    fit_checks.require_sums(made, first, workers.per_pass)
    changes = fit_checks.require_equal_workers(made, first, workers.per_pass)
    draws = [
      (variable, change)
      for variable, change in zip(made.variables.counters, changes, strict=True)
      if passes.is_seed(variable)
    ]
    stops_inside = not place.alone and _watches_batches(callbacks)
    replica_batch = tf.nest.map_structure(
      lambda x: tf.TensorSpec([workers.count // place.replicas, *x.shape], x.dtype), first
    )
    step = fit_steps.make_fit_step(made, place, replica_batch, workers, stops_inside)
    chosen = _callback_list(model, place, callbacks, verbose, epochs=epochs, steps=training.steps)
    return cls(model, place, training, chosen, step, made.reset, stops_inside, draws)

  def run(self, initial_epoch: int, epochs: int, validation_freq) -> keras.callbacks.History:
    """Trains and evaluates the epochs."""
    model, logs = self.model, None
    model.stop_training = False
    for epoch in range(self._begin(initial_epoch), epochs):
      self.callbacks.on_epoch_begin(epoch)
      logs = self._train_epoch(epoch)
      if self.validation is not None and _evaluates(epoch, validation_freq):
        if self._evaluation is None:
          self._evaluation = _Evaluation.make(model, self.place, self.validation)
        found = self._evaluation.run(self.callbacks)
        logs |= {f"val_{name}": value for name, value in found.items()}
      self.callbacks.on_epoch_end(epoch, logs)
      if self._asked_to_stop():
        break
    if epochs > 0:
      model.optimizer.finalize_variable_values(model.trainable_weights)
    self.callbacks.on_train_end(logs)
    return model.history

  def _begin(self, initial_epoch: int) -> int:
    """Lets callbacks restore and gives all tasks the chief's state; returns the first epoch."""
    model, strategy = self.model, self.place.strategy
    before = getattr(model, "_initial_epoch", None)
    self.callbacks.on_train_begin()
    restored = getattr(model, "_initial_epoch", None)
    if restored and restored != before:
      # Keras does not save the states of seeds with the weights.
      iterations = int(model.optimizer.iterations.numpy())
      steps = restored * self.training.steps if self.training.steps else iterations
      for variable, change in self.draws:
        variable.assign(variable.numpy() + change * steps)
    first = restored or initial_epoch
    if self.place.alone:
      return first
    broadcast(strategy, [*model.variables, *model.optimizer.variables])
    return int(gather(strategy, first)[0])

  def _train_epoch(self, epoch: int) -> dict[str, Any]:
    """Trains one epoch and returns its loss and metrics."""
    callbacks, place = self.callbacks, self.place
    # Keras turns logs into floats even if no callback asks for them, which waits for a GPU.
    watched = _watches_batches(callbacks.callbacks)
    totals = [tf.convert_to_tensor(value) for value in self.reset]
    before = None  # The facts of the step before, which are read while the next one runs.
    for number, (batch, facts) in enumerate(self.training.epoch(epoch)):
      callbacks.on_train_batch_begin(number)
      sent = tf.constant([float(self.model.stop_training), *facts], tf.float64)
      totals, sums, logs = self.step(batch, totals, sent)
      if not place.alone:
        if before is not None:
          fit_steps.require_equal_facts(before.numpy(), place.replicas)
        before = sums
        if self.stops_inside and sums.numpy()[0, fit_steps.STOP]:
          break  # This step changed nothing.
      self.steps_done += 1
      callbacks.on_train_batch_end(number, logs if watched else None)
      if place.alone and self.model.stop_training:
        break
    if before is not None:
      fit_steps.require_equal_facts(before.numpy(), place.replicas)
    return _to_python(logs)

  def _asked_to_stop(self) -> bool:
    """Whether a callback of any task asked to stop; all tasks then do."""
    if self.place.alone:
      return self.model.stop_training
    self.model.stop_training = bool(
      np.any(gather(self.place.strategy, float(self.model.stop_training)))
    )
    return self.model.stop_training


def _to_python(results: dict[str, tf.Tensor]) -> dict[str, Any]:
  """Converts scalar results to floats; the others, such as scores by class, become arrays."""
  arrays = {name: np.asarray(value) for name, value in results.items()}
  return {name: value if value.ndim else float(value) for name, value in arrays.items()}


def _evaluates(epoch: int, frequency) -> bool:
  """As in Keras: every so many epochs, or after the epochs named (counted from 1)."""
  if isinstance(frequency, int):
    return (epoch + 1) % frequency == 0
  return epoch + 1 in frequency
