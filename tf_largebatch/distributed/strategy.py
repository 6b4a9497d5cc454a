"""The `tf.distribute` strategy for a cluster and the devices that this task can see."""

import signal
import threading
from typing import Any

import tensorflow as tf
from absl import logging
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.eager import context

from tf_largebatch.distributed import rendezvous
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.errors import UserError


def make_strategy(
  cluster: Cluster,
  communication: str = "auto",
  timeout_minutes: float = 10.0,
  heartbeat_timeout_seconds: float = 10.0,
) -> tf.distribute.Strategy:
  """Returns the strategy that trains on all devices visible to this task.

  One task with one device gets the default strategy; one task with several GPUs, or with several
  logical CPUs and no GPU, gets `MirroredStrategy`; several tasks get `MultiWorkerMirroredStrategy`.
  The latter uses one CPU per task even if there are several logical CPUs, and must be made before
  any TensorFlow operation runs; this function waits for all tasks first. Made outside the main
  thread, it leaves SIGTERM ignored.

  All tasks must see the same number of GPUs. With an explicit `communication`, a task that has lost
  its GPU gets an error; with "auto" the tasks may wait for each other. Also turns TensorFloat-32
  off.

  Args:
    cluster: the return value of `read_cluster`.
    communication: "nccl", "ring" or "auto": NCCL if each replica has a whole GPU, else RING.
    timeout_minutes: how long to wait for the other tasks.
    heartbeat_timeout_seconds: how long a task may be silent before it counts as lost.

  Raises:
    UserError: `communication` is unknown or does not work with these devices, this task's port is
      in use, or something else answers on a task's address.
    InterruptedRunError: not all tasks came up in time.
  """
  communication = _choose_communication(cluster, communication)
  # On some GPUs TensorFloat-32 rounds the inputs of float32 products to 10 bits of mantissa, which
  # changes the computation, not just the hardware.
  tf.config.experimental.enable_tensor_float_32_execution(False)
  devices = _local_devices()
  if cluster.num_tasks > 1:
    _set_heartbeat_timeout(cluster, heartbeat_timeout_seconds)
    return _make_multi_task_strategy(cluster, devices, communication, timeout_minutes)
  if len(devices) == 1:
    return tf.distribute.get_strategy()
  # Its default cross_device_ops match _choose_communication. TensorFlow ignores an explicit choice,
  # with a warning, when XLA compiles the replica's pass.
  return tf.distribute.MirroredStrategy(devices)


def _make_multi_task_strategy(
  cluster: Cluster, devices: list[str], communication: str, timeout_minutes: float
) -> tf.distribute.MultiWorkerMirroredStrategy:
  address = cluster.tasks[cluster.task_index]
  logging.info(
    "Task %d of %d (%s, by %s) waits for %s.",
    cluster.task_index,
    cluster.num_tasks,
    address,
    cluster.launcher,
    ", ".join(task for task in cluster.tasks if task != address),
  )
  rendezvous.bypass_proxies(cluster)
  rendezvous.wait_for_all(cluster, timeout_minutes)
  # From `cluster` rather than TF_CONFIG: it is validated, and its chief is simply the first worker.
  resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec({"worker": list(cluster.tasks)}),
    task_type="worker",
    task_id=cluster.task_index,
    num_accelerators={"GPU": sum("GPU" in device for device in devices)},
    rpc_layer="grpc",
  )
  implementation = tf.distribute.experimental.CommunicationImplementation(communication.upper())
  options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
  # TensorFlow's coordination service replaces the handler of SIGTERM by one that only logs. Restore
  # the previous handler, so that `kill`, Slurm or a launcher can end the task.
  on_sigterm = signal.getsignal(signal.SIGTERM)
  with rendezvous.ended_after(timeout_minutes):
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, on_sigterm)  # Python allows it nowhere else.
  return strategy


def _set_heartbeat_timeout(cluster: Cluster, seconds: float):
  """Configures TensorFlow's coordination service as the strategy would, but for the timeout.

  The strategy configures the service only if nobody has. TensorFlow has no public API for this.
  """
  job = coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=cluster.num_tasks)
  context.context().configure_coordination_service(
    service_type="standalone",
    service_leader="/job:worker/replica:0/task:0",
    heartbeat_timeout_in_ms=round(1000 * seconds),
    coordinated_jobs=[job],
  )


def describe(
  strategy: tf.distribute.Strategy, cluster: Cluster, communication: str = "auto"
) -> dict[str, Any]:
  """Describes, in JSON values, a strategy that `make_strategy` made from the same arguments."""
  replicas = strategy.num_replicas_in_sync
  name = "MultiWorkerMirroredStrategy" if cluster.num_tasks > 1 else "MirroredStrategy"
  return {
    "strategy": name if replicas > 1 else "default",
    "communication": _choose_communication(cluster, communication) if replicas > 1 else "none",
    "tasks": cluster.num_tasks,
    "replicas": replicas,
    "devices_per_task": _local_devices()[: replicas // cluster.num_tasks],
  }


def _local_devices() -> list[str]:
  """Returns this task's logical GPUs, or its logical CPUs if it has no GPU.

  Does not call `tf.config.list_logical_devices`, which initialises TensorFlow;
  `MultiWorkerMirroredStrategy` cannot be made after that.
  """
  kind = "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
  count = sum(
    len(tf.config.get_logical_device_configuration(device) or [None])
    for device in tf.config.get_visible_devices(kind)
  )
  return [f"{kind}:{index}" for index in range(count)]


def _choose_communication(cluster: Cluster, communication: str) -> str:
  """Resolves "auto" to "nccl" or "ring", and checks an explicit choice.

  Raises:
    UserError: `communication` is unknown or does not work with this task's devices.
  """
  if communication not in ("auto", "nccl", "ring"):
    raise UserError(f"unknown communication {communication!r}: expected auto, nccl or ring")
  devices, gpus = _local_devices(), len(tf.config.get_visible_devices("GPU"))
  # NCCL refuses two replicas on one GPU, which is what logical GPUs are.
  can_nccl = 0 < gpus == len(devices)
  if communication == "nccl" and not can_nccl:
    raise UserError(
      f"communication 'nccl' needs a GPU for every replica: given {len(devices)} replicas on"
      f" {gpus} GPUs; use auto or ring"
    )
  if communication == "ring" and can_nccl and gpus > 1 and cluster.num_tasks == 1:
    raise UserError(
      f"communication 'ring' does not work between the {gpus} GPUs of a single task: use auto or"
      " nccl, or start one task for each GPU"
    )
  if communication == "auto":
    return "nccl" if can_nccl else "ring"
  return communication
