"""Evaluation on any batch size."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.small_runs import RECIPE
from tf_largebatch.data import sources
from tf_largebatch.training.evaluation import make_evaluation


@pytest.mark.parametrize("batch_size", [4, 5, 11])
def test_an_evaluation_is_the_mean_over_the_examples_without_padding(batch_size):
  """Copies of the last of 11 examples, which is misclassified, pad the last batch of 4 or 5."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(11, 3)).astype(np.float32)
  labels = np.argmax(logits, axis=1)
  labels[[2, 10]] = np.argmin(logits[[2, 10]], axis=1)
  logits[10] *= 9
  images = rng.integers(0, 256, (11, 1, 1, 1)).astype(np.uint8)
  images[:, 0, 0, 0] = np.arange(11)
  recipe = dataclasses.replace(RECIPE, image_size=1, augmentation="none", channel_mean=(0.0,))
  source = sources.ArraySource(images, labels, 3)
  inputs = keras.Input((1, 1, 1))
  table = keras.layers.Embedding(11, 3, embeddings_initializer=keras.initializers.Constant(logits))
  model = keras.Model(inputs, keras.layers.Reshape((3,))(table(inputs)))
  strategy = tf.distribute.get_strategy()
  found = make_evaluation(strategy, model, recipe, source, batch_size)()
  losses = np.log(np.exp(logits.astype(np.float64)).sum(1)) - logits[np.arange(11), labels]
  assert found["error"] == pytest.approx(2 / 11, rel=1e-6)
  assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
