"""The ResNets of Goyal et al. for ImageNet and of He et al. for CIFAR, in plain Keras layers.

The caller supplies the normalisation layer, so one definition builds both the network that is
trained (`PerWorkerBatchNormalization`) and the one that is exported
(`keras.layers.BatchNormalization`), with the weights in the same order. Strided convolutions and
pooling pad both sides equally, as in Caffe2 and PyTorch; Keras' "same" pads stride-2 layers on one
side only, which is a different network.

Sources: Goyal et al. 2017 (arXiv 1706.02677), §5.1; He et al. 2016 (arXiv 1512.03385), §3.3, §3.4
and §4.2; He et al. 2015 (arXiv 1502.01852) for the initialisation.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import NETWORKS, Stages


@dataclasses.dataclass(frozen=True)
class Layers:
  """Makes the layers of a residual network, with the options that they share.

  Attributes:
    normalization: called as `normalization(gamma_initializer=…, dtype=…, name=…)` for each batch
      normalisation.
    last_gamma: initial γ of the last batch normalisation in each residual block; 0 in §5.1.
    dtype: Keras dtype policy of the residual blocks and the stem ("float32", "mixed_bfloat16", …).
    seed: seed of the initial weights; each layer's weights depend on (seed, layer name) only.
  """

  normalization: Callable[..., keras.layers.Layer]
  last_gamma: float = 0.0
  dtype: str = "float32"
  seed: int = 0

  def seed_of(self, name: str) -> int:
    """Returns a layer's seed, which does not depend on the order of construction."""
    return zlib.crc32(f"{self.seed}/{name}".encode())

  def convolution(self, x, filters: int, size: int, strides: int, name: str):
    if strides > 1 and size > 1:
      x = keras.layers.ZeroPadding2D((size - 1) // 2, dtype=self.dtype, name=f"{name}_pad")(x)
    return keras.layers.Conv2D(
      filters,
      size,
      strides,
      padding="same" if strides == 1 else "valid",
      use_bias=False,
      # He et al. 2015, eq. 14: normal with variance 2 / fan-out.
      kernel_initializer=keras.initializers.VarianceScaling(
        2.0, "fan_out", "untruncated_normal", seed=self.seed_of(name)
      ),
      dtype=self.dtype,
      name=name,
    )(x)

  def normalize(self, x, name: str, gamma: float = 1.0):
    return self.normalization(
      gamma_initializer=keras.initializers.Constant(gamma), dtype=self.dtype, name=name
    )(x)

  def relu(self, x, name: str):
    return keras.layers.ReLU(dtype=self.dtype, name=name)(x)

  def add(self, x, y, name: str):
    return keras.layers.Add(dtype=self.dtype, name=name)([x, y])

  def unit(self, x, filters: int, size: int, strides: int, name: str):
    """Convolution, batch normalisation, ReLU."""
    x = self.convolution(x, filters, size, strides, f"{name}_conv")
    return self.relu(self.normalize(x, f"{name}_bn"), f"{name}_relu")

  def last_unit(self, x, shortcut, filters: int, size: int, name: str, block: str):
    """A block's last convolution and batch normalisation, the sum with the shortcut, ReLU."""
    x = self.convolution(x, filters, size, 1, f"{name}_conv")
    x = self.normalize(x, f"{name}_bn", self.last_gamma)
    return self.relu(self.add(x, shortcut, f"{block}_add"), f"{block}_out")


def _basic_body(layers: Layers, x, stages: Stages):
  x = layers.unit(x, stages.width, 3, 1, "stem")
  for name, filters, strides in _blocks(stages):
    shortcut = x
    if strides > 1:
      # Option A (He et al. 2016, §3.3): every second pixel, the new channels zero, no parameters.
      shortcut = shortcut[:, ::2, ::2, :]
      extra = filters - x.shape[-1]
      pads = [[0, 0], [0, 0], [0, 0], [extra // 2, extra - extra // 2]]
      shortcut = keras.ops.pad(shortcut, pads)
    y = layers.unit(x, filters, 3, strides, f"{name}_1")
    x = layers.last_unit(y, shortcut, filters, 3, f"{name}_2", name)
  return x


def _bottleneck_body(layers: Layers, x, stages: Stages):
  x = layers.unit(x, stages.width, 7, 2, "stem")
  x = keras.layers.ZeroPadding2D(1, dtype=layers.dtype, name="stem_pool_pad")(x)
  x = keras.layers.MaxPooling2D(3, 2, dtype=layers.dtype, name="stem_pool")(x)
  for name, filters, strides in _blocks(stages):
    shortcut = x
    if x.shape[-1] != 4 * filters:
      shortcut = layers.convolution(x, 4 * filters, 1, strides, f"{name}_shortcut_conv")
      shortcut = layers.normalize(shortcut, f"{name}_shortcut_bn")
    y = layers.unit(x, filters, 1, 1, f"{name}_1")
    # The stride is on the 3×3 convolution (§5.1); Keras' ResNet50 has it on the 1×1 before.
    y = layers.unit(y, filters, 3, strides, f"{name}_2")
    x = layers.last_unit(y, shortcut, 4 * filters, 1, f"{name}_3", name)
  return x


def _blocks(stages: Stages):
  """Yields (name, filters of the 3×3 convolution, strides) of each residual block."""
  for stage, blocks in enumerate(stages.blocks):
    for block in range(blocks):
      strides = 2 if stage > 0 and block == 0 else 1
      yield f"stage{stage + 1}_block{block + 1}", stages.width * 2**stage, strides


# By `Stages.block`.
_BODIES = {"basic": _basic_body, "bottleneck": _bottleneck_body}


def build(
  network: str,
  layers: Layers,
  *,
  input_shape: tuple[int, int, int],
  num_classes: int,
  channel_mean: Sequence[float],
  channel_std: Sequence[float],
) -> keras.Model:
  """Builds a network that maps raw pixels to logits.

  Args:
    network: one of `recipe.NETWORKS`.
    layers: makes the layers. Input normalisation, global pooling, the dense layer and the logits
      are computed in the variable dtype of its policy.
    input_shape: (H, W, C) of an image.
    num_classes: number of logits.
    channel_mean, channel_std: mean and standard deviation of each channel over the training images,
      in pixel values (0 to 255). The model normalises its input by them.

  Returns:
    A `keras.Model` that maps images `[batch, H, W, C]` in 0 to 255 to logits
    `[batch, num_classes]`.

  Raises:
    UserError (a ValueError): `network` is unknown.
    ValueError: channel_mean or channel_std does not have C values.
  """
  if network not in NETWORKS:
    raise UserError(f"network={network!r} is unknown; use one of {', '.join(NETWORKS)}.")
  variable_dtype = keras.dtype_policies.get(layers.dtype).variable_dtype
  inputs = keras.Input(input_shape, dtype=variable_dtype, name="image")
  x = normalize_channels(inputs, channel_mean, channel_std, variable_dtype)
  stages = NETWORKS[network]
  x = _BODIES[stages.block](layers, x, stages)
  x = keras.layers.GlobalAveragePooling2D(dtype=variable_dtype, name="pool")(x)
  logits = keras.layers.Dense(
    num_classes,
    kernel_initializer=keras.initializers.RandomNormal(0.0, 0.01, seed=layers.seed_of("logits")),
    dtype=variable_dtype,
    name="logits",
  )(x)
  return keras.Model(inputs, logits, name=network)


def normalize_channels(x, channel_mean: Sequence[float], channel_std: Sequence[float], dtype: str):
  """(x − mean) / std, per channel, as x · (1 / std) − mean / std."""
  mean, std = np.asarray(channel_mean, np.float64), np.asarray(channel_std, np.float64)
  channels = x.shape[-1]
  if not mean.shape == std.shape == (channels,):
    raise ValueError(
      f"channel_mean and channel_std must have one value for each of {channels} channels, not "
      f"{len(mean)} and {len(std)}."
    )
  # float64 arrays, not lists: Keras rounds lists to float32, even in a float64 network.
  return keras.layers.Rescaling(
    scale=1 / std, offset=-mean / std, dtype=dtype, name="normalize_channels"
  )(x)
