"""PyTorch as a contender, eager or compiled."""

import os

from tf_largebatch.recipe import Recipe
from tools.benchmark.contenders.contender import Contender, Runner, random_batch
from tools.forecasting.layers import usual_classes


def make_torch(contender: Contender, cluster) -> Runner:
  import numpy as np
  import torch

  recipe = Recipe(**contender.recipe)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.backends.cudnn.benchmark = True
  model = _resnet50(torch.nn).to(device).to(memory_format=torch.channels_last)
  if contender.kind == "torch_compiled":
    model = torch.compile(model)
  optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
  images, labels = random_batch(recipe, recipe.per_worker_batch_size)
  images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
  labels = torch.from_numpy(labels.astype(np.int64)).to(device)
  mean, std = (
    torch.tensor(values, device=device, dtype=torch.float32).reshape(1, -1, 1, 1)
    for values in (recipe.channel_mean, recipe.channel_std)
  )
  dtype = getattr(torch, recipe.dtype)
  scaler = torch.amp.GradScaler(device, enabled=recipe.dtype == "float16")

  def step() -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    for _ in range(recipe.workers):
      with torch.autocast(device, dtype=dtype, enabled=recipe.dtype != "float32"):
        loss = torch.nn.functional.cross_entropy(model((images - mean) / std), labels)
      scaler.scale(loss / recipe.workers).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss

  return Runner(lambda steps: [float(step()) for _ in range(steps)][-1], recipe.workers)


def _resnet50(nn):
  """torchvision's ResNet-50: stride in the 3×3 convolutions, no biases. Needs no torchvision."""

  class Bottleneck(nn.Module):
    def __init__(self, inputs: int, filters: int, stride: int):
      super().__init__()
      outputs = 4 * filters
      self.body = nn.Sequential(
        *_unit(nn, inputs, filters, 1, 1),
        nn.ReLU(inplace=True),
        *_unit(nn, filters, filters, 3, stride),
        nn.ReLU(inplace=True),
        *_unit(nn, filters, outputs, 1, 1),
      )
      self.shortcut = nn.Identity()
      if inputs != outputs:
        self.shortcut = nn.Sequential(*_unit(nn, inputs, outputs, 1, stride))
      self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
      return self.relu(self.body(x) + self.shortcut(x))

  layers = [*_unit(nn, 3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
  inputs = 64
  for stage, blocks in enumerate((3, 4, 6, 3)):
    for block in range(blocks):
      filters = 64 * 2**stage
      layers.append(Bottleneck(inputs, filters, 2 if stage and not block else 1))
      inputs = 4 * filters
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, usual_classes("resnet50"))]
  return nn.Sequential(*layers, *head)


def _unit(nn, inputs: int, outputs: int, size: int, stride: int):
  convolution = nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=False)
  return convolution, nn.BatchNorm2d(outputs)
