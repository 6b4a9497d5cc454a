"""The benchmark on two tasks with real collectives, its arithmetic, and what it refuses."""

import json
import types

import pytest

from tests.launching import launch, run_module
from tf_largebatch.errors import LOST_TASK, InterruptedRunError
from tools.benchmark import allreduce

# He et al.'s ResNet-20 of 10 classes: convolutions, the dense layer, γ and β of 19 BNs.
_CONVOLUTIONS = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
_CHANNELS = 7 * 16 + 6 * 32 + 6 * 64
_GRADIENTS = {"tensors": 19 + 2 + 2 * 19, "bytes": 4 * (_CONVOLUTIONS + 650 + 2 * _CHANNELS)}
_OTHERS = {"tensors": 2 * 19 + 3, "bytes": 4 * (2 * _CHANNELS + 3)}


def test_two_tasks(tmp_path):
  finished = launch(
    2,
    "tools.benchmark.allreduce",
    *("--sizes=4,4096", "--repeats=3", "--network=resnet20", "--passes=2"),
    *("--bytes_per_pack=300000", "--step_seconds=0.05", f"--json={tmp_path / 'found.json'}"),
  )
  assert finished.returncode == 0, finished.stdout
  found = json.loads((tmp_path / "found.json").read_text())
  assert (found["communication"], found["tasks"], found["replicas"]) == ("ring", 2, 2)
  assert found["repeats"] == 3 and {"python", "tensorflow", "keras"} == set(found["versions"])
  assert [point["bytes"] for point in found["points"]] == [4, 4096]
  for point in found["points"]:
    assert point["bus_bytes_per_second"] == pytest.approx(point["bytes"] / point["seconds"])

  network = found["network"]
  assert (network["gradients"], network["others"]) == (_GRADIENTS, _OTHERS)
  in_float32, in_bfloat16 = network["reductions"]
  assert (in_float32["wire"], in_bfloat16["wire"]) == ("float32", "bfloat16")
  # Each pack but the last is larger than requested; in bfloat16 the others need one more.
  whole = _GRADIENTS["bytes"] + _OTHERS["bytes"]
  assert 1 < in_float32["collectives"] <= whole / 300000 + 1
  assert 2 < in_bfloat16["collectives"] <= _GRADIENTS["bytes"] / 2 / 300000 + 2
  # Rounding to 8 bits is off by up to 2^-9 of a value, each addend's and the sum's.
  assert 2**-11 < network["bfloat16_relative_error"] < 2**-7
  for name, total in (("tensors", 59 + 41), ("bytes", whole)):
    assert sum(each[name] for each in network["classes"]) == total
  for timed in (*found["points"], *network["reductions"], *network["classes"]):
    assert 0 < timed["min"] <= timed["seconds"] <= timed["max"]

  seconds = in_float32["seconds"]
  assert in_float32["share_of_step"] == pytest.approx(seconds / (0.05 + seconds))
  assert in_float32["can_hide"] == (seconds <= 0.05 / 3)
  assert network["verdict"] in finished.stdout
  assert f"costs {100 * seconds / (0.05 + seconds):.3g} % of the step" in network["verdict"]
  assert network["verdict"].endswith(": yes." if seconds <= 0.05 / 3 else ": no.")


def test_bus_bandwidth_and_verdict():
  # A ring of four: each sends three quarters of the message twice.
  assert allreduce.bus_bytes_per_second(1000, 4, 0.5) == 2 * 750 / 0.5
  assert allreduce.judge(1.0, 3.0, 1) == {"share_of_step": 0.25, "can_hide": True}
  assert allreduce.judge(2.1, 3.0, 1)["can_hide"] is False
  # Of two passes only the second one's backprop, a second here.
  assert [allreduce.judge(s, 3.0, 2)["can_hide"] for s in (0.9, 1.1)] == [True, False]


@pytest.fixture
def values():
  """The flags' defaults, but little to measure."""
  return types.SimpleNamespace(
    sizes=["4"],
    repeats=1,
    network="resnet20",
    num_classes=None,
    bytes_per_pack=["0"],
    wire=["float32"],
    json="",
    communication="auto",
    cluster_timeout_minutes=1.0,
    step_seconds=0.0,
    passes=1,
  )


def test_one_replica_has_nothing_to_reduce(values, capsys):
  allreduce.run(values)
  assert capsys.readouterr().out.startswith("1 replica: there is nothing to reduce")


def test_a_lost_task_is_named(values, monkeypatch):
  import tensorflow as tf

  config = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}}
  monkeypatch.setenv("TF_CONFIG", json.dumps(config))

  def measure(*_):
    raise tf.errors.UnavailableError(None, None, "/job:worker/replica:0/task:1: Socket closed")

  monkeypatch.setattr(allreduce, "measure", measure)
  with pytest.raises(InterruptedRunError, match=r"^Lost task 1 \(b:2\)") as raised:
    allreduce.run(values)
  assert raised.value.status == LOST_TASK


@pytest.mark.parametrize(
  "flag",
  [
    "--sizes=1024,6",
    "--sizes=",
    "--sizes=1k",
    "--bytes_per_pack=-1",
    "--step_seconds=nan",
    "--json=/nowhere/found.json",
  ],
)
def test_refused_in_one_line(flag):
  finished = run_module("tools.benchmark.allreduce", flag)
  assert finished.returncode == 1
  assert finished.stderr.startswith(f"error: {flag}") and finished.stderr.count("\n") == 1
