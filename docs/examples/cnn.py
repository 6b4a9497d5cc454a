"""A CNN on CIFAR-10 with batch normalisation, dropout and random flips. See README.md."""

import argparse

import keras
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers
from matplotlib.figure import Figure

import tf_largebatch as lb

parser = argparse.ArgumentParser()
parser.add_argument("--data_dir", default="data")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--picture", default="cnn.png")
args = parser.parse_args()
k, n = 8, 64  # Workers, and examples per worker: the same on any number of devices.

cluster = lb.read_cluster()
strategy = lb.make_strategy(cluster)
keras.utils.set_random_seed(0)
data = tfds.load("cifar10", data_dir=args.data_dir, as_supervised=True)
train, test = data["train"].cache(), data["test"].batch(500).cache()


def training_data(epoch):
  """Returns the same batches on every task and whenever a resumed run repeats the epoch."""

  def flip(index, example):
    return tf.image.stateless_random_flip_left_right(example[0], (epoch, index)), example[1]

  return train.shuffle(len(train), seed=epoch).enumerate().map(flip).batch(k * n)


with strategy.scope():
  model = keras.Sequential([layers.Rescaling(1 / 127.5, offset=-1)])
  for filters in (32, 64, 128):
    model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
    model.add(layers.BatchNormalization(momentum=0.9))
    model.add(layers.ReLU())
    model.add(layers.MaxPooling2D())
  model.add(keras.Sequential([layers.Flatten(), layers.Dropout(0.3), layers.Dense(10)]))
  steps, decays = len(train) // (k * n), (0.6 * args.epochs, 0.85 * args.epochs)
  rate = lb.LinearScalingSchedule(steps, k * n, 0.02, warmup_epochs=1, decay_epochs=decays)
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(lb.MomentumCorrectedSGD(rate, weight_decay=1e-4), loss, metrics=["accuracy"])

sizes = {"workers": k, "per_worker_batch_size": n, "epochs": args.epochs}
history = lb.fit(model, training_data, **sizes, validation_data=test, verbose=2).history
print("test loss and accuracy:", *lb.evaluate(model, test, verbose=0))

if cluster.is_chief:
  figure = Figure(figsize=(8, 3), layout="constrained")
  for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
    for key in (name, f"val_{name}"):
      axes.plot(range(1, args.epochs + 1), history[key], label=key)
    axes.legend()
  figure.savefig(args.picture, dpi=80)
