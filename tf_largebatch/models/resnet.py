"""The paper's ResNets for ImageNet and He et al.'s for CIFAR, of plain Keras layers.

The normalisation layer is handed in, so that one definition gives the network that is trained
(`PerWorkerBatchNormalization`) and the one that is exported (`keras.layers.BatchNormalization`),
with weights in the same order. Strided convolutions and poolings pad both sides alike, as Caffe2
and PyTorch do; Keras' "same" pads stride-2 layers on one side only, which is another network.

Sources: Goyal et al. 2017 (arXiv 1706.02677), §5.1; He et al. 2016 (arXiv 1512.03385), §3.4, §4.2;
He et al. 2015 (arXiv 1502.01852) for the initialisation.
"""

import zlib
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import NETWORKS

# Bottleneck blocks in each of the four stages.
_IMAGENET_STAGES = {
  "resnet50": (3, 4, 6, 3),
  "resnet101": (3, 4, 23, 3),
  "resnet152": (3, 8, 36, 3),
}
# Channels of the first stage, and basic blocks in each of the three: 6·blocks + 2 layers. ResNet-8,
# ours, is of the same design with half the channels: a run of it takes minutes on a CPU's core.
_CIFAR_STAGES = {
  "resnet8": (8, (1, 1, 1)),
  "resnet20": (16, (3, 3, 3)),
  "resnet32": (16, (5, 5, 5)),
  "resnet56": (16, (9, 9, 9)),
}


class _Layers:
  """The layers that all the networks are made of, with what they share (dtype, seed, BN)."""

  def __init__(self, normalization: Callable, last_gamma: float, dtype: str, seed: int):
    self.normalization = normalization
    self.last_gamma = last_gamma
    self.dtype = dtype
    self.seed = seed

  def seed_of(self, name: str) -> int:
    """A seed that depends on (seed, layer) alone, never on the order of construction."""
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
    """Convolution, BN, ReLU."""
    x = self.convolution(x, filters, size, strides, f"{name}_conv")
    return self.relu(self.normalize(x, f"{name}_bn"), f"{name}_relu")

  def last_unit(self, x, shortcut, filters: int, size: int, name: str, block: str):
    """The block's last convolution and BN (whose γ starts at last_gamma), sum, ReLU."""
    x = self.convolution(x, filters, size, 1, f"{name}_conv")
    x = self.normalize(x, f"{name}_bn", self.last_gamma)
    return self.relu(self.add(x, shortcut, f"{block}_add"), f"{block}_out")


def _bottleneck_network(layers: _Layers, x, stages: Sequence[int]):
  x = layers.unit(x, 64, 7, 2, "stem")
  x = keras.layers.ZeroPadding2D(1, dtype=layers.dtype, name="stem_pool_pad")(x)
  x = keras.layers.MaxPooling2D(3, 2, dtype=layers.dtype, name="stem_pool")(x)
  for stage, blocks in enumerate(stages):
    filters = 64 * 2**stage
    for block in range(blocks):
      name = f"stage{stage + 1}_block{block + 1}"
      strides = 2 if stage > 0 and block == 0 else 1
      shortcut = x
      if block == 0:
        shortcut = layers.convolution(x, 4 * filters, 1, strides, f"{name}_shortcut_conv")
        shortcut = layers.normalize(shortcut, f"{name}_shortcut_bn")
      y = layers.unit(x, filters, 1, 1, f"{name}_1")
      # The stride is on the 3×3 (§5.1); Keras' ResNet50 has it on the 1×1 before.
      y = layers.unit(y, filters, 3, strides, f"{name}_2")
      x = layers.last_unit(y, shortcut, 4 * filters, 1, f"{name}_3", name)
  return x


def _basic_network(layers: _Layers, x, width: int, stages: Sequence[int]):
  x = layers.unit(x, width, 3, 1, "stem")
  for stage, blocks in enumerate(stages):
    filters = width * 2**stage
    for block in range(blocks):
      name = f"stage{stage + 1}_block{block + 1}"
      strides = 2 if stage > 0 and block == 0 else 1
      shortcut = x
      if strides > 1:
        # Option A (He et al. 2016, §3.3): every second pixel, new channels zero, no parameters.
        shortcut = shortcut[:, ::2, ::2, :]
        extra = filters - x.shape[-1]
        pads = [[0, 0], [0, 0], [0, 0], [extra // 2, extra - extra // 2]]
        shortcut = keras.ops.pad(shortcut, pads)
      y = layers.unit(x, filters, 3, strides, f"{name}_1")
      x = layers.last_unit(y, shortcut, filters, 3, f"{name}_2", name)
  return x


def build(
  network: str,
  *,
  input_shape: tuple[int, int, int],
  num_classes: int,
  normalization: Callable[..., keras.layers.Layer],
  channel_mean: Sequence[float],
  channel_std: Sequence[float],
  last_gamma: float = 0.0,
  dtype: str = "float32",
  seed: int = 0,
) -> keras.Model:
  """Builds a network from raw pixels to logits.

  Args:
    network: one of `recipe.NETWORKS`.
    input_shape: (H, W, C) of an image.
    num_classes: width of the logits.
    normalization: called as `normalization(gamma_initializer=…, dtype=…, name=…)` for each BN.
    channel_mean, channel_std: per-channel mean and standard deviation of the training images, in
      pixel units (0 to 255); the model subtracts and divides, so it takes raw pixels.
    last_gamma: initial γ of the last BN of every residual block; the paper's 0 (§5.1).
    dtype: Keras dtype policy of the body ("float32", "mixed_bfloat16", …); input normalisation,
      pooling, the dense layer and the logits are computed in the policy's variable dtype.
    seed: of the initial weights; each layer's depend on (seed, layer name) alone.

  Returns:
    A `keras.Model`: images `[batch, H, W, C]` in 0 to 255 → logits `[batch, num_classes]`.

  Raises:
    UserError (a ValueError): an unknown network.
  """
  if network not in NETWORKS:
    raise UserError(f"network={network!r} is unknown; one of {', '.join(NETWORKS)} would do.")
  variable_dtype = keras.dtype_policies.get(dtype).variable_dtype
  layers = _Layers(normalization, last_gamma, dtype, seed)
  inputs = keras.Input(input_shape, dtype=variable_dtype, name="image")
  mean, std = np.asarray(channel_mean, np.float64), np.asarray(channel_std, np.float64)
  if not mean.shape == std.shape == (input_shape[-1],):
    raise ValueError(
      f"channel_mean and channel_std must have one value for each of {input_shape[-1]} channels, "
      f"not {len(mean)} and {len(std)}."
    )
  x = keras.layers.Rescaling(
    # Arrays of float64: Keras would round lists to float32, also in a float64 network.
    scale=1 / std,
    offset=-mean / std,
    dtype=variable_dtype,
    name="normalize_channels",
  )(inputs)
  if network in _CIFAR_STAGES:
    x = _basic_network(layers, x, *_CIFAR_STAGES[network])
  else:
    x = _bottleneck_network(layers, x, _IMAGENET_STAGES[network])
  x = keras.layers.GlobalAveragePooling2D(dtype=variable_dtype, name="pool")(x)
  logits = keras.layers.Dense(
    num_classes,
    kernel_initializer=keras.initializers.RandomNormal(0.0, 0.01, seed=layers.seed_of("logits")),
    dtype=variable_dtype,
    name="logits",
  )(x)
  return keras.Model(inputs, logits, name=network)
