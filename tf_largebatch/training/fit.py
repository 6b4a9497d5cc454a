"""`fit` and `evaluate` for any Keras model, on one device or on a cluster."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.distributed.collectives import broadcast, gather
from tf_largebatch.distributed.place import Place
from tf_largebatch.errors import UserError
from tf_largebatch.training import fit_checks, fit_data, fit_steps, keras_pass
from tf_largebatch.training.fit_data import Arrays, EvaluationData, TrainingData

# Stock callbacks that write files: they run on the chief alone.
_WRITERS = tuple(
  getattr(keras.callbacks, name)
  for name in (
    *("BackupAndRestore", "CSVLogger", "ModelCheckpoint", "OrbaxCheckpoint"),
    *("RemoteMonitor", "TensorBoard"),
  )
  if hasattr(keras.callbacks, name)
)
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

  Each step takes kn examples. Worker j passes its n examples (the j-th n of them) through the
  model, with random numbers of its own, and the loss is Keras' own over these n. The step's
  gradient is the mean over the k workers; the optimizer applies it once, clipped if it clips.
  Moving statistics take the mean over the workers. The replicas of the model's strategy share the
  workers, so the same arguments train the same model on one device, several, or several tasks, up
  to the order in which floats are summed. With k = 1 this is `model.fit`.

  Arguments that are not listed mean what they mean in `model.fit`.

  Args:
    model: compiled, made in the scope of its strategy (`make_strategy`). Call `fit` outside of it.
    x: arrays; or a `tf.data.Dataset` of batches of any size, the same on all tasks, not sharded,
      with elements (x, y) or (x, y, sample_weight); or a function epoch → such a data set, so that
      a run that continues sees what an uninterrupted one would have seen.
    workers: k; a multiple of the number of replicas.
    per_worker_batch_size: n. Examples that do not fill a step of kn are dropped.
    shuffle: whether arrays are permuted in each epoch, by `seed` and the epoch's number.
    callbacks: those of Keras that write files run on the chief alone, all others on all tasks. If
      one task's callback sets `model.stop_training`, all tasks stop there.
    validation_batch_size: of arrays; n if None.
    seed: of the permutations.
    workers_per_pass: g, workers that a replica takes through the model at once; needs a model whose
      batch normalisation is per worker (`per_worker_batch_normalization`) and without dropout.

  Returns:
    The history, as `model.fit` does.

  Raises:
    UserError: the arguments do not fit, the tasks' data differ, or something in the model would not
      be the same on other clusters.
  """
  fit_checks.require_supported(model, ("train_step", "train_function"))
  place = Place.of(model.distribute_strategy)
  fit_checks.require_shares(place, workers, per_worker_batch_size, workers_per_pass)
  data = fit_data.as_arrays(x, y, sample_weight) or x
  if validation_split and validation_data is None:
    if not isinstance(data, Arrays):
      raise UserError("validation_split needs arrays; give validation_data.")
    data, validation_data = fit_data.split(data, validation_split)
  training = TrainingData(
    data,
    place,
    workers=workers,
    per_worker_batch_size=per_worker_batch_size,
    steps_per_epoch=steps_per_epoch,
    shuffle=shuffle,
    class_weight=class_weight,
    seed=seed,
  )
  loop = _Fit.make(model, place, training, callbacks, verbose, epochs, workers, workers_per_pass)
  if validation_data is not None:
    size = validation_batch_size or per_worker_batch_size
    loop.validation = EvaluationData(_validation(validation_data), place, size, validation_steps)
  return loop.run(initial_epoch, epochs, validation_freq)


