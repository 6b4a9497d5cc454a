"""A program that calls `fit` as one of two tasks, in ways that a test chooses."""

import argparse
import json
import os
import signal

import keras
import numpy as np
import tensorflow as tf

from tests.training.fit_test import crossentropy
from tf_largebatch import fit, make_strategy, read_cluster
from tf_largebatch.errors import UserError


def make(strategy):
  keras.utils.set_random_seed(0)
  with strategy.scope():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dropout(0.1), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.01), crossentropy(), metrics=["accuracy"])
  return model


def dataset(epoch=0, count=40):
  rng = np.random.default_rng(epoch)
  x, y = rng.normal(size=(count, 6)).astype("float32"), rng.integers(0, 3, count)
  return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


def train(model, data, epochs=2, **options):
  return fit(model, data, workers=2, per_worker_batch_size=4, epochs=epochs, verbose=0, **options)


def error_of(strategy, data, **options):
  try:
    train(make(strategy), data, **options)
  except UserError as error:
    return str(error)
  return "none"


def stop(strategy, task):
  """Task 1's callback asks to stop in the third step of the second epoch."""
  model, epochs = make(strategy), []

  def ask(batch, logs):
    model.stop_training = task == 1 and batch == 2 and len(epochs) == 2

  watch = keras.callbacks.LambdaCallback(
    on_epoch_begin=lambda epoch, logs: epochs.append(epoch), on_train_batch_end=ask
  )
  train(model, dataset(), epochs=4, callbacks=[watch])
  return {"stop": {"steps": int(model.optimizer.iterations.numpy()), "epochs": len(epochs)}}


def differ(strategy, task):
  """Each task orders, augments or ends its data in another way."""
  augmented = dataset().map(lambda x, y: (x + tf.random.uniform([], seed=task), y))
  return {
    "order": error_of(strategy, dataset().unbatch().shuffle(40, seed=task).batch(8)),
    "augmentation": error_of(strategy, augmented),
    "length": error_of(strategy, dataset(count=40 - 8 * task)),
    "arguments": error_of(strategy, dataset(), epochs=2 + task),
  }


def backup(strategy, task, out, kill_at):
  model, steps = make(strategy), []

  def count(batch, logs):
    steps.append(batch)
    if task == 1 and len(steps) == kill_at:
      os.kill(os.getpid(), signal.SIGKILL)

  begun = []
  watch = keras.callbacks.LambdaCallback(
    on_epoch_begin=lambda epoch, logs: begun.append(epoch), on_train_batch_end=count
  )
  restore = keras.callbacks.BackupAndRestore(os.path.join(out, "backup"))
  train(model, dataset, epochs=3, callbacks=[restore, watch])
  print("first epoch", begun[0])
  variables = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
  np.savez(os.path.join(out, f"{task}.npz"), *variables)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--out")
  parser.add_argument("--kill_at", type=int)
  parser.add_argument("parts", nargs="+")
  options = parser.parse_args()
  cluster = read_cluster()
  strategy, task, found = make_strategy(cluster), cluster.task_index, {}
  for part in options.parts:
    if part == "backup":
      backup(strategy, task, options.out, options.kill_at)
    else:
      found |= {"stop": stop, "differ": differ}[part](strategy, task)
  with open(os.path.join(options.out, f"{task}.json"), "w") as file:
    json.dump(found, file)


if __name__ == "__main__":
  main()
