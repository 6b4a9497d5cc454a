"""`TF_CONFIG`, checked, and the `tf.distribute` strategy that follows from it.

A task is a process named in `TF_CONFIG` (its jobs "chief" and "worker" are not the
paper's workers); a replica is a device. What a user can get wrong is refused here
in one line, because TensorFlow answers most of it by waiting for an hour.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from absl import logging

from tf_largebatch.errors import LOST_TASK, InterruptedRunError, UserError

if TYPE_CHECKING:  # At run time later: a bad TF_CONFIG is told before the slow import.
  import tensorflow as tf

# What TensorFlow says in every error that comes of another task's end or silence.
_LOSS = re.compile(
  r"Collective ops is aborted|CoordinationService|/task:\d+|UNAVAILABLE|Unavailable"
)
# Ends the first report; behind it come the tasks that only passed it on.
_REPORT_END = "The error could be from a previous operation"
# A name or an IPv4 address, or an IPv6 address in brackets; a port.
_ADDRESS = re.compile(r"(?:[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The tasks that train together, and which of them this process is.

  Attributes:
    tasks: `host:port` of every task in rank order, the chief first; () without
      `TF_CONFIG`.
    task_index: this task's rank in `tasks`; 0 without `TF_CONFIG`.
  """

  tasks: tuple[str, ...] = ()
  task_index: int = 0

  @property
  def num_tasks(self) -> int:
    return max(1, len(self.tasks))

  @property
  def is_chief(self) -> bool:
    return self.task_index == 0


def read_cluster(environ: Mapping[str, str] = os.environ) -> Cluster:
  """Returns the cluster that `TF_CONFIG` names, without touching TensorFlow.

  Served are a "chief" with any "worker"s, or "worker"s alone, of which the first
  is then the chief, as TensorFlow has it.

  Raises:
    UserError: `TF_CONFIG` is set and does not describe such a cluster.
  """
  if "TF_CONFIG" not in environ:
    return Cluster()
  text = environ["TF_CONFIG"]
  try:
    config = json.loads(text)
  except (ValueError, RecursionError) as error:  # The second of one that is nested too deep.
    raise _error(f"not JSON ({error})", text, "a JSON object, or unset it for one task") from error
  if not isinstance(config, dict):
    raise _error("not a JSON object", config, 'an object with the keys "cluster" and "task"')
  if "sparseCluster" in config:
    raise _error(
      'a "sparseCluster", whose tasks come and go',
      config["sparseCluster"],
      'a fixed "cluster" (a TFJob without enableDynamicWorker)',
    )
  for key in ("cluster", "task"):
    if not isinstance(config.get(key), dict):
      raise _error(f'"{key}" is missing or not an object', config, f'a "{key}" object')

  jobs = config["cluster"]
  if not jobs or not set(jobs) <= {"chief", "worker"}:
    raise _error("cluster with no or unknown jobs", jobs, 'a "worker" job, a "chief" job or both')
  for job, addresses in jobs.items():
    if not isinstance(addresses, list) or not addresses:
      raise _error(f'job "{job}" without a list of tasks', addresses, 'a list ["host:port", …]')
  if len(jobs.get("chief", [])) > 1:
    raise _error("more than one chief", jobs["chief"], 'one "chief", the others as "worker"')

  tasks = (*jobs.get("chief", []), *jobs.get("worker", []))
  for address in tasks:
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if not match or not 1 <= int(match[1]) <= 65535:
      raise _error("bad address of a task", address, '"host:port" with a port in 1..65535')
  repeated = [address for address, count in collections.Counter(tasks).items() if count > 1]
  if repeated:
    raise _error("several tasks share an address", repeated, "an address of its own for each task")

  job, index = config["task"].get("type"), config["task"].get("index")
  if not isinstance(job, str) or job not in jobs:
    raise _error("task type is not a job of the cluster", job, f"one of {sorted(jobs)}")
  # JSON's true is an int to Python.
  if type(index) is not int or not 0 <= index < len(jobs[job]):
    raise _error(f'bad task index for "{job}"', index, f"an integer in 0..{len(jobs[job]) - 1}")
  return Cluster(tasks, index + (len(jobs.get("chief", [])) if job == "worker" else 0))


