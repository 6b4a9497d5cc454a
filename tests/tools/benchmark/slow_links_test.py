"""The measurement on slow links: a real run, and its continuation after an interruption."""

import contextlib
import json
import os

import pytest

from tests.launching import run_module
from tf_largebatch.errors import UserError
from tools.benchmark import slow_links
from tools.benchmark.links.cluster import Link
from tools.benchmark.links.plan import Pace, plan
from tools.resilience.network import isolated_network

_MODULE = "tools.benchmark.slow_links"
_SMALL = ("--networks=resnet8", "--image_size=8", "--per_worker_batch_size=2", "--tasks=2")


def test_a_real_run(tmp_path):
  try:
    with isolated_network(1) as network:
      network.limit(1)
  except UserError as error:
    pytest.skip(str(error))
  path = tmp_path / "found.json"
  link = ("--gigabits=0.1", "--delays_ms=20", "--bytes_per_pack=0", "--turns=1", "--seconds=0.1")
  arguments = (*_SMALL, *link, f"--json={path}")
  process = run_module(_MODULE, *arguments, timeout=240)
  assert process.returncode == 0, process.stderr
  found = json.loads(path.read_text())
  assert found["complete"] and found["claims"]["c2"]["settings"] == 1
  assert found["runs"][0]["versions"]["tensorflow"] and found["runs"][0]["hardware"]["cores"] >= 1
  (setting,) = found["settings"]
  assert setting["bytes"] > 4 * 19_000 and setting["collectives"] == 1
  assert 0.07e9 < setting["link"]["bits_per_second"] < 0.105e9
  assert 0.04 <= setting["link"]["round_trip_seconds"] < 0.1
  (turn,) = setting["turns"]
  assert len(turn["alone"]) == 2 and all(seconds > 0 for task in turn["alone"] for seconds in task)
  assert min(second for task in turn["alone"] for second in task) < 0.04  # Nothing is sent.
  # A ring of two tasks: two messages, one after the other.
  assert all(seconds > 0.04 for seconds in (*turn["step"], *turn["reduce"]))
  assert setting["judged"]["forecast_seconds"] > 0.04
  assert "c2: holds in " in process.stdout and "resnet8, 2, 0, 0.1, 20.0" in process.stdout
  # The same command finds everything measured, and starts no task.
  again = run_module(_MODULE, *arguments, timeout=30)
  assert again.stdout == process.stdout and "turn" not in again.stderr
  assert json.loads(path.read_text())["settings"] == found["settings"]


class _FakeCluster:
  """Steps of 1 s, all-reduces of 0.5 s; fails at the last of so many links."""

  links_left = 100

  def __init__(self, recipe, packs):
    self.facts = {"bytes": 8.0, "collectives": [1 for _ in packs]}
    self.tasks = recipe.workers

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  @contextlib.contextmanager
  def linked_by(self, link):
    _FakeCluster.links_left -= 1
    if not _FakeCluster.links_left:
      raise UserError("interrupted")
    yield {"real_time": True}

  def check_link(self):
    return {"round_trip_seconds": 0.0, "bits_per_second": 1.0}

  def time_alone(self, untimed, timed):
    return [[1.0] * timed] * self.tasks

  def time(self, what, pack, untimed, timed):
    return [{"step": 1.5, "reduce": 0.5}[what]] * timed


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(slow_links, "Cluster", _FakeCluster)
  links = [Link(0.1, 0.0), Link(1.0, 0.0), Link(10.0, 0.0)]
  (group,) = plan(["resnet20"], [2], links, [2**24, 0])

  def measure():
    results = slow_links.Results(tmp_path / "found.json", {"commit": "a"})
    slow_links.measure(group, 3, Pace(0.5), results)

  _FakeCluster.links_left = 5
  with pytest.raises(UserError, match="interrupted"):
    measure()
  found = json.loads((tmp_path / "found.json").read_text())
  assert sum(len(setting["turns"]) for setting in found["settings"]) == 2 * 4
  assert not found["complete"]
  _FakeCluster.links_left = 100
  measure()
  assert _FakeCluster.links_left == 100 - 5  # Nine turns of links, less the four before.
  found = json.loads((tmp_path / "found.json").read_text())
  assert [len(setting["turns"]) for setting in found["settings"]] == [3] * 6
  assert found["complete"] and len(found["runs"]) == 2
  # One pack is exposed as a whole.
  assert all(setting["judged"]["forecast_seconds"] == 1.5 for setting in found["settings"])
  assert found["claims"]["c1"]["holds"] == found["claims"]["c2"]["holds"] == 6


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "Give --json=FILE"),
    (("--json=a", "--networks=vgg"), "--networks=vgg is refused"),
    (("--json=a", "--gigabits=fast"), "--gigabits=fast is refused"),
    (("--json=README.md",), "--json=README.md is not a file of this program"),
  ],
)
def test_a_users_mistake_gets_one_line(arguments, message):
  process = run_module(_MODULE, *arguments)
  assert process.returncode == 1
  assert process.stderr.startswith(f"error: {message}") and process.stderr.count("\n") == 1


def test_missing_programs_get_one_line(tmp_path):
  environment = {**os.environ, "PATH": str(tmp_path)}
  process = run_module(_MODULE, *_SMALL, f"--json={tmp_path / 'a'}", env=environment)
  assert process.returncode == 1 and process.stderr.count("\n") == 1
  assert process.stderr.startswith("error: A network between tasks needs ip, unshare, nsenter")
  assert process.stderr.endswith("use --tasks=1\n")
