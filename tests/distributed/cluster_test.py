"""Tests of `tf_largebatch.distributed.cluster`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.launching import ROOT
from tf_largebatch.distributed import cluster as cluster_lib
from tf_largebatch.distributed.cluster import (
  Cluster,
  make_strategy,
  read_cluster,
  telling_lost_tasks,
)
from tf_largebatch.errors import LOST_TASK, InterruptedRunError, UserError


def _config(cluster, task_type="worker", index=0):
  return json.dumps({"cluster": cluster, "task": {"type": task_type, "index": index}})


_TWO = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
  "text, given",
  [
    ("", '""'),
    ('{"cluster":\n', r'"{\"cluster\":\n"'),
    ("[1, 2]", "[1, 2]"),
    ("{}", "{}"),
    ('{"cluster": {"worker": ["a:1"]}}', '{"cluster": {"worker": ["a:1"]}}'),
    ('{"task": {"type": "worker", "index": 0}}', '{"task": {"type": "worker", "index": 0}}'),
    ('{"cluster": ["a:1"], "task": {}}', '"cluster": ["a:1"]'),
    ('{"cluster": {"worker": ["a:1"]}, "task": 7}', '"task": 7'),
    (_config({}), "given {}"),
    (_config({"worker": []}), "given []"),
    (_config({"worker": "a:1"}), 'given "a:1"'),
    (_config({"chief": [], "worker": ["a:1"]}), 'job "chief"'),
    (_config({"ps": ["c:3"], **_TWO}), '"ps": ["c:3"]'),
    (_config({"evaluator": ["c:3"], **_TWO}), '"evaluator": ["c:3"]'),
    (_config({"master": ["c:3"], **_TWO}), '"master": ["c:3"]'),
    (_config({"chief": ["c:3", "d:4"], **_TWO}), '["c:3", "d:4"]'),
    # Kubeflow's TFJob with enableDynamicWorker, the text as its operator writes it.
    (
      '{"sparseCluster":{"worker":{"0":"run-worker-0.team.svc:2222"},"ps":null},'
      '"task":{"type":"worker","index":0}}',
      'given {"worker": {"0": "run-worker-0.team.svc:2222"}, "ps": null}, expected a fixed',
    ),
    (_config(_TWO, "evaluator"), '"evaluator"'),
    (_config(_TWO, "ps"), '"ps"'),
    (_config(_TWO, "chief"), '"chief"'),
    (_config(_TWO, "trainer"), '"trainer"'),
    (_config(_TWO, None), "null"),
    (_config(_TWO, ["worker"]), '["worker"]'),
    (_config(_TWO, index=2), "given 2"),
    (_config(_TWO, index=-1), "given -1"),
    (_config(_TWO, index="0"), 'given "0"'),
    (_config(_TWO, index=True), "given true"),
    (_config(_TWO, index=0.0), "given 0.0"),
    (_config(_TWO, index=None), "given null"),
    (_config({"chief": ["a:1"], "worker": ["b:2"]}, "worker", 1), "given 1"),
    (_config({"worker": ["a"]}), 'given "a"'),
    (_config({"worker": [":1"]}), 'given ":1"'),
    (_config({"worker": ["a:"]}), 'given "a:"'),
    (_config({"worker": ["a:x"]}), 'given "a:x"'),
    (_config({"worker": ["a:0"]}), 'given "a:0"'),
    (_config({"worker": ["a:65536"]}), 'given "a:65536"'),
    (_config({"worker": ["a b:1"]}), 'given "a b:1"'),
    (_config({"worker": ["a:1\n"]}), r'given "a:1\n"'),
    (_config({"worker": ["::1:1"]}), 'given "::1:1"'),
    (_config({"worker": ["grpc://a:1"]}), 'given "grpc://a:1"'),
    (_config({"worker": [1]}), "given 1"),
    (_config({"worker": ["a:1", "b:2", "a:1"]}), 'given ["a:1"]'),
    (_config({"chief": ["a:1"], "worker": ["a:1"]}), 'given ["a:1"]'),
  ],
)
def test_refuses_a_bad_tf_config_in_one_line(text, given):
  with pytest.raises(UserError) as raised:
    read_cluster({"TF_CONFIG": text})
  message = str(raised.value)
  assert "\n" not in message
  assert message.startswith("TF_CONFIG: ")
  assert given in message
  assert "expected" in message


@pytest.mark.parametrize(
  "environ, tasks, task_index",
  [
    ({}, (), 0),
    ({"TF_CONFIG": _config({"worker": ["a:1"]})}, ("a:1",), 0),
    ({"TF_CONFIG": _config({"chief": ["a:65535"]}, "chief")}, ("a:65535",), 0),
    ({"TF_CONFIG": _config({"worker": ["10.0.0.1:1", "[::1]:2"]})}, ("10.0.0.1:1", "[::1]:2"), 0),
    ({"TF_CONFIG": _config(_TWO, index=1)}, ("a:1", "b:2"), 1),
    # The chief comes first, wherever it stands in the JSON.
    ({"TF_CONFIG": _config({**_TWO, "chief": ["c:3"]}, "chief")}, ("c:3", "a:1", "b:2"), 0),
    ({"TF_CONFIG": _config({**_TWO, "chief": ["c:3"]})}, ("c:3", "a:1", "b:2"), 1),
    ({"TF_CONFIG": _config({**_TWO, "chief": ["c:3"]}, index=1)}, ("c:3", "a:1", "b:2"), 2),
  ],
)
def test_reads_a_good_tf_config(environ, tasks, task_index):
  cluster = read_cluster(environ)
  assert cluster == Cluster(tasks, task_index)
  assert cluster.num_tasks == max(1, len(tasks))
  assert cluster.is_chief == (task_index == 0)


@pytest.mark.parametrize(
  "text, tasks, task_index",
  [
    (
      '{"cluster":{"worker":["run-worker-0.team.svc:2222","run-worker-1.team.svc:2222"]},'
      '"task":{"type":"worker","index":1},"environment":"cloud"}',
      ("run-worker-0.team.svc:2222", "run-worker-1.team.svc:2222"),
      1,
    ),
    # The operator's CUSTOM_CLUSTER_DOMAIN, a port of the user's.
    (
      '{"cluster":{"chief":["run-chief-0.team.svc.cluster.local:4000"],'
      '"worker":["run-worker-0.team.svc.cluster.local:2222"]},'
      '"task":{"type":"worker","index":0},"environment":"cloud"}',
      ("run-chief-0.team.svc.cluster.local:4000", "run-worker-0.team.svc.cluster.local:2222"),
      1,
    ),
    (
      '{"cluster":{"chief":["run-chief-0.team.svc:2222"],"worker":["run-worker-0.team.svc:2222"]},'
      '"task":{"type":"chief","index":0},"environment":"cloud"}',
      ("run-chief-0.team.svc:2222", "run-worker-0.team.svc:2222"),
      0,
    ),
    # Its text for a single replica; versions of today set none then.
    (
      '{"cluster":{"worker":["run-worker-0.team.svc:2222"]},'
      '"task":{"type":"worker","index":0},"environment":"cloud"}',
      ("run-worker-0.team.svc:2222",),
      0,
    ),
  ],
)
def test_reads_what_kubeflows_operator_writes(text, tasks, task_index):
  assert read_cluster({"TF_CONFIG": text}) == Cluster(tasks, task_index)


def test_reading_does_not_import_tensorflow():
  code = (
    "import sys; from tf_largebatch.distributed import cluster; cluster.read_cluster();"
    " sys.exit('tensorflow' in sys.modules)"
  )
  environ = {**os.environ, "TF_CONFIG": _config(_TWO)}
  assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=60).returncode == 0


def test_refuses_a_port_in_use():
  with socket.socket() as listener:
    # As gRPC listens: the check must not pass for sharing the port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("", 0))
    listener.listen()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(UserError, match=re.escape(address)) as raised:
      make_strategy(Cluster(("127.0.0.1:1", address), 1))
  assert "\n" not in str(raised.value)


def test_a_port_is_free_as_soon_as_the_last_run_ended():
  with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    address = listener.getsockname()
    with socket.create_connection(address) as client:
      listener.accept()[0].close()  # The side that closes first is left in TIME_WAIT.
      client.recv(1)
  with cluster_lib._listening(f"127.0.0.1:{address[1]}"):
    pass


def _free_addresses(count):
  sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
  addresses = tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in sockets)
  for one in sockets:
    one.close()
  return addresses


def test_all_tasks_are_waited_for():
  addresses = _free_addresses(3)
  done = []

  def wait(index):
    cluster_lib._wait_for_all(cluster_lib.Cluster(addresses, index), 1.0)
    done.append(index)
    with cluster_lib._listening(addresses[index]):  # As TensorFlow's server, from now on.
      ended.wait(30)

  ended = threading.Event()
  threads = [threading.Thread(target=wait, args=(index,)) for index in range(3)]
  try:
    for thread in threads[:2]:
      thread.start()
    time.sleep(0.5)
    assert done == []
    threads[2].start()
    deadline = time.monotonic() + 20
    while len(done) < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert sorted(done) == [0, 1, 2]
  finally:
    ended.set()
    for thread in threads:
      thread.join()


def test_those_that_did_not_come_up_are_named():
  addresses = _free_addresses(3)
  with cluster_lib._listening(addresses[1]), pytest.raises(InterruptedRunError) as error:
    cluster_lib._wait_for_all(cluster_lib.Cluster(addresses, 0), 0.001)
  assert str(error.value).startswith(f"task 2 ({addresses[2]}) did not come up within 0.001 min")
  assert error.value.status == 138


def test_the_alarm_ends_a_process_that_holds_the_interpreters_lock():
  program = """