def evaluate(
  model: keras.Model,
  x=None,
  y=None,
  *,
  batch_size: int = 32,
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
      `model.evaluate`; x is arrays or a `tf.data.Dataset` of batches.

  Returns:
    The loss, or a list of the loss and the metrics, or, with `return_dict`, both by name.

  Raises:
    UserError: see `fit`.
  """
  fit_checks.require_supported(model, ("test_step", "test_function"))
  place = Place.of(model.distribute_strategy)
  data = EvaluationData(fit_data.as_arrays(x, y, sample_weight) or x, place, batch_size, steps)
  chosen = _callback_list(model, place, callbacks, verbose, epochs=1, steps=None)
  evaluation = _Evaluation.make(model, place, data)
  logs = evaluation.run(chosen)
  if return_dict:
    return logs
  values = list(logs.values())
  return values if len(values) > 1 else values[0]


def _validation(data):
  """What `validation_data` holds: a data set, or arrays (x, y) or (x, y, sample_weight)."""
  if isinstance(data, (Arrays, tf.data.Dataset)):
    return data
  if not isinstance(data, (tuple, list)):
    return fit_data.as_arrays(data, None, None) or data
  return fit_data.as_arrays(*data, *[None] * (3 - len(data)))


def _callback_list(
  model, place: Place, callbacks, verbose, **params
) -> keras.callbacks.CallbackList:
  """The callbacks that run on this task, with those that Keras adds."""
  if isinstance(callbacks, keras.callbacks.CallbackList):
    return callbacks
  callbacks = [
    callback
    for callback in keras.tree.flatten(callbacks or [])
    if place.is_chief or not isinstance(callback, _WRITERS)
  ]
  verbose = (1 if verbose == "auto" else verbose) if place.is_chief else 0
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

  place: Place
  data: EvaluationData
  reset: list
  step: Callable
  results: Callable

  @classmethod
  def make(cls, model: keras.Model, place: Place, data: EvaluationData) -> "_Evaluation":
    first = data.first()
    keras_pass.build(model, first)
    made = keras_pass.untrained(model)
    fit_checks.require_sums(made, first)
    step = fit_steps.make_test_step(made, place)
    return cls(place, data, made.reset, step, fit_steps.make_results(made))

  def run(self, callbacks: keras.callbacks.CallbackList) -> dict[str, float]:
    """Returns the loss and the metrics over all examples."""
    place = self.place
    callbacks.on_test_begin()
    totals = [tf.convert_to_tensor(value) for value in self.reset]
    for number, (batch, counts, facts) in enumerate(self.data.groups()):
      callbacks.on_test_batch_begin(number)
      totals, sums = self.step(batch, counts, totals, tf.constant([0.0, *facts], tf.float64))
      if not place.alone:
        fit_steps.require_equal_facts(sums.numpy(), place.replicas)
      callbacks.on_test_batch_end(number, self.results(totals))
    logs = {name: float(value) for name, value in self.results(totals).items()}
    callbacks.on_test_end(logs)
    return logs


@dataclasses.dataclass
class _Fit:
  """A call of `fit`.

  Attributes:
    model, place, training: what is trained, where, and on what.
    callbacks: that run on this task.
    step, results: see `fit_steps`.
    reset: the metrics' state before an epoch.
    stops_inside: whether a task's callbacks may end an epoch early.
    validation: the data of the evaluation after an epoch.
  """

  model: keras.Model
  place: Place
  training: TrainingData
  callbacks: keras.callbacks.CallbackList
  step: Callable
  results: Callable
  reset: list
  stops_inside: bool
  validation: EvaluationData | None = None
  _evaluation: _Evaluation | None = None

  @classmethod
  def make(cls, model, place, training, callbacks, verbose, epochs, workers, workers_per_pass):
    first = training.first_worker_batch()
    keras_pass.build(model, first)
    made = keras_pass.trained(model, first)
    fit_checks.require_sums(made, first)
    fit_checks.require_equal_workers(made, first, workers_per_pass)
    stops_inside = not place.alone and _watches_batches(callbacks)
    replica_batch = tf.nest.map_structure(
      lambda x: tf.TensorSpec([workers // place.replicas, *x.shape], x.dtype), first
    )
    step = fit_steps.make_fit_step(
      made, place, replica_batch, workers, workers_per_pass, stops_inside
    )
    chosen = _callback_list(model, place, callbacks, verbose, epochs=epochs, steps=training.steps)
    results = fit_steps.make_results(made)
    return cls(model, place, training, chosen, step, results, made.reset, stops_inside)

  def run(self, initial_epoch: int, epochs: int, validation_freq) -> keras.callbacks.History:
    """Trains and evaluates the epochs."""
    model, logs = self.model, None
    model.stop_training = False
    self.callbacks.on_train_begin()
    for epoch in range(self._synchronise(initial_epoch), epochs):
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

  def _synchronise(self, initial_epoch: int) -> int:
    """Gives all tasks what a callback of the chief restored; returns the first epoch."""
    first = getattr(self.model, "_initial_epoch", None) or initial_epoch
    if self.place.alone:
      return first
    strategy = self.place.strategy
    broadcast(strategy, [*self.model.variables, *self.model.optimizer.variables])
    return int(gather(strategy, first)[0])

  def _train_epoch(self, epoch: int) -> dict[str, Any]:
    """Trains one epoch and returns its loss and metrics."""
    callbacks, place = self.callbacks, self.place
    totals = [tf.convert_to_tensor(value) for value in self.reset]
    before = None  # The facts of the step before, which are read while the next one runs.
    for number, (batch, facts) in enumerate(self.training.epoch(epoch)):
      callbacks.on_train_batch_begin(number)
      sent = tf.constant([float(self.model.stop_training), *facts], tf.float64)
      totals, sums = self.step(batch, totals, sent)
      if not place.alone:
        if before is not None:
          fit_steps.require_equal_facts(before.numpy(), place.replicas)
        before = sums
        if self.stops_inside and sums.numpy()[0, fit_steps.STOP]:
          break  # This step changed nothing.
      callbacks.on_train_batch_end(number, self.results(totals))
      if place.alone and self.model.stop_training:
        break
    if before is not None:
      fit_steps.require_equal_facts(before.numpy(), place.replicas)
    return {name: float(value) for name, value in self.results(totals).items()}

  def _asked_to_stop(self) -> bool:
    """Whether a callback of any task asked to stop; all tasks then do."""
    if self.place.alone:
      return self.model.stop_training
    self.model.stop_training = bool(
      np.any(gather(self.place.strategy, float(self.model.stop_training)))
    )
    return self.model.stop_training


def _evaluates(epoch: int, frequency) -> bool:
  """As in Keras: every so many epochs, or after the epochs named (counted from 1)."""
  if isinstance(frequency, int):
    return (epoch + 1) % frequency == 0
  return epoch + 1 in frequency
