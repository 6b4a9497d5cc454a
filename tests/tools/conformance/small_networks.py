"""Random weights and images for narrow versions of the reference's networks."""

import math

import numpy as np

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 55.0, 50.0]
CLASSES = 5


def blocks(counts):
  """Returns (stage, block) of each residual block, counted from 1."""
  return [(s, b) for s, count in enumerate(counts, 1) for b in range(1, count + 1)]


def _layers(network):
  """Returns each layer as (name, kernel size, channels in, channels out), and the last width."""
  if network == "plain":
    return [("conv1", 3, 3, 4), ("conv2", 3, 4, 5)], 5
  if network == "small_residual":
    return [
      ("stem", 3, 3, 3),
      ("block1_1", 1, 3, 2),
      ("block1_2", 3, 2, 3),
      ("block1_3", 1, 3, 4),
      ("block1_shortcut", 1, 3, 4),
      ("block2_1", 3, 4, 2),
      ("block2_2", 3, 2, 4),
    ], 4
  layers = [("stem", 3 if network == "resnet20" else 7, 3, 2)]
  channels = 2
  if network == "resnet20":
    for stage, block in blocks((3, 3, 3)):
      width = {1: 2, 2: 5, 3: 8}[stage]  # Option A adds 3 channels each time, an odd number.
      name = f"stage{stage}_block{block}"
      layers += [(f"{name}_1", 3, channels, width), (f"{name}_2", 3, width, width)]
      channels = width
    return layers, channels
  for stage, block in blocks((3, 4, 6, 3)):
    name = f"stage{stage}_block{block}"
    layers += [(f"{name}_1", 1, channels, 2), (f"{name}_2", 3, 2, 2), (f"{name}_3", 1, 2, 4)]
    if block == 1:
      layers.append((f"{name}_shortcut", 1, channels, 4))
    channels = 4
  return layers, channels


def parameters(network, seed=0):
  """Returns random weights by name; layers are 2 to 8 channels wide."""
  rng = np.random.default_rng(seed)
  layers, features = _layers(network)
  values = {
    "logits/kernel": rng.normal(size=(features, CLASSES)),
    "logits/bias": rng.normal(size=CLASSES),
  }
  for name, size, channels, width in layers:
    conv = name if network == "plain" else f"{name}_conv"
    scale = math.sqrt(2 / (size * size * channels))
    values[f"{conv}/kernel"] = rng.normal(scale=scale, size=(size, size, channels, width))
    if network != "plain":
      values[f"{name}_bn/gamma"] = rng.uniform(0.5, 1.5, width)
      values[f"{name}_bn/beta"] = rng.normal(scale=0.3, size=width)
  return values


def batch(*shape, size=8, seed=1):
  """Returns random images `[*shape, size, size, 3]` and labels `[*shape]`."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*shape, size, size, 3)), rng.integers(0, CLASSES, shape)