from tf_largebatch.distributed.cluster import _ended_by_alarm
with _ended_by_alarm(60):
  pass
with _ended_by_alarm(0.5):
  sum(range(10**12))
"""
  command = [sys.executable, "-c", program]
  finished = subprocess.run(command, cwd=ROOT, timeout=30, check=False)
  assert finished.returncode == -signal.SIGALRM


def _see_gpus(monkeypatch, physical, logical):
  import tensorflow as tf

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
  _see_gpus(monkeypatch, physical, logical)
  cluster = Cluster(("a:1", "b:2")[:num_tasks], 0)
  if expected:
    assert cluster_lib._choose_communication(cluster, communication) == expected
    return
  with pytest.raises(UserError, match=communication) as raised:
    make_strategy(cluster, communication)
  assert "\n" not in str(raised.value)


# Two collectives, the second of the first's result; one variable, broadcast from the chief.
_PROGRAM = """
import json, os, signal, sys
from absl import logging
import tensorflow as tf
from tf_largebatch.distributed import cluster as cluster_lib

logging.set_verbosity(logging.INFO)
logging.use_absl_handler()
cpu, = tf.config.get_visible_devices("CPU")
tf.config.set_logical_device_configuration(
  cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM reached its handler"))
cluster = cluster_lib.read_cluster()
strategy = cluster_lib.make_strategy(cluster)
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
print(json.dumps(cluster_lib.describe(strategy, cluster)))
os.kill(os.getpid(), signal.SIGTERM)
"""


def _run_tasks(configs, logical_cpus):
  """Runs a process for each TF_CONFIG (or None); returns (status, stdout lines, stderr)."""
  environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
  environ.pop("TF_CONFIG", None)
  tasks = [
    subprocess.Popen(
      [sys.executable, "-c", _PROGRAM, str(logical_cpus)],
      env={**environ, "TF_CONFIG": config} if config else environ,
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
  # A cluster of a single task is a plain single machine: its address is not even bound.
  ((status, stdout, stderr),) = _run_tasks(
    [_config({"worker": ["nowhere.invalid:1"]})], logical_cpus
  )
  assert status == 0, stderr
  assert json.loads(stdout[0]) == values
  assert json.loads(stdout[1]) == {
    "strategy": strategy,
    "communication": communication,
    "tasks": 1,
    "replicas": logical_cpus,
    "devices_per_task": [f"CPU:{i}" for i in range(logical_cpus)],
  }


def test_two_tasks_all_reduce_over_ring_and_exit_cleanly():
  with socket.socket() as first, socket.socket() as second:
    first.bind(("", 0))
    second.bind(("", 0))
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in (first, second)]
  jobs = {"chief": addresses[:1], "worker": addresses[1:]}
  # Two logical CPUs: TensorFlow uses one of them in a cluster of several tasks.
  results = _run_tasks([_config(jobs, "chief"), _config(jobs, "worker")], logical_cpus=2)
  for rank, (status, stdout, stderr) in enumerate(results):
    assert status == 0, stderr
    # (1 + 2) from each of 2 replicas; the chief's variable, twice.
    assert json.loads(stdout[0]) == [[6.0], [20.0]]
    assert json.loads(stdout[1]) == {
      "strategy": "MultiWorkerMirroredStrategy",
      "communication": "ring",
      "tasks": 2,
      "replicas": 2,
      "devices_per_task": ["CPU:0"],
    }
    assert stdout[2:] == ["SIGTERM reached its handler"]
    assert f"Task {rank} of 2 ({addresses[rank]}) waits for {addresses[1 - rank]}." in stderr
    assert "communication = CommunicationImplementation.RING" in stderr


_REMOTE = (
  "\nAdditional GRPC error information from remote target /job:worker/replica:0/task:{} while "
  "calling /tensorflow.WorkerService/RecvBuf:\n:UNKNOWN:Error received from peer  {{…}}"
)
_AGAIN = "\nThe error could be from a previous operation. Restart your program to reset."
_RESET = (
  "Collective ops is aborted by: recvmsg:Connection reset by peer" + _REMOTE.format(1) + _AGAIN
)
_PASSED_ON = "Collective ops is aborted by: " + _RESET + _REMOTE.format(2) + _AGAIN


@pytest.mark.parametrize(
  "message, lost",
  [
    pytest.param(_RESET, "task 1 (b:22)", id="the other end of this task's connection"),
    pytest.param(_PASSED_ON, "task 1 (b:22)", id="passed on by a task that lives"),
    pytest.param(
      "Collective ops is aborted by: Connection refused" + _AGAIN + _REMOTE.format(2) + _AGAIN,
      "task 2 (web:2)",
      id="named only by who passed it on",
    ),
    pytest.param(
      "The following tasks are unhealthy: /job:worker/replica:0/task:1, "
      "/job:worker/replica:0/task:2 [type.googleapis.com/tensorflow.CoordinationServiceError='']",
      "task 1 (b:22) and task 2 (web:2)",
      id="no heartbeats",
    ),
    pytest.param(
      "Deadline Exceeded while calling /tensorflow.CoordinationService/Heartbeat",
      "task 0 (a:1)",
      id="the chief's service",
    ),
    pytest.param("UNAVAILABLE: ipv4:web:22: x; b:222; ipv4:web:2: y", "task 2 (web:2)", id="part"),
  ],
)
def test_a_lost_task_is_told_in_one_line(message, lost):
  import tensorflow as tf

  index = 0 if "task 0" not in lost else 1
  with (
    pytest.raises(InterruptedRunError) as info,
    telling_lost_tasks(Cluster(("a:1", "b:22", "web:2"), index), lambda: 7),
  ):
    raise tf.errors.UnavailableError(None, None, message)
  assert info.value.status == LOST_TASK
  assert str(info.value).startswith(f"Lost {lost}, which ended or cannot be reached; the last ")
  assert "step is 7. " in str(info.value)


def test_another_error_than_a_lost_task_stays_what_it_is():
  import tensorflow as tf

  with (
    pytest.raises(tf.errors.InvalidArgumentError),
    telling_lost_tasks(Cluster(("a:1", "b:22"), 0), lambda: None),
  ):
    raise tf.errors.InvalidArgumentError(None, None, "shapes differ")
