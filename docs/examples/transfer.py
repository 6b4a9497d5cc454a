"""A new head on a frozen network of `keras.applications`. See README.md."""

import argparse

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers
from matplotlib.figure import Figure

import tf_largebatch as lb

parser = argparse.ArgumentParser()
parser.add_argument("--data_dir", default="data")
parser.add_argument("--dataset", default="fashion_mnist")
parser.add_argument("--weights", help="a file, or imagenet; default: train them and save a file")
parser.add_argument("--save", default="network.weights.h5")
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--picture", default="transfer.png")
args = parser.parse_args()
k, n = 8, 32  # Workers, and examples per worker: the same on any number of devices.

cluster = lb.read_cluster()
strategy = lb.make_strategy(cluster)
keras.utils.set_random_seed(0)
options = {"split": ["train", "test"], "data_dir": args.data_dir, "as_supervised": True}
train, test = (
  data.map(lambda x, y: (tf.image.resize(x, [32, 32]) * tf.ones([3]), y)).cache()  # Grey to RGB.
  for data in tfds.load(args.dataset, **options)
)
train, test = train.shuffle(len(train), seed=0).batch(k * n), test.batch(500)

with strategy.scope():
  options = {"input_shape": (32, 32, 3), "include_top": False, "pooling": "avg"}
  network = keras.applications.MobileNetV3Small(weights=args.weights, **options)
  network.trainable = not args.weights  # Frozen, its batch normalisation uses what is stored.
  for layer in network.layers:
    if isinstance(layer, layers.BatchNormalization):
      layer.momentum = 0.9  # 0.999 is for longer training.
  model = keras.Sequential([network, layers.Dropout(0.2), layers.Dense(10)])
  rate = lb.LinearScalingSchedule(len(train), k * n, decay_epochs=(0.75 * args.epochs,))
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(lb.MomentumCorrectedSGD(rate, weight_decay=1e-4), loss, metrics=["accuracy"])

before = network.get_weights()
sizes = {"workers": k, "per_worker_batch_size": n, "epochs": args.epochs}
history = lb.fit(model, train, **sizes, validation_data=test, verbose=2).history
print("test loss and accuracy:", *lb.evaluate(model, test, verbose=0))
print("network unchanged:", all(map(np.array_equal, before, network.get_weights())))

if cluster.is_chief:
  if not args.weights:
    network.save_weights(args.save)
  figure = Figure(figsize=(8, 3), layout="constrained")
  for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
    for key in (name, f"val_{name}"):
      axes.plot(range(1, args.epochs + 1), history[key], label=key)
    axes.legend()
  figure.savefig(args.picture, dpi=80)
