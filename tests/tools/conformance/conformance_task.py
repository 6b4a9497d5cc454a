"""A task of `conformance_test`: runs the steps of its cases on this cluster and saves what it saw.

python -m tools.launch_local --tasks=2 \\
    --module=tests.tools.conformance.conformance_task -- DIRECTORY REPLICAS_PER_TASK DTYPES
"""

import os
import pickle
import sys

import keras
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

from tf_largebatch.data import sources
from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.distributed.strategy import make_strategy
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.options import RunOptions
from tf_largebatch.training.batches import distribute_train_dataset
from tf_largebatch.training.curvature import make_curvature
from tools.conformance.networks import build_network
from tools.conformance.observation import observe, set_parameters
from tools.conformance.problem import CLASSES, make_examples, make_recipe

STEPS = 36
# k = 4, n = 5; three epochs with a warmup up to step 15 and decays at 27 and 33.
CASES = {
  dtype: make_recipe(1, dtype=dtype, weight_decay=1e-2, label_smoothing=0.1)
  for dtype in ("float64", "float32")
}


def apply_on_replicas(strategy):
  """Returns a weight after replica r calls the optimizer with the gradient (r + 1) · (1, 10)."""
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
  return variable.numpy()


def measure_curvature(strategy, recipe):
  """Returns the curvature of the first step's loss."""
  source = sources.ArraySource(*make_examples(recipe), CLASSES)
  with strategy.scope():
    model = build_network("small_residual", recipe)
  set_parameters(model, "small_residual")
  batch = next(iter(distribute_train_dataset(strategy, recipe, source, 0)))
  return make_curvature(strategy, model, model, recipe, RunOptions(), tolerance=1e-6)(batch)


def main(directory, replicas, dtypes):
  cpu = tf.config.list_physical_devices("CPU")[0]
  tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
  )
  if replicas > 1:
    # With several tasks, TensorFlow uses all GPUs but only one CPU of each. This makes it use all
    # logical CPUs too.
    def local_devices(self, cluster_resolver, worker_device):
      return tuple(f"{worker_device}/device:CPU:{index}" for index in range(replicas)), "CPU"

    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    extended._initialize_local_devices = local_devices
  this = read_cluster()
  strategy = make_strategy(this)
  assert strategy.num_replicas_in_sync == this.num_tasks * replicas
  seen = {
    dtype: observe(strategy, recipe, "small_residual", STEPS)
    for dtype, recipe in CASES.items()
    if dtype in dtypes.split(",")
  }
  if "float32" in seen:  # On the simplest and the most complex cluster.
    seen["curvature"] = measure_curvature(strategy, CASES["float64"])
  seen["applied"] = apply_on_replicas(strategy)
  name = f"{this.num_tasks}_{replicas}_{this.task_index}.pickle"
  with open(os.path.join(directory, name), "wb") as file:
    pickle.dump(seen, file)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
