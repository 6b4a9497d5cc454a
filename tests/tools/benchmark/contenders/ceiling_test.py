"""The FLOPs of a step."""

from tf_largebatch.recipe import Recipe
from tools.benchmark.contenders.ceiling import count_work


def test_flops_of_resnet50():
  """Compares with the multiply-adds of each convolution in He et al.'s table of the layers."""
  recipe = Recipe(
    dataset="synthetic",
    image_size=224,
    workers=2,
    channel_mean=(0.0, 0.0, 0.0),
    channel_std=(1.0, 1.0, 1.0),
  )
  stem = 112 * 112 * 7 * 7 * 3 * 64
  total = stem + 2048 * 1000
  inputs = 64
  for stage, (blocks, side) in enumerate(zip((3, 4, 6, 3), (56, 28, 14, 7), strict=True)):
    filters = 64 * 2**stage
    for block in range(blocks):
      # The first 1×1 convolution precedes the stride of the 3×3.
      before = 2 * side if stage and not block else side
      total += before**2 * inputs * filters + side**2 * (9 * filters**2 + 4 * filters**2)
      if not block:
        total += side**2 * inputs * 4 * filters
      inputs = 4 * filters
  assert total == 4_089_184_256
  assert count_work(recipe) == {
    "forward_flops": 2 * total,
    "flops": 2 * (3 * total - stem),
    "parameters": 25_557_032,
  }
