"""`read_cluster` against `TF_CONFIG`s, valid and invalid."""

import json
import os
import subprocess
import sys

import pytest

from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError


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
    # As Kubeflow's operator writes it for a TFJob with enableDynamicWorker.
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
    (_config({"worker": ["[::1::]:1"]}), 'given "[::1::]:1"'),
    (_config({"worker": ["[1.2.3.4]:1"]}), 'given "[1.2.3.4]:1"'),
    # Python's resolver raises UnicodeError for these.
    (_config({"worker": ["a..b:1"]}), 'given "a..b:1"'),
    (_config({"worker": [".:1"]}), 'given ".:1"'),
    (_config({"worker": [f"{'a' * 64}.b:1"]}), f'given "{"a" * 64}.b:1"'),
    (_config({"worker": [f"{'a.' * 127}b:1"]}), 'given "a.a.'),
    (_config({"worker": ["grpc://a:1"]}), 'given "grpc://a:1"'),
    (_config({"worker": [1]}), "given 1"),
    (_config({"worker": ["a:1", "b:2", "a:1"]}), 'given ["a:1"]'),
    (_config({"chief": ["a:1"], "worker": ["a:1"]}), 'given ["a:1"]'),
  ],
)
def test_rejects_an_invalid_tf_config_in_one_line(text, given):
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
    ({"TF_CONFIG": _config({"worker": ["a.b.:1"]})}, ("a.b.:1",), 0),
    ({"TF_CONFIG": _config({"worker": [f"{'a' * 63}.b:1"]})}, (f"{'a' * 63}.b:1",), 0),
    ({"TF_CONFIG": _config(_TWO, index=1)}, ("a:1", "b:2"), 1),
    # The chief comes first, whatever the order in the JSON.
    ({"TF_CONFIG": _config({**_TWO, "chief": ["c:3"]}, "chief")}, ("c:3", "a:1", "b:2"), 0),
    ({"TF_CONFIG": _config({**_TWO, "chief": ["c:3"]})}, ("c:3", "a:1", "b:2"), 1),
    ({"TF_CONFIG": _config({**_TWO, "chief": ["c:3"]}, index=1)}, ("c:3", "a:1", "b:2"), 2),
  ],
)
def test_reads_a_valid_tf_config(environ, tasks, task_index):
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
    # With the operator's CUSTOM_CLUSTER_DOMAIN and a port that the user chose.
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
    # For a single replica; current versions of the operator set no TF_CONFIG then.
    (
      '{"cluster":{"worker":["run-worker-0.team.svc:2222"]},'
      '"task":{"type":"worker","index":0},"environment":"cloud"}',
      ("run-worker-0.team.svc:2222",),
      0,
    ),
  ],
)
def test_reads_the_tf_config_of_kubeflows_operator(text, tasks, task_index):
  assert read_cluster({"TF_CONFIG": text}) == Cluster(tasks, task_index)


def test_reading_does_not_import_tensorflow():
  code = (
    "import sys; from tf_largebatch.distributed import cluster; cluster.read_cluster();"
    " sys.exit('tensorflow' in sys.modules)"
  )
  environ = {**os.environ, "TF_CONFIG": _config(_TWO)}
  assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=60).returncode == 0
