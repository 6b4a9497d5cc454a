"""The layers of the networks against those that Keras builds."""

import math

import keras
import pytest

from tests.tools.forecasting.examples import CLOSE
from tf_largebatch.models import resnet
from tools.forecasting.layers import gradient_layers, network_layers


@pytest.mark.parametrize(
  "network, parameters", [("resnet50", 25_557_032), ("resnet20", 269_722), ("resnet8", 19_218)]
)
def test_layers_are_those_of_the_network(network, parameters):
  side, classes = (224, 1000) if network == "resnet50" else (32, 10)
  model = resnet.build(
    network,
    resnet.Layers(keras.layers.BatchNormalization),
    input_shape=(side, side, 3),
    num_classes=classes,
    channel_mean=(0, 0, 0),
    channel_std=(1, 1, 1),
  )
  expected = []
  for layer in model.layers:
    if isinstance(layer, keras.layers.Conv2D):
      weights, (_, height, width, filters) = math.prod(layer.kernel.shape), layer.output.shape
      expected.append((weights + 2 * filters, weights * height * width))
  *convolutions, dense = network_layers(network, side)
  assert sorted(convolutions) == sorted(expected)
  assert convolutions[0] == expected[0]
  kernel, bias = model.layers[-1].get_weights()
  assert dense == (kernel.size + bias.size, kernel.size)
  assert sum(count for count, _ in (*convolutions, dense)) == parameters
  layers = gradient_layers(network, side, 1e8)
  assert sum(size for size, _ in layers) == CLOSE(1e8)
  assert sum(share for _, share in layers) == CLOSE(1)
  assert gradient_layers(network, side, None)[-1][0] == 4 * dense[0]
