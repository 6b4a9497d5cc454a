"""The step: k workers on any number of replicas, against the paper's sums written out."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import tiny_task
from tf_largebatch import input_pipeline, step, training
from tf_largebatch.optimizer import MomentumCorrectedSGD


def train(replicas, dtype):
  """`tiny_task.train` on so many logical devices."""
  strategy = tf.distribute.get_strategy()
  if replicas > 1:
    devices = [f"CPU:{index}" for index in range(replicas)]
    # TensorFlow's collectives serve but one strategy in a process; the others add up on one device.
    collective = (replicas, dtype) == (4, "float32")
    reduction = None if collective else tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(devices, reduction)
  return tiny_task.train(strategy, dtype)


def main(path):
  cpu = tf.config.list_physical_devices("CPU")[0]
  tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
  results = {}
  for dtype in ("float32", "float64"):
    for replicas in (1, 2, 4):
      for name, value in train(replicas, dtype).items():
        results[f"{dtype}_{replicas}_{name}"] = value
  # Trap 7 of Keras' optimizers: called by a replica they sum the gradients, and ours does too.
  strategy = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice()
  )
  with strategy.scope():
    variable = keras.Variable([0.0, 0.0], name="kernel", dtype="float64")
    optimizer = MomentumCorrectedSGD(0.5)
    optimizer.build([variable])

  @tf.function
  def apply():
    def replica_step():
      index = tf.distribute.get_replica_context().replica_id_in_sync_group
      optimizer.apply([tf.constant([1.0, 10.0], tf.float64) * tf.cast(index + 1, tf.float64)])

    strategy.run(replica_step)

  apply()
  results["applied_by_replicas"] = variable.numpy()
  np.savez(path, **results)


@pytest.fixture(scope="module")
def on_replicas(tmp_path_factory):
  """Results of `main`, in a process of its own: logical devices come before all else."""
  path = str(tmp_path_factory.mktemp("step") / "results.npz")
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  subprocess.run([sys.executable, "-m", "tests.step_test", path], check=True, cwd=root, timeout=300)
  return np.load(path)


def test_every_replica_holds_the_same_bytes(on_replicas):
  for dtype in ("float32", "float64"):
    for replicas in (2, 4):
      copies = on_replicas[f"{dtype}_{replicas}_copies"]
      for copy in copies[1:]:
        assert copy.tobytes() == copies[0].tobytes()


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("replicas", [2, 4])
def test_the_hardware_changes_rounding_alone(on_replicas, replicas, dtype, limit):
  one, many = on_replicas[f"{dtype}_1_copies"][0], on_replicas[f"{dtype}_{replicas}_copies"][0]
  assert np.linalg.norm(many - one) <= limit * np.linalg.norm(one)
  np.testing.assert_allclose(
    on_replicas[f"{dtype}_{replicas}_losses"], on_replicas[f"{dtype}_1_losses"], rtol=limit
  )
  # The run has moved the weights and the rate's warmup and decay: the agreement is no accident.
  assert np.ptp(on_replicas[f"{dtype}_1_losses"]) > 1e-2


def test_the_optimizer_sums_over_the_replicas_that_call_it(on_replicas):
  """Nesterov's first step: −η (1 + m) Σ g, with Σ g = (1 + 2) · (1, 10)."""
  np.testing.assert_allclose(
    on_replicas["applied_by_replicas"], [-0.5 * 1.9 * 3, -0.5 * 1.9 * 30], rtol=1e-12
  )


def test_one_step_is_the_mean_over_workers_of_their_own_losses():
  """Remark 3's other form: each worker's mean over n, averaged over k; decay once, on kernels."""
  recipe, source = tiny_task.make_recipe("float64"), tiny_task.make_source()
  model = tiny_task.tiny_model("float64")
  optimizer = training.build_optimizer(recipe, source.num_examples)
  optimizer.build(model.trainable_variables)
  batch = next(
    iter(
      input_pipeline.train_dataset(
        recipe, source, first_worker=0, num_workers=4, workers_per_replica=4
      )
    )
  )
  before = [v.numpy() for v in model.weights]
  gradients = [np.zeros(v.shape) for v in model.trainable_variables]
  statistics = [np.zeros(v.shape) for v in model.non_trainable_variables]
  losses, wrong = [], []
  for images, labels in zip(*batch, strict=True):
    for variable, value in zip(model.weights, before, strict=True):
      variable.assign(value)
    with tf.GradientTape() as tape:
      logits = model(images, training=True)
      log_probabilities = logits - tf.reduce_logsumexp(logits, axis=1, keepdims=True)
      # Label smoothing 0.1 over 200 classes: 0.9 for the label, 0.0005 more for every class.
      true = tf.reduce_sum(tf.one_hot(labels, 200, dtype=tf.float64) * log_probabilities, axis=1)
      loss = tf.reduce_mean(-0.9 * true - 0.0005 * tf.reduce_sum(log_probabilities, axis=1))
    for total, gradient in zip(
      gradients, tape.gradient(loss, [v.value for v in model.trainable_variables]), strict=True
    ):
      total += gradient.numpy() / 4
    for total, variable in zip(statistics, model.non_trainable_variables, strict=True):
      total += variable.numpy() / 4
    losses.append(float(loss))
    wrong.append(np.mean(np.argmax(logits, 1) != labels))
  for variable, value in zip(model.weights, before, strict=True):
    variable.assign(value)
  start = {v.path: v.numpy() for v in model.trainable_variables}

  train_step = step.make_train_step(tf.distribute.get_strategy(), model, optimizer, recipe)
  scalars = train_step(batch)

  np.testing.assert_allclose(float(scalars["loss"]), np.mean(losses), rtol=1e-12)
  np.testing.assert_allclose(float(scalars["error"]), np.mean(wrong), rtol=1e-12)
  norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
  np.testing.assert_allclose(float(scalars["gradient_norm"]), norm, rtol=1e-12)
  norm = np.sqrt(sum(np.sum(w**2) for w in start.values()))
  np.testing.assert_allclose(float(scalars["weight_norm"]), norm, rtol=1e-12)
  assert float(scalars["learning_rate"]) == 0.1 and scalars["momentum_correction_factor"] == 1
  for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
    decay = 1e-2 if variable.path.endswith("kernel") else 0
    expected = start[variable.path] - 0.1 * 1.9 * (gradient + decay * start[variable.path])
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-11, atol=1e-13)
  for variable, expected in zip(model.non_trainable_variables, statistics, strict=True):
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_evaluation_weighs_and_counts():
  model = tiny_task.tiny_model("float64")
  rng = np.random.default_rng(0)
  images = tf.constant(rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8))
  labels = np.array([0, 1, 2, 3, 4], np.int32)
  weights = np.array([1, 1, 0, 1, 0], np.float32)
  logits = model(images, training=False).numpy()
  losses = np.log(np.sum(np.exp(logits), 1)) - logits[np.arange(5), labels]
  wrong = np.argmax(logits, 1) != labels
  evaluate = step.make_evaluation_step(tf.distribute.get_strategy(), model)
  loss, errors, count = evaluate((images, tf.constant(labels), tf.constant(weights)))
  np.testing.assert_allclose(float(loss), np.sum(losses * weights), rtol=1e-12)
  assert float(errors) == np.sum(wrong * weights) and float(count) == 3


if __name__ == "__main__":
  main(sys.argv[1])
