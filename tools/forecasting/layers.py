"""The layers of the ResNets: how many gradients each has, and its share of backprop."""

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import NETWORKS


def usual_classes(network: str) -> int:
  """Returns the classes of the data that a network was designed for: ImageNet's or CIFAR-10's.

  Raises:
    UserError: it is not one of `recipe.NETWORKS`.
  """
  if network not in NETWORKS:
    raise UserError(f"network={network} is not known here; use one of {', '.join(NETWORKS)}.")
  return 1000 if NETWORKS[network].block == "bottleneck" else 10


def network_layers(network: str, image_size: int) -> list[tuple[int, int]]:
  """Returns (trainable parameters, multiplications per image) of each layer, first to last.

  A layer is a convolution with its batch normalisation, or the dense layer for `usual_classes`.
  This repeats the structure of `models.resnet`, because Keras takes seconds to build a network.
  """
  stages, found = NETWORKS[network], []

  def convolution(channels: int, filters: int, kernel: int, side: int):
    weights = kernel**2 * channels * filters
    found.append((weights + 2 * filters, weights * side**2))

  basic = stages.block == "basic"
  channels, side = stages.width, image_size if basic else -(-image_size // 2)
  convolution(3, channels, 3 if basic else 7, side)
  side = side if basic else -(-side // 2)  # After the pooling.
  for stage, blocks in enumerate(stages.blocks):
    filters = stages.width * 2**stage
    for block in range(blocks):
      before = side
      if stage and not block:
        side = -(-side // 2)
      units = [(filters, 1, before), (filters, 3, side), (4 * filters, 1, side)]
      if basic:
        units = [(filters, 3, side)] * 2
      elif not block:
        convolution(channels, 4 * filters, 1, side)
      for width, kernel, out in units:
        convolution(channels, width, kernel, out)
        channels = width
  classes = usual_classes(network)
  return [*found, ((channels + 1) * classes, channels * classes)]


def gradient_layers(network: str, image_size: int, size: float | None) -> list[tuple[float, float]]:
  """Returns `Step.layers` of a network: bytes by parameters, time by multiplications.

  Args:
    network: one of `recipe.NETWORKS`.
    image_size: height and width.
    size: bytes of all gradients; None for 4 bytes (float32) per parameter.
  """
  layers = network_layers(network, image_size)
  parameters, work = (sum(column) for column in zip(*layers, strict=True))
  scale = 4 if size is None else size / parameters
  return [(scale * mine, cost / work) for mine, cost in layers]