def make_strategy(
  cluster: Cluster, communication: str = "auto", timeout_minutes: float = 10.0
) -> "tf.distribute.Strategy":
  """Returns the strategy under which this task trains with all its visible devices.

  One device of one task: the default strategy. Several GPUs, or several logical
  CPUs and no GPU: `MirroredStrategy`. Several tasks: `MultiWorkerMirroredStrategy`,
  which waits for them all, uses one CPU a task whatever its logical CPUs, and must be
  made in the main thread before any TensorFlow operation runs. Every task must see
  as many GPUs as the others; name `communication` to have a task that lost its GPU
  refused rather than left to wait. TensorFloat-32 is switched off.

  Args:
    cluster: what `read_cluster` returned.
    communication: "nccl", "ring" or "auto": NCCL if every replica is a GPU of its
      own, else RING.
    timeout_minutes: how long the tasks may take to come up.

  Raises:
    UserError: `communication` is unknown or cannot work with these devices, or
      this task's port is taken.
    InterruptedRunError: not all tasks came up in time.
  """
  import tensorflow as tf

  communication = _choose_communication(cluster, communication)
  # TensorFloat-32 would round float32 on some GPUs to 10 bits: another recipe, not other hardware.
  tf.config.experimental.enable_tensor_float_32_execution(False)
  devices = _local_devices()
  if cluster.num_tasks == 1:
    if len(devices) == 1:
      return tf.distribute.get_strategy()
    # Without cross_device_ops it takes just what _choose_communication did; any
    # given would be ignored, with a warning, where XLA compiles the replica's pass.
    return tf.distribute.MirroredStrategy(devices)

  address = cluster.tasks[cluster.task_index]
  others = [task for task in cluster.tasks if task != address]
  logging.info(
    "Task %d of %d (%s) waits for %s.",
    cluster.task_index,
    cluster.num_tasks,
    address,
    ", ".join(others),
  )
  _wait_for_all(cluster, timeout_minutes)
  # From the cluster that was checked, in which the chief is just the first "worker".
  resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec({"worker": list(cluster.tasks)}),
    task_type="worker",
    task_id=cluster.task_index,
    num_accelerators={"GPU": sum("GPU" in device for device in devices)},
    rpc_layer="grpc",
  )
  implementation = tf.distribute.experimental.CommunicationImplementation(communication.upper())
  options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
  # TensorFlow's coordination service takes SIGTERM over and only logs it. Give it back
  # to whoever had it, so that `kill`, Slurm or a launcher can end the task.
  on_sigterm = signal.getsignal(signal.SIGTERM)
  with _ended_by_alarm(60 * timeout_minutes):
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
  signal.signal(signal.SIGTERM, on_sigterm)
  return strategy


def _wait_for_all(cluster: Cluster, timeout_minutes: float) -> None:
  """Returns when every task listens, on its own address, here or in TensorFlow already.

  TensorFlow waits too, but for an hour, holding the interpreter's lock, so that neither
  a signal nor a time limit reaches the process.

  Raises:
    UserError: this task's port is in use on this machine.
    InterruptedRunError: some did not come up in time.
  """
  address = cluster.tasks[cluster.task_index]
  missing = set(cluster.tasks) - {address}
  deadline = time.monotonic() + 60 * timeout_minutes
  with _listening(address):
    while missing:
      for task in sorted(missing):
        host, _, port = task.rpartition(":")
        with (
          contextlib.suppress(OSError),
          socket.create_connection((host.strip("[]"), int(port)), timeout=2),
        ):
          missing.remove(task)
      if missing and time.monotonic() > deadline:
        names = ", ".join(f"task {cluster.tasks.index(t)} ({t})" for t in sorted(missing))
        raise InterruptedRunError(
          f"{names} did not come up within {timeout_minutes:g} minutes; start all tasks again, or"
          " give them more time (--cluster_timeout_minutes).",
          LOST_TASK,
        )
      if missing:
        time.sleep(0.2)


