"""A worker's pass of a compiled Keras model as a pure function."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.training import passes
from tf_largebatch.training.passes import Values, Variables


@dataclasses.dataclass(frozen=True)
class KerasPass:
  """A compiled model and how a step treats its variables.

  Attributes:
    model: built and compiled.
    variables: of the model. Weights that the loss does not depend on count as constants.
    metrics: state of the loss and the metrics.
    reset: their values before the first batch.
  """

  model: keras.Model
  variables: Variables
  metrics: list[keras.Variable]
  reset: list[np.ndarray]

  @property
  def addends(self) -> list[tf.TensorSpec]:
    """Shapes and dtype of what a pass adds to the metrics' state."""
    return [tf.TensorSpec(r.shape, self.dtype) for r in self.reset]

  @property
  def dtype(self) -> str:
    """In which the replicas add up: that of the weights, so that one reduction can carry all."""
    dtypes = [v.dtype for v in self.variables.weights] or [keras.config.floatx()]
    return dtypes[0] if dtypes[0] == "float64" else "float32"

  def forward(self, share: float) -> Callable:
    """Builds `forward` of `passes.make_replica_sums`.

    Args:
      share: of the step's workers in a pass, g / k.
    """

    def forward(values, worker, batch):
      loss, statistics, counters, scope = self._call(values, worker, batch, True, self.reset)
      increments = self._increments(scope, self.reset)
      return loss * tf.cast(share, loss.dtype), statistics, counters, increments

    return forward

  def test(self, values: Values, batch, before: list) -> list:
    """What a batch in inference adds to the metrics' state.

    Args:
      values: of the variables.
      batch: its examples.
      before: the state to which the batch adds.
    """
    *_, scope = self._call(values, 0, batch, False, before)
    return self._increments(scope, before)

  def add(self, totals: list, increments: list) -> list:
    """Adds increments to the state of the metrics."""
    return [t + tf.cast(i, t.dtype) for t, i in zip(totals, increments, strict=True)]

  def results(self, totals: list) -> dict[str, Any]:
    """The loss and the metrics, by name, of a state."""
    with keras.StatelessScope(list(zip(self.metrics, totals, strict=True))):
      results = self.model.get_metrics_result()
      # A metric may return a variable, which has this value only inside the scope.
      return {name: tf.convert_to_tensor(value) for name, value in results.items()}

  def _call(self, values, worker, batch, training: bool, before: list):
    state = list(zip(self.metrics, before, strict=True))
    body = lambda: compute(self.model, batch, training)  # noqa: E731
    return passes.call(self.variables, values, worker, body, state)

  def _increments(self, scope, before: list) -> list:
    new = [scope.get_current_value(variable) for variable in self.metrics]
    return [tf.cast(v - b, self.dtype) for v, b in zip(new, before, strict=True)]


def compute(model: keras.Model, batch, training: bool):
  """Computes the loss of a batch, and updates the metrics, as Keras' own steps do."""
  x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
  takes_training = "training" in inspect.signature(model.call).parameters
  y_pred = model(x, training=training) if takes_training else model(x)
  given = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
  if "training" in inspect.signature(model.compute_loss).parameters:
    given["training"] = training
  loss = model.compute_loss(**given)
  size = tf.shape(tf.nest.flatten(x)[0])[0]
  _loss_metric(model).update_state(loss, sample_weight=size)
  model.compute_metrics(x, y, y_pred, sample_weight)
  return loss


def _loss_metric(model: keras.Model) -> keras.metrics.Metric:
  return next(metric for metric in model.metrics if metric.name == "loss")


def build(model: keras.Model, batch) -> None:
  """Creates what the model, its loss, metrics and optimizer still lack, in its strategy's scope.

  Args:
    batch: a worker's examples, of which only shapes and dtypes are used.
  """
  with model.distribute_strategy.scope():
    model._symbolic_build(data_batch=batch)


def untrained(model: keras.Model) -> KerasPass:
  """The pass of a built model that is only evaluated."""
  metrics = list(model.metrics_variables)
  with keras.StatelessScope() as scope:
    model.reset_metrics()
    reset = [scope.get_current_value(variable) for variable in metrics]
  reset = [
    tf.convert_to_tensor(v.value if r is None else r).numpy()
    for v, r in zip(metrics, reset, strict=True)
  ]
  return KerasPass(model, Variables.of(model), metrics, reset)


def trained(model: keras.Model, batch) -> KerasPass:
  """The pass of a built model; traces it once, to find out what it does with each variable.

  Args:
    batch: a worker's examples.
  """
  made = untrained(model)
  everything, changed, reached = made.variables, set(), set()

  def probe(values, batch):
    others = (everything.statistics, values.statistics), (everything.counters, values.counters)
    pairs = [pair for group in others for pair in zip(*group, strict=True)]
    mapping = [*zip(everything.weights, values.weights, strict=True), *pairs]
    mapping += zip(made.metrics, made.reset, strict=True)
    with tf.GradientTape() as tape:
      tape.watch(values.weights)
      with keras.StatelessScope(mapping, collect_losses=True) as scope:
        loss = compute(model, batch, training=True)
    gradients = tape.gradient(loss, values.weights)
    changed.update(id(v) for v, given in pairs if scope.get_current_value(v) is not given)
    reached.update(
      id(v) for v, g in zip(everything.weights, gradients, strict=True) if g is not None
    )

  tf.function(probe, autograph=False).get_concrete_function(everything.values(), batch)
  rest = [v for v in (*everything.statistics, *everything.counters) if id(v) not in changed]
  variables = Variables(
    [v for v in everything.weights if id(v) in reached],
    [v for v in everything.statistics if id(v) in changed],
    [v for v in everything.counters if id(v) in changed],
    [*rest, *(v for v in everything.weights if id(v) not in reached)],
  )
  return dataclasses.replace(made, variables=variables)
