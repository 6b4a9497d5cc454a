"""The cluster from Slurm's environment, and `train.sbatch` on a real Slurm if it is installed."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launching import ROOT, SMALL, run_module
from tests.tools.slurm_daemons import MISSING, NODES, Slurm
from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError

# Runs all tests in one process of pytest-xdist: their common Slurm takes long to start.
pytestmark = pytest.mark.xdist_group("slurm")

# Imitates `scontrol show hostnames` for names of the form n[0-2], the only ones used here.
_SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] || exit 2
case $3 in
  n\\[0-*\\]) last=${3#*-}; seq --format=n%.0f 0 "${last%]}" ;;
  n0) echo n0 ;;
  *) echo "Invalid hostlist: $3" >&2; exit 1 ;;
esac
"""


def _environ(counts, rank, **changes):
  """Returns Slurm's variables for this rank, with block distribution over nodes n0, n1, …"""
  places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
  node, local = places[rank]
  return {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": f"n[0-{len(counts) - 1}]" if len(counts) > 1 else "n0",
    "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)),
    "SLURM_STEP_NUM_TASKS": str(len(places)),
    "SLURM_PROCID": str(rank),
    "SLURM_NODEID": str(node),
    "SLURM_LOCALID": str(local),
    "SLURMD_NODENAME": f"n{node}",
    **changes,
  }


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory):
  """Puts an imitation of scontrol on PATH."""
  folder = tmp_path_factory.mktemp("bin")
  (folder / "scontrol").write_text(_SCONTROL)
  (folder / "scontrol").chmod(0o755)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield


def test_a_cluster_of_seven_tasks_on_four_nodes(scontrol):
  environ = _environ([2, 2, 2, 1], 3, SLURM_STEP_TASKS_PER_NODE="2(x3),1")
  cluster = read_cluster(environ)
  assert cluster.task_index == 3
  # Job 42, step 0: 10000 + 16 · 42.
  expected = ["n0:10672", "n0:10673", "n1:10672", "n1:10673", "n2:10672", "n2:10673", "n3:10672"]
  assert list(cluster.tasks) == expected
  assert read_cluster(environ | {"TF_LARGEBATCH_PORT": "2222"}).tasks[:3] == (
    "n0:2222",
    "n0:2223",
    "n1:2222",
  )


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_every_task_makes_the_same_cluster_and_finds_itself(scontrol, counts):
  clusters = [read_cluster(_environ(counts, rank)) for rank in range(sum(counts))]
  assert {cluster.tasks for cluster in clusters} == {clusters[0].tasks}
  for rank, cluster in enumerate(clusters):
    assert cluster.task_index == rank
    node = _environ(counts, rank)["SLURMD_NODENAME"]
    assert cluster.tasks[rank].startswith(f"{node}:")


def _ports(job, step):
  environ = _environ([16], 0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))
  return {int(address.partition(":")[2]) for address in read_cluster(environ).tasks}


def test_concurrent_jobs_and_steps_have_different_ports(scontrol):
  ports = [_ports(job, step) for job in (1249, 1250, 1251, 10**6 + 7) for step in (0, 1)]
  assert len(set.union(*ports)) == len(ports) * 16
  assert set.union(*ports) <= set(range(10000, 30000))


