"""What replaces the classes and methods under test in Keras' own tests.

Each takes the arguments and defaults of Keras' class and passes them to ours. Nothing else changes.
"""

import concurrent.futures
import itertools
import math
import types

import keras
import numpy as np
import tensorflow as tf

import tf_largebatch
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.optim.schedule import LinearScalingSchedule
from tf_largebatch.optim.sgd import MomentumCorrectedSGD

_BATCH_SIZE = 32  # Keras' default.
_register = keras.saving.register_keras_serializable("keras_own")


uses: list[str] = []  # What a test has used of ours: one that passes without has shown nothing.


@_register
class SGD(MomentumCorrectedSGD):
  """Ours with the arguments and defaults of `keras.optimizers.SGD`."""

  def __init__(
    self, learning_rate=0.01, momentum=0.0, nesterov=False, weight_decay=None, **arguments
  ):
    uses.append("optimizer")
    super().__init__(learning_rate, momentum, nesterov, weight_decay=weight_decay or 0, **arguments)


class _Schedule(LinearScalingSchedule):
  """Ours for steps as epochs and without scaling, with the configuration of Keras' class."""

  def __init__(self, rate, config, warmup_steps=0, **decay):
    uses.append("schedule")
    self._config = config
    super().__init__(
      steps_per_epoch=1,
      global_batch_size=2,
      reference_batch_size=1,
      scaling="none",
      reference_learning_rate=rate,
      warmup_epochs=warmup_steps,
      **decay,
    )

  def get_config(self):
    return self._config


@_register
class PiecewiseConstantDecay(_Schedule):
  """Values that fall by one factor, which is what ours can do."""

  def __init__(self, boundaries, values, name="PiecewiseConstant"):
    factors = {round(b / a, 12) for a, b in itertools.pairwise(values)}
    if len(factors) != 1:
      raise NotImplementedError("values that do not fall by one factor")
    # Keras' value holds up to and with the boundary.
    decay_epochs = [boundary + 1 for boundary in boundaries]
    config = {"boundaries": boundaries, "values": values, "name": name}
    super().__init__(
      values[0], config, decay_epochs=decay_epochs, decay_factor=factors.pop(), name=name
    )


@_register
class PolynomialDecay(_Schedule):
  """To a rate of 0, without cycles."""

  def __init__(
    self,
    initial_learning_rate,
    decay_steps,
    end_learning_rate=0.0001,
    power=1.0,
    cycle=False,
    name="PolynomialDecay",
  ):
    if end_learning_rate or cycle:
      raise NotImplementedError("a final rate other than 0, or cycles")
    config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
    decay = {"decay": "polynomial", "decay_power": power, "epochs": decay_steps}
    super().__init__(initial_learning_rate, config, name=name, **decay)


@_register
class CosineDecay(_Schedule):
  """To a rate of 0."""

  def __init__(
    self,
    initial_learning_rate,
    decay_steps,
    alpha=0.0,
    name="CosineDecay",
    warmup_target=None,
    warmup_steps=0,
  ):
    if alpha or warmup_target:
      raise NotImplementedError("a final rate other than 0, or a warmup to a given rate")
    config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
    super().__init__(initial_learning_rate, config, name=name, decay="cosine", epochs=decay_steps)


@_register
class BatchNormalization(PerWorkerBatchNormalization):
  """Ours over the whole batch, with Keras' defaults; other axes by a transposition around it."""

  def __init__(
    self,
    axis=-1,
    momentum=0.99,
    epsilon=1e-3,
    moving_mean_initializer="zeros",
    moving_variance_initializer="ones",
    **arguments,
  ):
    uses.append("layer")
    super().__init__(None, momentum, epsilon, **arguments)
    self.axis = axis
    self.starts = {
      "moving_mean_initializer": moving_mean_initializer,
      "moving_variance_initializer": moving_variance_initializer,
    }

  def build(self, input_shape):
    super().build((*input_shape[:-1], input_shape[self.axis]))
    mean, variance = (keras.initializers.get(start) for start in self.starts.values())
    self.moving_mean.assign(mean(self.moving_mean.shape))
    self.moving_variance.assign(variance(self.moving_variance.shape))

  def call(self, inputs, training=False, mask=None):
    order = [d for d in range(len(inputs.shape)) if d != self.axis % len(inputs.shape)]
    order.append(self.axis % len(inputs.shape))
    outputs = super().call(keras.ops.transpose(inputs, order), training, mask)
    return keras.ops.transpose(outputs, np.argsort(order).tolist())

  def get_config(self):
    config = super().get_config()
    del config["per_worker_batch_size"]
    return {**config, "axis": self.axis, **self.starts}


def fit(
  self,
  x=None,
  y=None,
  batch_size=None,
  validation_split=0.0,
  validation_batch_size=None,
  **arguments,
):
  """`tf_largebatch.fit` as `Model.fit`: the replicas share a batch, as Keras' do."""
  uses.append("fit")
  size = _batch_size(x, batch_size, validation_split)
  replicas = self.distribute_strategy.num_replicas_in_sync
  return _outside_of_scopes(
    tf_largebatch.fit,
    self,
    x,
    y,
    workers=replicas,
    per_worker_batch_size=size // replicas,
    validation_split=validation_split,
    validation_batch_size=validation_batch_size or batch_size,
    **arguments,
  )


def evaluate(self, x=None, y=None, **arguments):
  """`tf_largebatch.evaluate` as `Model.evaluate`."""
  uses.append("evaluate")
  return _outside_of_scopes(tf_largebatch.evaluate, self, x, y, **arguments)


def _outside_of_scopes(function, *arguments, **named):
  """Calls a function in a thread of its own, where no strategy's scope is entered."""
  if not tf.distribute.has_strategy():
    return function(*arguments, **named)
  with concurrent.futures.ThreadPoolExecutor() as thread:
    return thread.submit(function, *arguments, **named).result()


def _batch_size(x, asked, validation_split: float) -> int:
  """The examples that Keras' first step takes."""
  if isinstance(x, tf.data.Dataset):
    return int(tf.nest.flatten(next(iter(x)))[0].shape[0])
  first = tf.nest.flatten(x)[0]
  if not hasattr(first, "shape"):
    return _BATCH_SIZE  # `fit` refuses it in its own words.
  size = first.shape[0]
  return min(asked or _BATCH_SIZE, size - math.ceil(size * validation_split))


def _namespace(module, **names):
  return types.SimpleNamespace(**{**vars(module), **names})


def replace_names(module) -> None:
  """Puts the stand-ins in the place of the classes that a module of tests has imported."""
  from keras.src import layers
  from keras.src.optimizers import schedules

  name = module.__name__.removeprefix("keras.src.")
  if name in ("optimizers.sgd_test", "backend.tensorflow.optimizer_distribute_test"):
    module.SGD = SGD
  elif name == "optimizers.schedules.learning_rate_schedule_test":
    ours = {c.__name__: c for c in (PiecewiseConstantDecay, PolynomialDecay, CosineDecay)}
    module.schedules = _namespace(schedules, **ours)
  elif name == "layers.normalization.batch_normalization_test":
    module.layers = _namespace(layers, BatchNormalization=BatchNormalization)


def replace_methods() -> None:
  """Makes every model of Keras train and evaluate by ours."""
  from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

  TensorFlowTrainer.fit = fit
  TensorFlowTrainer.evaluate = evaluate
