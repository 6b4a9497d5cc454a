"""`TF_CONFIG` from Slurm's environment, and `train.sbatch` on a real Slurm if it is installed.

The real Slurm is this test's own, of two nodes that are both this machine: 127.0.0.1 and
127.0.0.2. It needs root and Debian's packages slurmctld, slurmd and munge.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launching import ROOT, SMALL
from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.errors import UserError
from tools.slurm import task

# One process takes all of them, for what they share takes long to make.
pytestmark = pytest.mark.xdist_group("slurm")

# What `scontrol show hostnames` does for names of the form n[0-2]; it gets nothing else here.
_SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] || exit 2
case $3 in
  n\\[0-*\\]) last=${3#*-}; seq --format=n%.0f 0 "${last%]}" ;;
  n0) echo n0 ;;
  *) echo "Invalid hostlist: $3" >&2; exit 1 ;;
esac
"""


def _environ(counts, rank, **changes):
  """What Slurm tells the task of this rank, with block distribution over nodes n0, n1, …"""
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
  """Puts a stand-in for Slurm's scontrol on PATH."""
  folder = tmp_path_factory.mktemp("bin")
  (folder / "scontrol").write_text(_SCONTROL)
  (folder / "scontrol").chmod(0o755)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield


def _cluster(environ, **arguments):
  return read_cluster({"TF_CONFIG": task.tf_config(environ, **arguments)})


def test_a_cluster_of_seven_tasks_on_four_nodes(scontrol):
  environ = _environ([2, 2, 2, 1], 3, SLURM_STEP_TASKS_PER_NODE="2(x3),1")
  cluster = _cluster(environ)
  assert cluster.task_index == 3
  # Job 42, step 0: 10000 + 16 · 42.
  expected = ["n0:10672", "n0:10673", "n1:10672", "n1:10673", "n2:10672", "n2:10673", "n3:10672"]
  assert list(cluster.tasks) == expected
  assert _cluster(environ, port=2222).tasks[:3] == ("n0:2222", "n0:2223", "n1:2222")


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_every_task_makes_the_same_cluster_and_finds_itself(scontrol, counts):
  clusters = [_cluster(_environ(counts, rank)) for rank in range(sum(counts))]
  assert {cluster.tasks for cluster in clusters} == {clusters[0].tasks}
  for rank, cluster in enumerate(clusters):
    assert cluster.task_index == rank
    node = _environ(counts, rank)["SLURMD_NODENAME"]
    assert cluster.tasks[rank].startswith(f"{node}:")


def _ports(job, step):
  environ = _environ([16], 0, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))
  return {int(address.partition(":")[2]) for address in _cluster(environ).tasks}


def test_jobs_and_steps_at_one_time_have_ports_of_their_own(scontrol):
  ports = [_ports(job, step) for job in (1249, 1250, 1251, 10**6 + 7) for step in (0, 1)]
  assert len(set.union(*ports)) == len(ports) * 16
  assert set.union(*ports) <= set(range(10000, 30000))


