"""Settings of the user's machine that would change what a recipe computes.

Keras reads `keras.json` in ~/.keras (or $KERAS_HOME), and Keras and TensorFlow read dozens of
environment variables. Those that decide how fast, on which devices or with how much memory they run
are the user's. So are those that change the order in which floats are summed, as other hardware
does (`TF_ENABLE_ONEDNN_OPTS`, `TF_XLA_FLAGS`, `XLA_FLAGS`, numbers of threads).
"""

import contextlib
import json
import os
from collections.abc import Iterator, MutableMapping

from tf_largebatch.errors import UserError, summary

# Variables that programs ignore: name → values that do no harm, of which the first replaces others.
_VARIABLES = {
  "KERAS_BACKEND": ("tensorflow",),  # Another library instead of TensorFlow.
  "TF_USE_LEGACY_KERAS": ("", "0", "false"),  # Keras 2.
  "TF2_BEHAVIOR": ("1",),  # TensorFlow 1.
  "KERAS_MAX_EPOCHS": ("",),  # Ends `fit` early, as the next.
  "KERAS_MAX_STEPS_PER_EPOCH": ("",),
  "TF_SET_ONEDNN_FPMATH_MODE": ("",),  # Products of float32 in bfloat16, as the next two.
  "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
  "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
  "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": ("", "0"),  # Keeps using the first step's weights.
  "TF_CONV2D_USE_FP16_ACCUMULATE": ("", "0"),  # Sums in float16, as the next two.
  "TF_FP16_CONV_USE_FP32_COMPUTE": ("", "1"),
  "TF_FP16_MATMUL_USE_FP32_COMPUTE": ("", "1"),
  "TF_FUNCTION_JIT_COMPILE_DEFAULT": ("", "false"),  # `jit_compile` decides.
}
# What Keras accepts in keras.json, by key.
_KERAS_JSON = {
  "floatx": lambda value: value in ("float16", "float32", "float64"),
  "epsilon": lambda value: isinstance(value, float),
  "image_data_format": lambda value: value in ("channels_last", "channels_first"),
}


def ignore(environ: MutableMapping[str, str] = os.environ) -> list[str]:
  """Neutralises the environment variables that would change what is computed.

  Call it before Keras or TensorFlow is imported.

  Returns:
    What was ignored, as "NAME=value".

  Raises:
    UserError: Keras could not be imported because of `keras.json`.
  """
  _check_keras_json(environ)
  ignored = []
  for name, harmless in _VARIABLES.items():
    if environ.get(name, harmless[0]).lower() not in [value.lower() for value in harmless]:
      ignored.append(f"{name}={environ[name]}")
    environ.pop(name, None)
    if harmless[0]:
      environ[name] = harmless[0]
  return ignored


def _check_keras_json(environ: MutableMapping[str, str]) -> None:
  # As Keras finds it.
  home = os.path.expanduser("~")
  default = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
  path = os.path.join(os.path.expanduser(environ.get("KERAS_HOME", default)), "keras.json")
  if not os.path.exists(path):
    return
  try:
    with open(path) as file:
      config = json.load(file)
  except ValueError:
    return  # Keras ignores a file that is not JSON.
  except (OSError, RecursionError) as error:
    raise UserError(
      f"Keras cannot read {path} ({summary(error)}); make it readable or remove it."
    ) from error
  if not isinstance(config, dict):
    raise UserError(f"Keras cannot use {path}, which is not a JSON object; remove it.")
  for key, accepts in _KERAS_JSON.items():
    if key in config and not accepts(config[key]):
      raise UserError(f"Keras cannot use {path}: {key} is {config[key]!r}; correct or remove it.")


@contextlib.contextmanager
def keras_defaults() -> Iterator[None]:
  """Sets Keras' own defaults inside the context: what `keras.json` or the program chose is undone.

  Layers are made channels last, in float32 where the recipe names no dtype.
  """
  import keras

  config = keras.config
  before = (
    config.floatx(),
    config.epsilon(),
    config.image_data_format(),
    config.dtype_policy(),
  )
  setters = (
    config.set_floatx,
    config.set_epsilon,
    config.set_image_data_format,
    config.set_dtype_policy,
  )
  for setter, value in zip(setters, ("float32", 1e-7, "channels_last", "float32"), strict=True):
    setter(value)
  try:
    yield
  finally:
    for setter, value in zip(setters, before, strict=True):
      setter(value)


def require_tensorflow_backend() -> None:
  """Checks that Keras computes with TensorFlow.

  Raises:
    ImportError: it uses another backend.
  """
  import keras

  if keras.backend.backend() != "tensorflow":
    raise ImportError(
      f"tf_largebatch needs Keras' TensorFlow backend, but Keras uses {keras.backend.backend()!r}; "
      "set KERAS_BACKEND=tensorflow before Keras is imported."
    )
