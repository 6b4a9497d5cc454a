"""Examples that `fit` and `evaluate` get as arrays."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Examples in memory.

  Attributes:
    parts: (x,), (x, y) or (x, y, sample_weight), each an array or nested arrays `[examples, …]`.
  """

  parts: tuple

  @property
  def size(self) -> int:
    return len(tf.nest.flatten(self.parts)[0])

  def take(self, first: int, last: int) -> "Arrays":
    return Arrays(tf.nest.map_structure(lambda a: a[first:last], self.parts))

  def batches(self, size: int, order: tf.Tensor | None = None) -> tf.data.Dataset:
    """Batches of the examples in the given order (int64 `[examples]`), the last one partial."""
    parts = tf.nest.map_structure(tf.convert_to_tensor, self.parts)
    if order is None:
      return tf.data.Dataset.from_tensor_slices(parts).batch(size)
    indices = tf.data.Dataset.from_tensor_slices(order).batch(size)
    return indices.map(lambda i: tf.nest.map_structure(lambda a: tf.gather(a, i), parts))


def as_arrays(x, y, sample_weight) -> Arrays | None:
  """The examples, if they are arrays; None if x is another source of data.

  Raises:
    UserError: x already holds y, x is neither, or the sizes differ.
  """
  if isinstance(x, tf.data.Dataset) or (callable(x) and not hasattr(x, "__array__")):
    if y is not None or sample_weight is not None:
      raise UserError(
        "y and sample_weight must be part of the data set's elements: (x, y) or (x, y, "
        "sample_weight)."
      )
    return None
  if x is None or isinstance(x, keras.utils.PyDataset) or not _is_arrays(x):
    raise UserError(
      f"x is {type(x).__name__}; give arrays, a tf.data.Dataset whose elements are batches, or a "
      "function that returns the data set of an epoch."
    )
  if y is None and sample_weight is not None:
    raise UserError("sample_weight was given without y.")
  parts = (x,) if y is None else (x, y) if sample_weight is None else (x, y, sample_weight)
  parts = keras.tree.lists_to_tuples(parts)  # tf.data would stack lists.
  parts = tf.nest.map_structure(_to_array, parts)
  sizes = {len(a) for a in tf.nest.flatten(parts)}
  if len(sizes) > 1:
    raise UserError(f"The arrays differ in their number of examples: {sorted(sizes)}.")
  return Arrays(parts)


def _is_arrays(x) -> bool:
  leaves = tf.nest.flatten(x)
  return bool(leaves) and all(hasattr(leaf, "__array__") and np.ndim(leaf) for leaf in leaves)


def _to_array(array):
  if isinstance(array, tf.Tensor):
    return array
  array = np.asarray(array)
  # As Keras does: float64 data is computed on in floatx.
  return array.astype(keras.config.floatx()) if array.dtype == np.float64 else array


def split(arrays: Arrays, fraction: float) -> tuple[Arrays, Arrays]:
  """Splits off the last `fraction` for validation, as Keras does: before any shuffling."""
  first = int(np.floor(arrays.size * (1 - fraction)))
  if not 0 < first < arrays.size:
    raise UserError(
      f"validation_split={fraction} leaves training or validation of the {arrays.size} examples "
      "empty."
    )
  return arrays.take(0, first), arrays.take(first, arrays.size)