@contextlib.contextmanager
def _ended_by_alarm(seconds: float):
  """Has the kernel end the process (SIGALRM) if a task is lost just now: nothing else could."""
  before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def telling_lost_tasks(cluster: Cluster, steps_done: Callable[[], int | None]):
  """What TensorFlow raises in it when a task is gone, or silent for some 10 s, gets one line.

  Args:
    cluster: what `make_strategy` made the strategy of.
    steps_done: returns the number of the last finished step, None before training.

  Raises:
    InterruptedRunError: a task was lost.
  """
  import tensorflow as tf

  try:
    yield
  except tf.errors.OpError as error:
    lost = _lost_tasks(cluster, str(error))
    if not lost:
      raise
    names = " and ".join(f"task {index} ({cluster.tasks[index]})" for index in lost)
    done = steps_done()
    raise InterruptedRunError(
      f"Lost {names}, which ended or cannot be reached; "
      + ("training had not begun" if done is None else f"the last finished step is {done}")
      + ". The same command on all tasks goes on from the newest checkpoint.",
      LOST_TASK,
    ) from error


def _lost_tasks(cluster: Cluster, message: str) -> list[int]:
  """Returns the tasks that an error of a collective or of the coordination service names."""
  if cluster.num_tasks == 1 or not _LOSS.search(message):
    return []
  for report in (message.partition(_REPORT_END)[0], message):
    found = {int(index) for index in re.findall(r"/job:worker(?:/replica:0)?/task:(\d+)", report)}
    for index, task in enumerate(cluster.tasks):
      if re.search(rf"(?<![\w.-]){re.escape(task)}(?!\d)", report):  # Not a part of another's.
        found.add(index)
    # Heartbeats go to the chief's service.
    if "CoordinationService/" in report and not found - {cluster.task_index}:
      found.add(0)
    if found - {cluster.task_index}:
      break
  return sorted(found - {cluster.task_index})


def describe(
  strategy: "tf.distribute.Strategy", cluster: Cluster, communication: str = "auto"
) -> dict[str, Any]:
  """Returns the words for a strategy made by `make_strategy` from the same arguments."""
  replicas = strategy.num_replicas_in_sync
  name = "MultiWorkerMirroredStrategy" if cluster.num_tasks > 1 else "MirroredStrategy"
  return {
    "strategy": name if replicas > 1 else "default",
    "communication": _choose_communication(cluster, communication) if replicas > 1 else "none",
    "tasks": cluster.num_tasks,
    "replicas": replicas,
    "devices_per_task": _local_devices()[: replicas // cluster.num_tasks],
  }


def _error(what: str, given: Any, expected: str) -> UserError:
  return UserError(f"TF_CONFIG: {what}: given {json.dumps(given)}, expected {expected}")


def _local_devices() -> list[str]:
  """Returns this task's logical GPUs, or else CPUs, without initialising TensorFlow.

  `tf.config.list_logical_devices` would, and `MultiWorkerMirroredStrategy` then
  cannot be made.
  """
  import tensorflow as tf

  kind = "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
  count = sum(
    len(tf.config.get_logical_device_configuration(device) or [None])
    for device in tf.config.get_visible_devices(kind)
  )
  return [f"{kind}:{index}" for index in range(count)]


def _choose_communication(cluster: Cluster, communication: str) -> str:
  """Returns "nccl" or "ring" for "auto", and checks what was asked for."""
  import tensorflow as tf

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
      f"communication 'ring' is not offered between the {gpus} GPUs of a single task: use auto or"
      " nccl, or start one task for each GPU"
    )
  if communication == "auto":
    return "nccl" if can_nccl else "ring"
  return communication


@contextlib.contextmanager
def _listening(address: str):
  """Listens on this task's port, all interfaces, as TensorFlow will.

  TensorFlow would end with no word of the port if it were in use. SO_REUSEADDR (and
  not SO_REUSEPORT, which shares a port silently) lets a run that starts again use the
  port at once, with the old connections still in TIME_WAIT.

  Raises:
    UserError: the port is in use on this machine.
  """
  port = int(address.rpartition(":")[2])
  with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind(("", port))
      listener.listen(1024)
    except OSError as error:
      raise UserError(
        f"cannot listen on this task's address {address} ({error.strerror}): end the process that"
        " uses the port or give the task another one in TF_CONFIG"
      ) from error
    yield
