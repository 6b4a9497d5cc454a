"""A small vision transformer on Fashion-MNIST, from arrays, with AdamW. See README.md."""

import argparse

import keras
import tensorflow_datasets as tfds
from keras import layers, optimizers
from matplotlib.figure import Figure

import tf_largebatch as lb

parser = argparse.ArgumentParser()
parser.add_argument("--data_dir", default="data")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--picture", default="vision_transformer.png")
args = parser.parse_args()
k, n = 8, 32  # Workers, and examples per worker: the same on any number of devices.


class PositionEmbedding(layers.Layer):
  def build(self, shape):
    self.positions = self.add_weight(shape[1:], initializer="random_normal")

  def call(self, tokens):
    return tokens + self.positions


cluster = lb.read_cluster()
strategy = lb.make_strategy(cluster)
keras.utils.set_random_seed(0)
options = {"data_dir": args.data_dir, "as_supervised": True, "batch_size": -1}
train, test = tfds.as_numpy(tfds.load("fashion_mnist", split=["train", "test"], **options))

with strategy.scope():
  inputs = keras.Input([28, 28, 1])
  x = layers.Conv2D(64, 7, strides=7)(layers.Rescaling(1 / 255)(inputs))  # 16 patches of 7 × 7.
  x = PositionEmbedding()(layers.Reshape([16, 64])(x))
  for _ in range(4):
    y = layers.LayerNormalization()(x)
    x += layers.MultiHeadAttention(num_heads=4, key_dim=16, dropout=0.1)(y, y)
    y = layers.Dense(128, activation="gelu")(layers.LayerNormalization()(x))
    x += layers.Dropout(0.1)(layers.Dense(64)(y))
  x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
  model = keras.Model(inputs, layers.Dense(10)(x))
  rate = optimizers.schedules.CosineDecay(1e-3, len(train[0]) // (k * n) * args.epochs)
  optimizer = optimizers.AdamW(rate, weight_decay=0.05, global_clipnorm=1.0)
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(optimizer, loss, metrics=["accuracy"])

sizes = {"workers": k, "per_worker_batch_size": n, "epochs": args.epochs}
history = lb.fit(model, *train, **sizes, validation_data=test, verbose=2).history
print("test loss and accuracy:", *lb.evaluate(model, *test, verbose=0))

if cluster.is_chief:
  figure = Figure(figsize=(8, 3), layout="constrained")
  for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
    for key in (name, f"val_{name}"):
      axes.plot(range(1, args.epochs + 1), history[key], label=key)
    axes.legend()
  figure.savefig(args.picture, dpi=80)