def test_the_only_task_needs_no_cluster_and_no_scontrol(monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert task.tf_config(_environ([1], 0)) is None


@pytest.mark.parametrize(
  "counts, rank, changes, message",
  [
    ([2], 0, {"SLURM_PROCID": ""}, "SLURM_PROCID is not set: .* srun"),
    ([2], 0, {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x: expected a number"),
    ([2], 0, {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, r"PER_NODE=2\(x: expected the form"),
    ([2], 0, {"SLURM_STEP_NUM_TASKS": "4"}, "has 2 tasks, .*=4: .* heterogeneous"),
    ([2, 1], 0, {"SLURM_STEP_NODELIST": "n0"}, "names 1 nodes, .* 2"),
    ([2, 1], 0, {"SLURM_STEP_NODELIST": "n["}, "scontrol show hostnames .*: Invalid hostlist"),
    # Cyclic distribution, in which task 1 is the second node's first.
    ([2, 2], 2, {"SLURM_PROCID": "1"}, "task 1 is number 0 of node 1, .*--distribution=block"),
    ([2], 0, {"SLURM_PROCID": "2"}, "task 2 is number 0 of node 0"),
    ([2, 1], 0, {"SLURMD_NODENAME": "n1"}, "task 0 runs on n1, .* is n0"),
  ],
)
def test_an_environment_that_does_not_fit_is_refused(scontrol, counts, rank, changes, message):
  with pytest.raises(UserError, match=message):
    task.tf_config(_environ(counts, rank, **changes))


def _start_task(environ, *arguments):
  return subprocess.run(
    [sys.executable, "-m", "tools.slurm.task", *arguments],
    cwd=ROOT,
    env={"PATH": os.environ["PATH"], **environ},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


@pytest.mark.parametrize("environ", [{}, {**_environ([2], 0), "PATH": ""}], ids=["none", "no PATH"])
def test_a_mistake_ends_in_one_line(environ):
  finished = _start_task(environ)
  assert (finished.returncode, finished.stdout) == (1, "")
  assert re.fullmatch(r"error: .*\n", finished.stderr)


def test_the_trainer_takes_over_with_its_flags_and_without_a_foreign_cluster(scontrol):
  environ = {**_environ([1], 0), "TF_CONFIG": "of another run"}
  finished = _start_task(environ, "--", "--epochs=-3")
  assert finished.returncode == 1
  assert re.search(r"^error: .*epochs.*-3", finished.stderr, re.MULTILINE), finished.stderr


# The real Slurm.

_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_MISSING = [
  name
  for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
  if not shutil.which(name, path=_PATH)
]
_NODES = ("127.0.0.1", "127.0.0.2")

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=127.0.0.2 NodeHostname=node2 NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE
"""


class Slurm:
  """A Slurm of two nodes on this machine, which runs while the context is entered.

  Everything of it is in `folder`; jobs start in `checkout`. (cred_expire is also how
  long a job that is queued again must wait.)
  """

  def __init__(self, folder, checkout=ROOT):
    self._folder, self._checkout = pathlib.Path(folder), checkout
    self._daemons = []
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    self._environ = {**own, "PATH": _PATH, "SLURM_CONF": f"{folder}/slurm.conf"}

  def __enter__(self):
    for name in ("state", "spool"):
      (self._folder / name).mkdir(parents=True)
    key = self._folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    with contextlib.ExitStack() as stack:
      listeners = [stack.enter_context(socket.socket()) for _ in range(3)]
      for listener in listeners:
        listener.bind(("", 0))
      ports = [listener.getsockname()[1] for listener in listeners]
    host = socket.gethostname().partition(".")[0]
    configuration = _CONFIGURATION.format(folder=self._folder, host=host, ports=ports)
    (self._folder / "slurm.conf").write_text(configuration)
    files = [f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    # --force: it is root's, in a folder of root's.
    munge_socket = self._folder / "munge.socket"
    try:
      self._start("munged", "--foreground", "--force", f"--socket={munge_socket}", *files)
      self._wait_for(munge_socket.exists, 30)
      self._start("slurmctld", "-D", "-i")
      for node in _NODES:
        self._start("slurmd", "-D", "-N", node)
      self._wait_for(
        lambda: set(self._told("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, 60
      )
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_):
    self._told("scancel", "--user=root")
    with contextlib.suppress(TimeoutError):
      self._wait_for(lambda: not self._told("squeue", "--noheader"), 40)
    for daemon in reversed(self._daemons):
      daemon.terminate()
    for daemon in self._daemons:
      try:
        daemon.wait(15)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    # The jobs' processes outlive slurmd, should any be left; only they know this SLURM_CONF.
    for process in psutil.process_iter():
      with contextlib.suppress(psutil.Error):
        if process.environ().get("SLURM_CONF") == self._environ["SLURM_CONF"]:
          process.kill()

  def _start(self, *command):
    with open(self._folder / "daemons.log", "ab") as log:
      self._daemons.append(
        subprocess.Popen(command, env=self._environ, stdout=log, stderr=subprocess.STDOUT)
      )

  def _told(self, *command):
    finished = subprocess.run(
      command, env=self._environ, cwd=self._checkout, capture_output=True, text=True, timeout=60
    )
    return finished.stdout

  def _wait_for(self, condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
      if time.monotonic() > deadline:
        log = (self._folder / "daemons.log").read_text(errors="replace")
        raise TimeoutError(f"{seconds} s passed\n{log[-3000:]}")
      time.sleep(0.2)

  def submit(self, log, *arguments, options=(), first_on_path="", **environ):
    """Submits train.sbatch with the trainer's arguments and returns the job's number."""
    path = f"{first_on_path or os.path.dirname(sys.executable)}:{_PATH}"
    command = ["sbatch", "--parsable", f"--output={log}", *options, "tools/slurm/train.sbatch"]
    finished = subprocess.run(
      [*command, *arguments],
      env={**self._environ, "PATH": path, **environ},
      cwd=self._checkout,
      capture_output=True,
      text=True,
      timeout=60,
      check=True,
    )
    return finished.stdout.strip()

  def command(self, *command):
    """Runs a command of Slurm's, which must succeed."""
    subprocess.run(command, env=self._environ, check=True, timeout=60)

  def preempt(self):
    """Has a short job of a partition that goes first take all nodes."""
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    self.command("sbatch", "--quiet", *options, "--wrap=sleep 1")

  def show(self, job):
    """What `scontrol show job` tells: JobState, Restarts, ExitCode, …"""
    told = self._told("scontrol", "show", "job", "--oneliner", job)
    return dict(re.findall(r"(\w+)=(\S*)", told))

  def wait(self, job, seconds=400):
    """Waits until the job has ended for good and returns what `show` then tells."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    self._wait_for(lambda: self.show(job)["JobState"] in ends, seconds)
    return self.show(job)

  def wait_for(self, path, text, seconds=240):
    """Waits until a file has the text."""
    path = pathlib.Path(path)
    self._wait_for(lambda: path.exists() and text in path.read_text(errors="replace"), seconds)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  if _MISSING:
    pytest.skip(f"no Slurm is installed here: {', '.join(_MISSING)} missing")
  if os.geteuid():
    pytest.skip("starting a Slurm needs root")
  if "SLURM_TESTS" not in os.environ:
    pytest.skip("takes minutes: set SLURM_TESTS=1 to run a Slurm of its own")
  with Slurm(tmp_path_factory.mktemp("slurm")) as running:
    yield running


def test_a_job_of_two_tasks_is_preempted_and_completes(slurm, tmp_path):
  log, run = tmp_path / "log", tmp_path / "run"
  # On one node: the two nodes are one machine, and TensorFlow listens on all addresses of it.
  options = ("--nodes=1", "--ntasks-per-node=2")
  job = slurm.submit(log, *SMALL, "--epochs=12", f"--work_dir={run}", options=options)
  slurm.wait_for(log, "epoch 3: ")
  slurm.preempt()
  ended, told = slurm.wait(job), log.read_text()
  assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), told
  result = json.loads((run / "result.json").read_text())
  assert result["steps"] == 12 * 4
  (step,) = set(re.findall(r"error: Stopped .* after step (\d+) of 48, saved", told))
  assert int(step) > 0 and f"Continuing from step {step} of 48" in told
  cluster = json.loads((run / "recipe.json").read_text())["cluster"]
  assert (cluster["tasks"], cluster["communication"]) == (2, "ring")
  assert set(re.findall(r"weights_sha256 (\w{64})", told)) == {result["weights_sha256"]}
  places = re.findall(r"Task ([01]) of 2 \(127\.0\.0\.[12]:\d+\) waits", told)
  assert sorted(places) == ["0", "0", "1", "1"]


@pytest.fixture
def submit_stand_in(slurm, tmp_path):
  """Submits train.sbatch with a shell script as its Python."""

  def submit(script, *options, **environ):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{script}")
    (tmp_path / "python").chmod(0o755)
    return slurm.submit(tmp_path / "log", options=options, first_on_path=tmp_path, **environ)

  return submit


def test_tasks_find_themselves_on_two_nodes(slurm, submit_stand_in, tmp_path):
  program = "import os; from tools.slurm import task; print(task.tf_config(os.environ))"
  job = submit_stand_in(f"exec '{sys.executable}' -c '{program}'", "--ntasks-per-node=2")
  told = (slurm.wait(job), (tmp_path / "log").read_text())[1]
  clusters = [read_cluster({"TF_CONFIG": line}) for line in told.splitlines()]
  assert sorted(cluster.task_index for cluster in clusters) == [0, 1, 2, 3]
  first = 10000 + 16 * int(job)
  expected = tuple(f"{node}:{first + local}" for node in _NODES for local in range(2))
  assert {cluster.tasks for cluster in clusters} == {expected}


_WAIT_FOR_SIGTERM = "trap 'exit 143' TERM; echo ready; for _ in {1..300}; do sleep 0.1; done"


def test_a_task_to_mend_ends_the_job_though_the_other_could_go_on(slurm, submit_stand_in):
  ended = slurm.wait(
    submit_stand_in(f"((SLURM_PROCID)) || {{ sleep 1; exit 1; }}; {_WAIT_FOR_SIGTERM}")
  )
  assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")


@pytest.mark.parametrize("end", ["exit 138", "kill -KILL $$"])
def test_a_lost_task_has_the_job_start_again(slurm, submit_stand_in, end):
  script = f"[[ $SLURM_RESTART_COUNT ]] && exit 0; ((SLURM_PROCID)) || {{ {end}; }}; sleep 30"
  ended = slurm.wait(submit_stand_in(script))
  assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_restarts_have_a_bound(slurm, submit_stand_in):
  ended = slurm.wait(submit_stand_in("exit 138", MAX_RESTARTS="1"))
  assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "138:0", "1")


def test_sigterm_to_the_tasks_has_the_job_start_again(slurm, submit_stand_in, tmp_path):
  job = submit_stand_in(f"[[ $SLURM_RESTART_COUNT ]] && exit 0; {_WAIT_FOR_SIGTERM}")
  slurm.wait_for(tmp_path / "log", "ready\nready\n")
  slurm.command("scancel", "--signal=TERM", job)
  ended = slurm.wait(job)
  assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_a_cancelled_job_stays_so(slurm, submit_stand_in, tmp_path):
  job = submit_stand_in(_WAIT_FOR_SIGTERM)
  slurm.wait_for(tmp_path / "log", "ready\nready\n")
  slurm.command("scancel", job)
  ended = slurm.wait(job)
  time.sleep(2)
  assert slurm.show(job)["JobState"] == ended["JobState"] == "CANCELLED"
  assert ended["Restarts"] == "0"
