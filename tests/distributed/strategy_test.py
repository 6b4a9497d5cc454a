"""`make_strategy` on real tasks and logical CPUs, and how it picks devices and collectives."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tensorflow as tf

from tf_largebatch.distributed import strategy as strategy_lib
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.distributed.strategy import make_strategy
from tf_largebatch.errors import UserError
from tools.launch_local import free_addresses


def _fake_devices(monkeypatch, physical, logical):
  """Shows TensorFlow so many GPUs (or, for 0, one CPU), split into so many logical devices."""
  kind = "GPU" if physical else "CPU"
  seen = {kind: list(range(physical or 1))}
  monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: seen.get(kind, []))
  monkeypatch.setattr(
    tf.config,
    "get_logical_device_configuration",
    lambda device: [None] * (logical // (physical or 1)),
  )


@pytest.mark.parametrize(
  "communication, num_tasks, physical, logical, expected",
  [
    ("auto", 1, 0, 2, "ring"),
    ("ring", 2, 0, 1, "ring"),
    ("nccl", 2, 0, 1, None),
    ("nccl", 1, 0, 1, None),
    ("auto", 1, 2, 2, "nccl"),
    ("nccl", 1, 2, 2, "nccl"),
    ("ring", 1, 2, 2, None),
    ("auto", 2, 1, 1, "nccl"),
    ("ring", 2, 2, 2, "ring"),
    ("ring", 1, 1, 1, "ring"),
    ("auto", 1, 1, 2, "ring"),
    ("nccl", 1, 1, 2, None),
    ("mpi", 1, 0, 1, None),
    ("NCCL", 1, 2, 2, None),
  ],
)
def test_communication_fits_the_devices(
  monkeypatch, communication, num_tasks, physical, logical, expected
):
  _fake_devices(monkeypatch, physical, logical)
  cluster = Cluster(("a:1", "b:2")[:num_tasks], 0)
  if expected:
    assert strategy_lib._choose_communication(cluster, communication) == expected
    return
  with pytest.raises(UserError, match=communication) as raised:
    make_strategy(cluster, communication)
  assert "\n" not in str(raised.value)


# Two collectives, the second of which reduces the first's result, and a variable that the chief
# broadcasts.
_PROGRAM = """
import json, os, signal, sys
from absl import logging
import tensorflow as tf
from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.distributed.strategy import describe, make_strategy

logging.set_verbosity(logging.INFO)
logging.use_absl_handler()
cpu, = tf.config.get_visible_devices("CPU")
tf.config.set_logical_device_configuration(
  cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM reached its handler"))
cluster = read_cluster()
strategy = make_strategy(cluster)
with strategy.scope():
  variable = tf.Variable(10.0 + cluster.task_index)

@tf.function
def step():
  def replica_fn():
    context = tf.distribute.get_replica_context()
    rank = tf.cast(context.replica_id_in_sync_group, tf.float32)
    total = context.all_reduce("SUM", [rank + 1.0, variable.read_value()])
    return context.all_reduce("SUM", total[0]), total[1]
  return strategy.run(replica_fn)

values = [strategy.experimental_local_results(value) for value in step()]
print(json.dumps([[float(x) for x in value] for value in values]))
print(json.dumps(describe(strategy, cluster)))
os.kill(os.getpid(), signal.SIGTERM)
"""


def _run_tasks(jobs, logical_cpus):
  """Runs _PROGRAM as every task of the jobs; returns (status, stdout lines, stderr) of each."""
  configs = [
    json.dumps({"cluster": jobs, "task": {"type": job, "index": index}})
    for job, addresses in jobs.items()
    for index in range(len(addresses))
  ]
  tasks = [
    subprocess.Popen(
      [sys.executable, "-c", _PROGRAM, str(logical_cpus)],
      env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CONFIG": config},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for config in configs
  ]
  try:
    results = [task.communicate(timeout=90) for task in tasks]
  finally:
    for task in tasks:
      task.kill()
      task.wait()
  return [
    (task.returncode, stdout.splitlines(), stderr)
    for task, (stdout, stderr) in zip(tasks, results, strict=True)
  ]


@pytest.mark.parametrize(
  "logical_cpus, strategy, communication, values",
  [
    (1, "default", "none", [[1.0], [10.0]]),
    (2, "MirroredStrategy", "ring", [[6.0, 6.0], [20.0, 20.0]]),
  ],
)
def test_one_task(logical_cpus, strategy, communication, values):
  # A cluster of one task runs as a single machine: its address is not even bound.
  ((status, stdout, stderr),) = _run_tasks({"worker": ["nowhere.invalid:1"]}, logical_cpus)
  assert status == 0, stderr
  assert json.loads(stdout[0]) == values
  assert json.loads(stdout[1]) == {
    "strategy": strategy,
    "communication": communication,
    "tasks": 1,
    "replicas": logical_cpus,
    "devices_per_task": [f"CPU:{i}" for i in range(logical_cpus)],
  }


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_two_tasks_all_reduce_over_ring_and_exit_cleanly(monkeypatch, host):
  if host == "[::1]":
    if not socket.has_dualstack_ipv6():
      pytest.skip("This machine has no IPv6.")
    # gRPC would connect the tasks through it.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.com")
  addresses = [address.replace("127.0.0.1", host) for address in free_addresses(2)]
  jobs = {"chief": addresses[:1], "worker": addresses[1:]}
  # In a cluster of several tasks TensorFlow uses only one of the two logical CPUs.
  results = _run_tasks(jobs, logical_cpus=2)
  for rank, (status, stdout, stderr) in enumerate(results):
    assert status == 0, stderr
    # (1 + 2) from each of 2 replicas; the chief's 10 from both.
    assert json.loads(stdout[0]) == [[6.0], [20.0]]
    assert json.loads(stdout[1]) == {
      "strategy": "MultiWorkerMirroredStrategy",
      "communication": "ring",
      "tasks": 2,
      "replicas": 2,
      "devices_per_task": ["CPU:0"],
    }
    assert stdout[2:] == ["SIGTERM reached its handler"]
    assert (
      f"Task {rank} of 2 ({addresses[rank]}, by TF_CONFIG) waits for {addresses[1 - rank]}."
      in stderr
    )
    assert "communication = CommunicationImplementation.RING" in stderr
