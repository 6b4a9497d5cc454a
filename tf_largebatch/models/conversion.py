"""A copy of a Keras model that normalises over each worker's own n images."""

import contextlib
import re
import tempfile

import keras
import numpy as np

from tf_largebatch.errors import UserError, summary
from tf_largebatch.models.normalization import PerWorkerBatchNormalization

_TAKEN_OVER = ("momentum", "epsilon", "center", "scale", "gamma_initializer", "beta_initializer")
_REFUSED = {
  "gamma_regularizer": None,
  "beta_regularizer": None,
  "gamma_constraint": None,
  "beta_constraint": None,
  "renorm": False,
  "synchronized": False,
}


def per_worker_batch_normalization(model: keras.Model, per_worker_batch_size: int) -> keras.Model:
  """Returns a copy of a model whose batch normalisation is `PerWorkerBatchNormalization`.

  In training, a batch of g·n images gives what the model gives for each n images alone, so that
  `fit(..., workers_per_pass=g)` can take g workers through the copy at once. The copy has weights
  of the same paths and shapes in the same order, with equal values: `get_weights` of either model
  suits `set_weights` of the other, and with equal weights both compute the same in inference.
  Weight files do not fit, because Keras finds layers in them by their classes' names.

  Each `keras.layers.BatchNormalization` is replaced, also in nested models. Its momentum, epsilon,
  `center`, `scale`, initialisers, name, dtype policy and `trainable` stay; the initialisers of the
  moving averages do not, because their values are copied. A layer that is ours already gets the
  new n. The moving variance follows the unbiased variance of the groups, where Keras takes the
  biased one: over m = n · positions values per channel, ours is m / (m − 1) times as large.
  Momentum means the same in both; Keras' default is 0.99, the paper uses 0.9.

  The other layers are made from their configurations, as in `keras.models.clone_model`, so
  attributes set later are lost, except for weights, `trainable`, adapted vocabularies and the
  state of random numbers. The copy is not compiled, even if `model` is. Its variables belong to
  the strategy of `model`, which does not change.

  Args:
    model: built, `Sequential` or functional. Layers of other classes that hold a batch
      normalisation of their own (wrappers, subclassed models) are refused.
    per_worker_batch_size: n, images that are normalised together.

  Raises:
    UserError: the model cannot be copied, or a layer normalises in a way that
      `PerWorkerBatchNormalization` does not offer: over an axis other than the last, with a mask,
      with a regulariser or constraint, renormalised, or synchronised over the replicas. (A mask
      that only reaches a nested model raises a `ValueError` when the copy is first called.)
  """
  n = per_worker_batch_size
  if not isinstance(n, int | np.integer) or n < 1:
    raise UserError(f"per_worker_batch_size={n!r} is not a positive whole number.")
  _require_copyable(model)

  def clone(layer):
    if isinstance(layer, keras.layers.BatchNormalization):
      return _converted(layer, int(n))
    config = layer.get_config()
    if isinstance(layer, PerWorkerBatchNormalization):
      config["per_worker_batch_size"] = int(n)
    return type(layer).from_config(config)

  with model.distribute_strategy.scope(), _not_compiled(model):
    try:
      copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    except UserError:
      raise
    except Exception as error:  # Whatever the code of a layer raises.
      raise UserError(f"The model {model.name!r} cannot be copied: {_cause(error)}") from error
    _require_converted(model, copy)
    _copy_state(model, copy)
  return copy


def _cause(error: Exception) -> str:
  """Returns the message of an error, without the arguments of the call that Keras adds."""
  message = re.search(r"\x1b\[1m(.*?)\x1b\[0m", str(error), re.DOTALL)
  return summary(message[1] if message else error)


def _require_copyable(model: keras.Model) -> None:
  if not isinstance(model, keras.Sequential) and not hasattr(model, "operations"):
    raise UserError(
      f"A {type(model).__name__} is not a Sequential or functional model, so its layers cannot be "
      "replaced from outside; use PerWorkerBatchNormalization in its code."
    )
  if not model.built:
    raise UserError(
      f"The model {model.name!r} is not built; give it a keras.Input, or call it on a batch."
    )


def _converted(layer: keras.layers.BatchNormalization, n: int) -> PerWorkerBatchNormalization:
  """Returns a new layer that does what the given one does, over groups of n images."""
  if type(layer) is not keras.layers.BatchNormalization:
    raise UserError(
      f"Layer {layer.name!r} is a {type(layer).__name__}, which may compute something else than "
      "keras.layers.BatchNormalization; use the latter."
    )
  rank = layer.input_spec.ndim
  if layer.axis % rank != rank - 1:
    raise UserError(
      f"Layer {layer.name!r} normalises axis {layer.axis} of {rank}; use the last one, with "
      "data_format='channels_last'."
    )
  for name, accepted in _REFUSED.items():
    value = getattr(layer, name)
    if value not in (None, False):
      given = value if value is True else type(value).__name__
      raise UserError(
        f"Layer {layer.name!r} has {name}={given}, which PerWorkerBatchNormalization does not "
        f"support; use {name}={accepted}."
      )
  config = layer.get_config()
  try:
    return PerWorkerBatchNormalization(
      n,
      name=layer.name,
      trainable=layer.trainable,
      dtype=layer.dtype_policy,
      **{name: config[name] for name in _TAKEN_OVER},
    )
  except ValueError as error:
    raise UserError(f"Layer {layer.name!r}: {error}") from error


@contextlib.contextmanager
def _not_compiled(model: keras.Model):
  """Keeps `clone_model` from compiling the copies, which would make optimizers."""
  compiled = [m for m in model._flatten_layers() if getattr(m, "compiled", False)]
  for inner in compiled:
    inner.compiled = False
  try:
    yield
  finally:
    for inner in compiled:
      inner.compiled = True


def _require_converted(model: keras.Model, copy: keras.Model) -> None:
  for old, new in zip(model._flatten_layers(), copy._flatten_layers(), strict=True):
    if isinstance(new, keras.layers.BatchNormalization):
      raise UserError(
        f"Layer {new.name!r} is part of a layer that is not a Sequential or functional model, so "
        "it cannot be replaced from outside; use PerWorkerBatchNormalization there."
      )
    if type(new) is not type(old) and not isinstance(new, PerWorkerBatchNormalization):
      raise UserError(
        f"The constructor of {type(old).__name__} does not take (inputs, outputs, name), so a copy "
        f"of {old.name!r} would be a plain {type(new).__name__}; build it by keras.Model(inputs, "
        "outputs)."
      )


def _copy_state(model: keras.Model, copy: keras.Model) -> None:
  """Copies weights, states of random numbers, adapted vocabularies and what is trainable."""
  for old, new in zip(model._flatten_layers(), copy._flatten_layers(), strict=True):
    new.trainable = old.trainable  # Also of all within, which follow.
    state = {}
    old.save_own_variables(state)
    new.load_own_variables(state)
    if hasattr(old, "save_assets"):
      with tempfile.TemporaryDirectory() as folder:
        old.save_assets(folder)
        new.load_assets(folder)
  for old, new in zip(model.variables, copy.variables, strict=True):
    new.assign(old)
    new.trainable = old.trainable
    # Keras numbers unnamed variables through a program, and loads nested models with other paths.
    new._name, new._path = old.name, old.path
