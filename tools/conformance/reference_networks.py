"""The networks of the reference: two small ones, ResNet-20 and ResNet-50.

Shares no code with the package.
"""

from collections.abc import Callable

from tools.conformance.reference_tape import Node, Tape


def _conv_bn(ops: Tape, x: Node, name: str, stride: int = 1) -> Node:
  return ops.batch_norm(ops.convolution(x, f"{name}_conv", stride=stride), f"{name}_bn")


def _unit(ops: Tape, x: Node, name: str, stride: int = 1, *, activation: str = "relu") -> Node:
  return getattr(ops, activation)(_conv_bn(ops, x, name, stride))


def _logits(ops: Tape, x: Node) -> Node:
  return ops.dense(ops.global_average(x), "logits")


def _bottleneck(
  ops: Tape, x: Node, name: str, *, stride: int, projection: bool, activation: str = "relu"
) -> Node:
  """The block of §5.1: 1×1, 3×3 and 1×1, with the stride on the 3×3, not on the first 1×1."""
  y = _unit(ops, x, f"{name}_1", activation=activation)
  y = _unit(ops, y, f"{name}_2", stride, activation=activation)
  y = _conv_bn(ops, y, f"{name}_3")
  shortcut = _conv_bn(ops, x, f"{name}_shortcut", stride) if projection else x
  return getattr(ops, activation)(ops.add(y, shortcut))


def _basic(ops: Tape, x: Node, name: str, *, stride: int = 1, activation: str = "relu") -> Node:
  """Two 3×3; the shortcut of a strided block is He et al.'s option A, without parameters."""
  y = _unit(ops, x, f"{name}_1", stride, activation=activation)
  y = _conv_bn(ops, y, f"{name}_2")
  width = y.value.shape[-1]
  shortcut = x if stride == 1 else ops.subsample_and_pad(x, stride=stride, width=width)
  return getattr(ops, activation)(ops.add(y, shortcut))


# The small networks use tanh instead of ReLU. At a ReLU's kink, a float32 rounding error sometimes
# makes a gradient jump, so no tight limit would hold.


def _plain(ops: Tape, x: Node) -> Node:
  x = ops.tanh(ops.convolution(x, "conv1"))
  x = ops.tanh(ops.convolution(x, "conv2", stride=2))
  return _logits(ops, x)


def _small_residual(ops: Tape, x: Node) -> Node:
  x = _unit(ops, x, "stem", activation="tanh")
  x = _bottleneck(ops, x, "block1", stride=2, projection=True, activation="tanh")
  x = _basic(ops, x, "block2", activation="tanh")
  return _logits(ops, x)


def _resnet20(ops: Tape, x: Node) -> Node:
  x = _unit(ops, x, "stem")
  for stage in (1, 2, 3):
    for block in (1, 2, 3):
      stride = 2 if stage > 1 and block == 1 else 1
      x = _basic(ops, x, f"stage{stage}_block{block}", stride=stride)
  return _logits(ops, x)


def _resnet50(ops: Tape, x: Node) -> Node:
  x = _unit(ops, x, "stem", 2)
  x = ops.max_pool(x, size=3, stride=2)
  for stage, blocks in enumerate((3, 4, 6, 3), start=1):
    for block in range(1, blocks + 1):
      first = block == 1
      stride = 2 if stage > 1 and first else 1
      x = _bottleneck(ops, x, f"stage{stage}_block{block}", stride=stride, projection=first)
  return _logits(ops, x)


NETWORKS: dict[str, Callable[[Tape, Node], Node]] = {
  "plain": _plain,
  "small_residual": _small_residual,
  "resnet20": _resnet20,
  "resnet50": _resnet50,
}


def last_batch_norms(network: str) -> list[str]:
  """Returns the last batch normalisation of each residual block, whose γ starts at 0 (§5.1)."""
  if network == "small_residual":
    return ["block1_3_bn", "block2_2_bn"]
  blocks, last = {"plain": ((), 0), "resnet20": ((3, 3, 3), 2), "resnet50": ((3, 4, 6, 3), 3)}[
    network
  ]
  return [
    f"stage{stage}_block{block}_{last}_bn"
    for stage, count in enumerate(blocks, start=1)
    for block in range(1, count + 1)
  ]
