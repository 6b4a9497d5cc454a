"""Models that `fit` trains in the tests, and a program that trains them as one of several tasks.

  python -m tests.training.fit_scenarios --out=DIRECTORY --models=mlp,vit [--devices=2]

Trains each model for 20 steps of 6 workers, with stock callbacks and an uneven validation set, on
the tasks of TF_CONFIG or on so many logical CPUs. Each task writes NAME.TASK.npz (all variables of
model and optimizer) and NAME.TASK.json (the history and the results of `evaluate`).
"""

import argparse
import contextlib
import json
import os

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch import MomentumCorrectedSGD, evaluate, fit, make_strategy, read_cluster
from tf_largebatch.training import fit_steps

CLASSES, WORKERS, STEPS = 5, 6, 20


@contextlib.contextmanager
def floatx(dtype):
  """Computes in a dtype, whether or not something has set Keras' dtype policy before."""
  keras.config.set_floatx(dtype)
  keras.config.set_dtype_policy(dtype)
  try:
    yield
  finally:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def images(count, side, seed=0):
  rng = np.random.default_rng(seed)
  shape = (count, side, side, 3)
  return rng.normal(size=shape).astype(keras.config.floatx()), rng.integers(0, CLASSES, count)


def resnet(side=8):
  """A small ResNet with flips and dropout inside."""
  inputs = keras.Input((side, side, 3))
  x = keras.layers.RandomFlip("horizontal", seed=1)(inputs)
  x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
  for filters in (8, 16):
    shortcut = keras.layers.Conv2D(filters, 1, use_bias=False)(x)
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x) + shortcut)
  x = keras.layers.Dropout(0.3, seed=2)(keras.layers.GlobalAveragePooling2D()(x))
  return keras.Model(inputs, keras.layers.Dense(CLASSES)(x))


def mlp(side=8):
  return keras.Sequential(
    [
      keras.Input((side, side, 3)),
      keras.layers.Flatten(),
      keras.layers.Dense(16, use_bias=False),
      keras.layers.BatchNormalization(),
      keras.layers.ReLU(),
      keras.layers.Dense(CLASSES, kernel_regularizer=keras.regularizers.L2(1e-3)),
    ]
  )


def vit(side=8):
  """A vision transformer of one block."""
  inputs = keras.Input((side, side, 3))
  x = keras.layers.Conv2D(12, 4, strides=4)(inputs)
  x = keras.layers.Reshape((-1, 12))(x)
  attended = keras.layers.MultiHeadAttention(2, 6, dropout=0.1, seed=3)(*[x] * 2)
  x = keras.layers.LayerNormalization()(x + attended)
  x = x + keras.layers.Dense(12, "gelu")(x)
  return keras.Model(inputs, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(x)))


def efficientnet(side=32):
  return keras.applications.EfficientNetV2B0(
    weights=None,
    classes=CLASSES,
    input_shape=(side, side, 3),
    classifier_activation=None,
    include_preprocessing=False,
  )


# EfficientNet normalises over n single values at its end. At a rate of 1e-4 a rounding error of
# 2e-16 grows to 4e-5 of the loss in 20 steps.
RATES = {"efficientnet": 1e-5}
SIZES = {"efficientnet": 8}  # n; 4 for the others.
MODELS = {"resnet": resnet, "mlp": mlp, "vit": vit, "efficientnet": efficientnet}


def make(name, strategy, optimizer=None):
  """Makes and compiles a model."""
  keras.utils.set_random_seed(0)
  with strategy.scope():
    model = MODELS[name]()
    model.compile(
      optimizer or MomentumCorrectedSGD(RATES.get(name, 0.05), weight_decay=1e-3),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      metrics=[
        "accuracy",
        keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce"),
      ],
    )
  return model


def callbacks(directory):
  """Eight stock callbacks, some of which change the training."""
  stock = keras.callbacks
  path = lambda name: os.path.join(directory, name)  # noqa: E731
  return [
    stock.EarlyStopping("val_loss", patience=50),
    stock.ModelCheckpoint(path("best.keras"), save_best_only=True),
    stock.BackupAndRestore(path("backup")),
    stock.TensorBoard(path("tensorboard")),
    stock.CSVLogger(path("log.csv")),
    stock.LearningRateScheduler(lambda epoch, rate: rate * (0.5 if epoch == 1 else 1.0)),
    stock.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=10.0),
    stock.LambdaCallback(on_train_batch_end=lambda batch, logs: float(logs["loss"])),
  ]


def train(name, strategy, directory):
  """Trains 2 epochs of 10 steps; returns the model, its history and evaluation."""
  model = make(name, strategy)
  side, n = model.input_shape[1], SIZES.get(name, 4)
  x, y = images(WORKERS * n * STEPS // 2 + 1, side)
  validation = images(17, side, seed=1)
  history = fit(
    model,
    x,
    y,
    workers=WORKERS,
    per_worker_batch_size=n,
    epochs=2,
    callbacks=callbacks(directory),
    validation_data=validation,
    validation_batch_size=4,
    verbose=0,
  )
  found = evaluate(model, *validation, batch_size=4, verbose=0, return_dict=True)
  return model, history.history, found


def variables(model):
  return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]


def count_collectives():
  """Has `fit` print how many collectives a compiled step of training contains."""
  make_fit_step = fit_steps.make_fit_step

  def make_and_count(*arguments):
    step, counted = make_fit_step(*arguments), []

    def counting(*batch):
      result = step(*batch)
      if not counted:
        graph = step.get_concrete_function(*batch).graph
        nodes = [node.op for node in graph.as_graph_def().node]
        nodes += [n.op for f in graph.as_graph_def().library.function for n in f.node_def]
        counted.append(sum(op.startswith("CollectiveReduce") for op in nodes))
        print("collectives in a step:", counted[0], flush=True)
      return result

    return counting

  fit_steps.make_fit_step = make_and_count


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--out")
  parser.add_argument("--models", type=lambda text: text.split(","))
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--floatx", default="float64")
  options = parser.parse_args()
  cpu = tf.config.list_physical_devices("CPU")[0]
  logical = [tf.config.LogicalDeviceConfiguration()] * options.devices
  tf.config.set_logical_device_configuration(cpu, logical)
  keras.config.set_floatx(options.floatx)
  cluster = read_cluster()
  strategy = make_strategy(cluster)
  count_collectives()
  for name in options.models:
    directory = os.path.join(options.out, f"{name}.files")
    model, history, found = train(name, strategy, directory)
    path = os.path.join(options.out, f"{name}.{cluster.task_index}")
    np.savez(f"{path}.npz", *variables(model))
    with open(f"{path}.json", "w") as file:
      json.dump({"history": history, "evaluate": found}, file)


if __name__ == "__main__":
  main()
