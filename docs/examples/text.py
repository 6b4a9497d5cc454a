"""A bag-of-words classifier of generated documents, whose best accuracy is known. See README.md."""

import argparse

import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure

import tf_largebatch as lb

parser = argparse.ArgumentParser()
parser.add_argument("--documents", type=int, default=60_000)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--picture", default="text.png")
args = parser.parse_args()
k, n = 8, 128  # Workers, and examples per worker: the same on any number of devices.

# Ten topics use 1000 words with different frequencies; a document has 10 to 40 words, then zeros.
random = np.random.default_rng(0)
frequencies = np.exp(0.6 * random.normal(size=[10, 1000])) / np.arange(1, 1001)
frequencies /= frequencies.sum(axis=1, keepdims=True)
topics = random.integers(10, size=args.documents)
words = np.zeros([args.documents, 40], np.int32)
for row, topic in zip(words, topics, strict=True):
  length = random.integers(10, 41)
  row[:length] = 1 + random.choice(1000, length, p=frequencies[topic])
# The Bayes classifier, which knows the frequencies: no other is more often right.
log_frequencies = np.insert(np.log(frequencies), 0, 0.0, axis=1)
scores = [log_frequencies[:, row].sum(axis=1) for row in words]
test = args.documents // 6
best = np.mean(np.argmax(scores, axis=1)[-test:] == topics[-test:])

cluster = lb.read_cluster()
with lb.make_strategy(cluster).scope():
  keras.utils.set_random_seed(0)
  model = keras.Sequential(
    [layers.Embedding(1001, 32, mask_zero=True), layers.GlobalAveragePooling1D(), layers.Dense(10)]
  )
  rate = lb.LinearScalingSchedule(
    (args.documents - test) // (k * n), k * n, 1.0, warmup_epochs=1, decay_epochs=()
  )
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(lb.MomentumCorrectedSGD(rate), loss, metrics=["accuracy"])

train, test = (words[:-test], topics[:-test]), (words[-test:], topics[-test:])
sizes = {"workers": k, "per_worker_batch_size": n, "epochs": args.epochs}
history = lb.fit(model, *train, **sizes, validation_data=test, verbose=2).history
print("test loss and accuracy:", *lb.evaluate(model, *test, verbose=0), "of at most", best)

if cluster.is_chief:
  axes = (figure := Figure(figsize=(5, 3), layout="constrained")).subplots()
  for key in ("accuracy", "val_accuracy"):
    axes.plot(range(1, args.epochs + 1), history[key], label=key)
  axes.axhline(best, color="grey", linestyle="--", label="Bayes classifier")
  axes.legend()
  figure.savefig(args.picture, dpi=80)
