"""A Slurm of two nodes on this machine, for tests of `tools/slurm/train.sbatch`.

Both nodes are this machine: 127.0.0.1 and 127.0.0.2. It needs root and Debian's packages slurmctld,
slurmd and munge.
"""

import contextlib
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

from tests.launching import ROOT
from tools.launch_local import free_addresses

_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [
  name
  for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
  if not shutil.which(name, path=_PATH)
]
NODES = ("127.0.0.1", "127.0.0.2")

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
  """Runs Slurm's daemons inside the context.

  Keeps all its files in `folder` and starts jobs in `checkout`. (cred_expire is also how long a
  requeued job must wait.)
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
    ports = [address.rpartition(":")[2] for address in free_addresses(3)]
    host = socket.gethostname().partition(".")[0]
    configuration = _CONFIGURATION.format(folder=self._folder, host=host, ports=ports)
    (self._folder / "slurm.conf").write_text(configuration)
    files = [f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munge_socket = self._folder / "munge.socket"
    try:
      # --force: the process and its files belong to root.
      self._start("munged", "--foreground", "--force", f"--socket={munge_socket}", *files)
      self._wait_for(munge_socket.exists, 30)
      self._start("slurmctld", "-D", "-i")
      for node in NODES:
        self._start("slurmd", "-D", "-N", node)
      self._wait_for(
        lambda: set(self._output("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, 60
      )
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_):
    self._output("scancel", "--user=root")
    with contextlib.suppress(TimeoutError):
      self._wait_for(lambda: not self._output("squeue", "--noheader"), 40)
    for daemon in reversed(self._daemons):
      daemon.terminate()
    for daemon in self._daemons:
      try:
        daemon.wait(15)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    # Processes of jobs may outlive slurmd; they are those that have this SLURM_CONF.
    for process in psutil.process_iter():
      with contextlib.suppress(psutil.Error):
        if process.environ().get("SLURM_CONF") == self._environ["SLURM_CONF"]:
          process.kill()

  def _start(self, *command):
    with open(self._folder / "daemons.log", "ab") as log:
      self._daemons.append(
        subprocess.Popen(command, env=self._environ, stdout=log, stderr=subprocess.STDOUT)
      )

  def _output(self, *command):
    finished = subprocess.run(
      command, env=self._environ, cwd=self._checkout, capture_output=True, text=True, timeout=60
    )
    return finished.stdout

  def _wait_for(self, condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
      if time.monotonic() > deadline:
        log = (self._folder / "daemons.log").read_text(errors="replace")
        raise TimeoutError(f"Waited {seconds} s\n{log[-3000:]}")
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
    """Runs a Slurm command, which must succeed."""
    subprocess.run(command, env=self._environ, check=True, timeout=60)

  def preempt(self):
    """Submits a short job of a higher priority that takes all nodes."""
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    self.command("sbatch", "--quiet", *options, "--wrap=sleep 1")

  def show(self, job):
    """Returns the fields of `scontrol show job`: JobState, Restarts, ExitCode, …"""
    output = self._output("scontrol", "show", "job", "--oneliner", job)
    return dict(re.findall(r"(\w+)=(\S*)", output))

  def wait(self, job, seconds=400):
    """Waits until the job ends for good and returns what `show` does."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    self._wait_for(lambda: self.show(job)["JobState"] in ends, seconds)
    return self.show(job)

  def wait_for(self, path, text, seconds=240):
    """Waits until a file contains the text."""
    path = pathlib.Path(path)
    self._wait_for(lambda: path.exists() and text in path.read_text(errors="replace"), seconds)
