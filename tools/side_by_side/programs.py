"""Small Keras programs, each with a feature that depends on the cluster in stock Keras.

All compute in float64, so that rounding stays far below any other difference.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

CLASSES = 4
EPOCHS = 2
# A step: k workers of n examples for ours, a batch of kn for stock Keras.
WORKERS, PER_WORKER_BATCH_SIZE = 4, 4
VALIDATION_EXAMPLES = 37  # The last batch is partial and does not split evenly.
_IMAGE = (8, 8, 3)
_FEATURES = (6,)


class Examples(keras.metrics.Sum):
  """Counts the examples that the metrics of a model get to see."""

  def update_state(self, y_true, y_pred, sample_weight=None):
    super().update_state(keras.ops.ones_like(y_true))


class _Positions(keras.layers.Layer):
  """Adds an embedding of its own to each token of `[examples, tokens, width]`."""

  def build(self, shape):
    self.embedding = self.add_weight(shape=shape[1:], initializer="random_normal")

  def call(self, x):
    return x + self.embedding


def _resnet() -> keras.Model:
  """A residual block with BN, dropout, and flips inside the model."""
  layers = keras.layers
  image = keras.Input(_IMAGE)
  x = layers.RandomFlip("horizontal", seed=1)(image)
  x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x)))
  branch = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
  x = layers.ReLU()(layers.add([x, branch]))
  x = layers.Dropout(0.3, seed=2)(layers.GlobalAveragePooling2D()(x))
  return keras.Model(image, layers.Dense(CLASSES)(x))


def _mlp_with_bn() -> keras.Model:
  layers = keras.layers
  return keras.Sequential(
    [
      *(keras.Input(_FEATURES), layers.Dense(16, use_bias=False), layers.BatchNormalization()),
      *(layers.ReLU(), layers.Dense(CLASSES)),
    ]
  )


def _mlp() -> keras.Model:
  layers = keras.layers
  return keras.Sequential(
    [keras.Input(_FEATURES), layers.Dense(16, activation="relu"), layers.Dense(CLASSES)]
  )


def _vit() -> keras.Model:
  """A vision transformer of one block on 2 × 2 patches: no BN, no random numbers."""
  layers = keras.layers
  image = keras.Input(_IMAGE)
  x = layers.Reshape((4, 16))(layers.Conv2D(16, 4, 4)(image))
  x = _Positions()(x)
  y = layers.LayerNormalization()(x)
  x = layers.add([x, layers.MultiHeadAttention(2, 8)(y, y)])
  y = layers.Dense(32, activation="gelu")(layers.LayerNormalization()(x))
  x = layers.add([x, layers.Dense(16)(y)])
  return keras.Model(image, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


@dataclasses.dataclass(frozen=True)
class Program:
  """A model and what it is trained with.

  Attributes:
    title: names what is special.
    build: makes the model, in the strategy's scope.
    shape: of an example.
    examples: to train on.
    global_clipnorm: of the optimizer; None: no clipping.
  """

  title: str
  build: Callable[[], keras.Model]
  shape: tuple[int, ...]
  examples: int = 96
  global_clipnorm: float | None = None

  def compiled(self) -> keras.Model:
    """Returns the model with the same initial weights every time."""
    keras.utils.set_random_seed(0)
    model = self.build()
    model.compile(
      keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=self.global_clipnorm),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      metrics=["accuracy", Examples("examples")],
    )
    return model

  def data(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns (x, y) to train on and (x, y) to evaluate on."""
    rng = np.random.default_rng(0)
    count = self.examples + VALIDATION_EXAMPLES
    y = rng.integers(0, CLASSES, count)
    x = rng.normal(size=(count, *self.shape)) + y.reshape(-1, *[1] * len(self.shape)) / 2
    return (x[: self.examples], y[: self.examples]), (x[self.examples :], y[self.examples :])


PROGRAMS = {
  "resnet": Program("ResNet: BN, dropout, flips", _resnet, _IMAGE),
  "mlp_bn": Program("MLP: BN", _mlp_with_bn, _FEATURES),
  "vit": Program("ViT: no BN, no dropout", _vit, _IMAGE),
  "clipping": Program("MLP: clipped gradients", _mlp, _FEATURES, global_clipnorm=0.1),
  "partial": Program("MLP: partial last batch", _mlp, _FEATURES, examples=101),
}
