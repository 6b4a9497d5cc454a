"""Networks of `keras.applications`, and of the user's own modules."""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator

import keras

from tf_largebatch.errors import UserError, summary
from tf_largebatch.models.resnet import normalize_channels
from tf_largebatch.recipe import Recipe


def build(recipe: Recipe, num_classes: int, dtype: str) -> keras.Model:
  """Builds the network that `recipe.network` names, on raw pixels, with logits in weights' dtype.

  Args:
    recipe: resolved; its seed decides the initial weights.
    num_classes: number of logits.
    dtype: name of the policy of its layers.

  Returns:
    A `keras.Model` that maps images `[batch, H, W, C]` in 0 to 255 to logits
    `[batch, num_classes]`.

  Raises:
    UserError: the network is not found, or cannot be built or trained.
  """
  shape = (recipe.image_size, recipe.image_size, len(recipe.channel_mean))
  make = _find(recipe.network)
  variable_dtype = keras.dtype_policies.get(dtype).variable_dtype
  keras.utils.set_random_seed(recipe.seed)
  with _policy(dtype):
    try:
      body = make(shape, num_classes)
    except Exception as error:  # Whatever the user's code raises.
      raise UserError(
        f"network={recipe.network}: cannot be built for images {shape} and {num_classes} classes "
        f"({summary(error)})."
      ) from error
  _require_logits(recipe.network, body, shape, num_classes)
  inputs = keras.Input(shape, dtype=variable_dtype, name="image")
  x = normalize_channels(inputs, recipe.channel_mean, recipe.channel_std, variable_dtype)
  logits = keras.layers.Activation("linear", dtype=variable_dtype, name="logits")(body(x))
  return keras.Model(inputs, logits, name=recipe.network.rpartition(":")[2])


def _find(network: str) -> Callable:
  """Returns the function of the input shape and the number of classes that makes the network."""
  module, colon, name = network.partition(":")
  if not colon:
    return _application(network)
  try:
    found = getattr(importlib.import_module(module), name)
  except Exception as error:  # Whatever the user's module raises.
    raise UserError(f"network={network}: cannot be imported ({summary(error)}).") from error
  return found


def _application(network: str) -> Callable:
  found = getattr(keras.applications, network, None)
  if found is None:
    names = sorted(n for n in dir(keras.applications) if n[0].isupper())
    raise UserError(f"network={network} is not in keras.applications: {', '.join(names)}.")

  def make(shape, num_classes):
    options = {"weights": None, "classifier_activation": None}
    if "include_preprocessing" in inspect.signature(found).parameters:
      options["include_preprocessing"] = False  # The recipe normalises the channels.
    return found(input_shape=shape, classes=num_classes, **options)

  return make


@contextlib.contextmanager
def _policy(dtype: str) -> Iterator[None]:
  """Layers made inside have this dtype policy, unless they are given another."""
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy(dtype)
  try:
    yield
  finally:
    keras.config.set_dtype_policy(before)


def _require_logits(network: str, body, shape: tuple, num_classes: int) -> None:
  """Raises UserError if the network is not a model from images to logits alone."""
  if not isinstance(body, keras.Model) or not body.built:
    raise UserError(f"network={network}: returned {type(body).__name__}, not a built keras.Model.")
  if tuple(body.output_shape) != (None, num_classes):
    raise UserError(
      f"network={network}: its output is {body.output_shape} for images {shape}; it must be "
      f"(None, {num_classes}), one logit for each class."
    )
  if any(getattr(layer, "activity_regularizer", None) for layer in body._flatten_layers()) or any(
    variable.regularizer for variable in body.trainable_variables
  ):
    raise UserError(
      f"network={network}: it has regularisers, which the recipe's loss leaves out; use "
      "--weight_decay instead."
    )