def test_the_only_task_needs_no_cluster_and_no_scontrol(monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert read_cluster(_environ([1], 0)) == Cluster()


@pytest.mark.parametrize(
  "counts, rank, changes, message",
  [
    ([2], 0, {"SLURM_PROCID": ""}, "SLURM_PROCID is not set, .* srun"),
    ([2], 0, {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x: expected a number"),
    ([2], 0, {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"PER_NODE=2\(x: expected the form"),
    ([2], 0, {"SLURM_STEP_NUM_TASKS": "4"}, "has 2 tasks, but .*=4: .* heterogeneous"),
    ([2, 1], 0, {"SLURM_STEP_NODELIST": "n0"}, "names 1 nodes, but .* has 2"),
    ([2, 1], 0, {"SLURM_STEP_NODELIST": "n["}, "scontrol show hostnames .*: Invalid hostlist"),
    # In cyclic distribution task 1 is the first task of the second node.
    ([2, 2], 2, {"SLURM_PROCID": "1"}, "task 1 is number 0 of node 1, .*--distribution=block"),
    ([2], 0, {"SLURM_PROCID": "2"}, "task 2 is number 0 of node 0"),
    ([2, 1], 0, {"SLURMD_NODENAME": "n1"}, "task 0 runs on n1, .* is n0"),
  ],
)
def test_an_environment_that_does_not_fit_is_refused(scontrol, counts, rank, changes, message):
  with pytest.raises(UserError, match=message):
    read_cluster(_environ(counts, rank, **changes))


def test_an_error_of_the_trainer_is_one_line(tmp_path):
  environ = {**_environ([2], 0), "PATH": ""}
  finished = run_module("tf_largebatch.train", f"--work_dir={tmp_path / 'run'}", env=environ)
  assert (finished.returncode, finished.stdout) == (1, "")
  assert re.fullmatch(r"error: cannot run scontrol .*\n", finished.stderr)


def test_the_job_starts_the_trainer_without_an_inherited_cluster(tmp_path):
  (tmp_path / "srun").write_text('#!/bin/sh\necho "$@ ${TF_CONFIG-unset}"\n')
  (tmp_path / "srun").chmod(0o755)
  environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TF_CONFIG": "another run's"}
  with open(tmp_path / "log", "w") as log:
    command = ["bash", ROOT / "tools/slurm/train.sbatch", "--work_dir=run"]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=log, check=True)
  assert done.stdout.decode().endswith(" python -m tf_largebatch.train --work_dir=run unset\n")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  if MISSING:
    pytest.skip(f"Slurm is not installed: {', '.join(MISSING)} missing")
  if os.geteuid():
    pytest.skip("starting Slurm needs root")
  if "SLURM_TESTS" not in os.environ:
    pytest.skip("takes minutes: set SLURM_TESTS=1 to start Slurm and run it")
  with Slurm(tmp_path_factory.mktemp("slurm")) as running:
    yield running


def test_a_job_of_two_tasks_is_preempted_and_completes(slurm, tmp_path):
  log, run = tmp_path / "log", tmp_path / "run"
  # On one node, because both nodes are this machine and TensorFlow listens on all its addresses.
  options = ("--nodes=1", "--ntasks-per-node=2")
  # --verbosity=0: both tasks log, not only the chief.
  arguments = (*SMALL, "--epochs=12", "--verbosity=0", f"--work_dir={run}")
  job = slurm.submit(log, *arguments, options=options)
  slurm.wait_for(log, "epoch 3: ")
  slurm.preempt()
  ended, output = slurm.wait(job), log.read_text()
  assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
  result = json.loads((run / "result.json").read_text())
  assert result["steps"] == 12 * 4
  (step,) = set(re.findall(r"error: Stopped .* after step (\d+) of 48, saved", output))
  assert int(step) > 0 and f"Continuing from step {step} of 48" in output
  cluster = json.loads((run / "recipe.json").read_text())["cluster"]
  assert (cluster["tasks"], cluster["communication"]) == (2, "ring")
  assert set(re.findall(r"weights_sha256 (\w{64})", output)) == {result["weights_sha256"]}
  places = re.findall(r"Task ([01]) of 2 \(127\.0\.0\.[12]:\d+, by Slurm\) waits", output)
  assert sorted(places) == ["0", "0", "1", "1"]


@pytest.fixture
def submit_stand_in(slurm, tmp_path):
  """Submits train.sbatch with a shell script in place of Python."""

  def submit(script, *options, **environ):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{script}")
    (tmp_path / "python").chmod(0o755)
    return slurm.submit(tmp_path / "log", options=options, first_on_path=tmp_path, **environ)

  return submit


def test_tasks_find_themselves_on_two_nodes(slurm, submit_stand_in, tmp_path):
  program = "from tf_largebatch import read_cluster as r; print(r().tasks, r().task_index)"
  job = submit_stand_in(f"exec '{sys.executable}' -c '{program}'", "--ntasks-per-node=2")
  slurm.wait(job)
  lines = (tmp_path / "log").read_text().splitlines()
  first = 10000 + 16 * int(job)
  expected = tuple(f"{node}:{first + local}" for node in NODES for local in range(2))
  assert sorted(lines) == [f"{expected} {rank}" for rank in range(4)]


_WAIT_FOR_SIGTERM = "trap 'exit 143' TERM; echo ready; for _ in {1..300}; do sleep 0.1; done"


def test_a_user_error_fails_the_job_although_the_other_task_could_resume(slurm, submit_stand_in):
  ended = slurm.wait(
    submit_stand_in(f"((SLURM_PROCID)) || {{ sleep 1; exit 1; }}; {_WAIT_FOR_SIGTERM}")
  )
  assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")


@pytest.mark.parametrize("end", ["exit 138", "kill -KILL $$"])
def test_a_lost_task_restarts_the_job(slurm, submit_stand_in, end):
  script = f"[[ $SLURM_RESTART_COUNT ]] && exit 0; ((SLURM_PROCID)) || {{ {end}; }}; sleep 30"
  ended = slurm.wait(submit_stand_in(script))
  assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_restarts_are_limited(slurm, submit_stand_in):
  ended = slurm.wait(submit_stand_in("exit 138", MAX_RESTARTS="1"))
  assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "138:0", "1")


def test_sigterm_to_the_tasks_restarts_the_job(slurm, submit_stand_in, tmp_path):
  job = submit_stand_in(f"[[ $SLURM_RESTART_COUNT ]] && exit 0; {_WAIT_FOR_SIGTERM}")
  slurm.wait_for(tmp_path / "log", "ready\nready\n")
  slurm.command("scancel", "--signal=TERM", job)
  ended = slurm.wait(job)
  assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_a_cancelled_job_stays_cancelled(slurm, submit_stand_in, tmp_path):
  job = submit_stand_in(_WAIT_FOR_SIGTERM)
  slurm.wait_for(tmp_path / "log", "ready\nready\n")
  slurm.command("scancel", job)
  ended = slurm.wait(job)
  time.sleep(2)
  assert slurm.show(job)["JobState"] == ended["JobState"] == "CANCELLED"
  assert ended["Restarts"] == "0"
