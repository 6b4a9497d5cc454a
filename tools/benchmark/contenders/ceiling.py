"""What a contender's FLOP/s are compared with: a large matrix product; and its step's FLOPs."""

import functools
import time
from collections.abc import Callable

from tf_largebatch.recipe import Recipe
from tools.benchmark.contenders.contender import Contender, Runner
from tools.forecasting.layers import usual_classes

_SIDE = {"cpu": 2048, "gpu": 8192}
_PRODUCTS = 8  # In what is timed as one step.


def ceiling_of(contender: Contender) -> Contender:
  """The matrix product in the contender's dtype on its cores."""
  dtype, cores = contender.compute_dtype, contender.cores
  name = f"matrix product, {dtype}, {cores} cores or a GPU"
  return Contender(name, "product", contender.recipe | {"dtype": dtype}, {}, {}, cores=cores)


def make_product(contender: Contender, cluster) -> Runner:
  """The fastest product that the installed libraries offer, of `product_flops` per step."""
  import tensorflow as tf

  on = "gpu" if tf.config.get_visible_devices("GPU") else "cpu"
  side, dtype = _SIDE[on], contender.recipe["dtype"]
  a = tf.cast(tf.random.normal([side, side], dtype=tf.float32), dtype)
  tf.config.experimental.enable_tensor_float_32_execution(False)
  products = [tf.function(lambda: tf.cast(tf.reduce_max(tf.matmul(a, a)), tf.float32))]
  if on == "cpu" and dtype == "float32":
    # NumPy's OpenBLAS: with AVX2 it is faster than oneDNN, with AVX-512 slower.
    matrix = a.numpy()
    products.append(lambda: (matrix @ matrix).max())
  product = min(products, key=_seconds)
  return Runner(lambda steps: [float(product()) for _ in range(_PRODUCTS * steps)][-1], passes=1)


def _seconds(product: Callable) -> float:
  """The shortest time of a few calls after the first."""
  float(product())
  each = []
  for _ in range(5):
    began = time.perf_counter()
    float(product())
    each.append(time.perf_counter() - began)
  return min(each)


def product_flops(gpu: bool) -> float:
  """FLOPs of one step of `make_product`."""
  return _PRODUCTS * 2 * _SIDE["gpu" if gpu else "cpu"] ** 3


@functools.cache  # Contenders often share a recipe.
def count_work(recipe: Recipe) -> dict[str, int]:
  """What an image costs, and what is trained.

  Returns:
    "forward_flops", "flops" (of the forward and backward pass) and trainable "parameters".
  """
  import keras

  from tf_largebatch.models.networks import build_model

  forward, first = 0, None
  model = build_model(recipe, usual_classes(recipe.network), "export")
  for layer in model.layers:
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
      positions = 1
      for side in layer.output.shape[1:-1]:
        positions *= side
      flops = 2 * positions * layer.kernel.shape.num_elements()
      first = flops if first is None else first
      forward += flops
  parameters = sum(variable.shape.num_elements() for variable in model.trainable_variables)
  return {"forward_flops": forward, "flops": 3 * forward - first, "parameters": parameters}
