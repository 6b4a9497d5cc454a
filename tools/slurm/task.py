"""One task of a Slurm step: makes `TF_CONFIG` from Slurm's environment and becomes the trainer.

  srun --distribution=block python -m tools.slurm.task -- --flagfile=flags/… --work_dir=…

`train.sbatch`, beside this file, is a whole job. What follows `--` goes to the trainer,
which takes this process over: Slurm's signals reach it with nobody in between.

Each node's first task listens on a port that follows from the job and the step, its
next tasks on the ports after it, so that several jobs on one node stay apart. Ports are
10000 to 29999, below those that Linux gives to outgoing connections; `--port` names
another. The nodes' names must be host names, as is usual.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping

from absl import app, flags

from tf_largebatch.errors import UserError

_PORT = flags.DEFINE_integer(
  "port",
  None,
  "Port of each node's first task; the node's next tasks have the ports after it. Follows from the "
  "job and the step if not given.",
  lower_bound=1,
  upper_bound=65535,
)

_FIRST_PORT, _PORTS_OF_A_STEP, _STEPS = 10000, 16, 1250


def tf_config(environ: Mapping[str, str], port: int | None = None) -> str | None:
  """Returns `TF_CONFIG` for the task of a Slurm step that has this environment.

  Args:
    environ: what Slurm tells each task.
    port: of each node's first task; None for one that follows from the job and the step.

  Returns:
    JSON, or None for the only task of its step, which needs no `TF_CONFIG`.

  Raises:
    UserError: this is no task of a step, or not the one that block distribution
      puts at its rank, or `scontrol` does not name the nodes.
  """
  tasks_per_node = _tasks_per_node(_variable(environ, "SLURM_STEP_TASKS_PER_NODE"))
  rank, num_tasks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
  if sum(tasks_per_node) != num_tasks:
    raise UserError(
      f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} has {sum(tasks_per_node)} "
      f"tasks, SLURM_STEP_NUM_TASKS={num_tasks}: is this a step of a heterogeneous job? Use one "
      "component"
    )
  if num_tasks == 1:
    return None
  hosts = _hosts(_variable(environ, "SLURM_STEP_NODELIST"))
  if len(hosts) != len(tasks_per_node):
    raise UserError(
      f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']} names {len(hosts)} nodes, "
      f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} {len(tasks_per_node)}"
    )
  # Block distribution: the first node's tasks have the first ranks.
  places = [(node, local) for node, count in enumerate(tasks_per_node) for local in range(count)]
  here = (_number(environ, "SLURM_NODEID"), _number(environ, "SLURM_LOCALID"))
  if not 0 <= rank < num_tasks or places[rank] != here:
    raise UserError(
      f"task {rank} is number {here[1]} of node {here[0]}, which is not its place in block "
      "distribution: give srun --distribution=block"
    )
  if environ.get("SLURMD_NODENAME", hosts[here[0]]) != hosts[here[0]]:
    raise UserError(
      f"task {rank} runs on {environ['SLURMD_NODENAME']}, but its node in SLURM_STEP_NODELIST="
      f"{environ['SLURM_STEP_NODELIST']} is {hosts[here[0]]}"
    )
  if port is None:
    # Steps of one job may run side by side as well; 617 keeps them off the next jobs' ports.
    step = _number(environ, "SLURM_JOB_ID") + 617 * _number(environ, "SLURM_STEP_ID")
    port = _FIRST_PORT + _PORTS_OF_A_STEP * (step % _STEPS)
  addresses = [f"{hosts[node]}:{port + local}" for node, local in places]
  return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})


def _variable(environ: Mapping[str, str], name: str) -> str:
  if not environ.get(name):
    raise UserError(f"{name} is not set: this runs in a Slurm step; start it by srun")
  return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
  text = _variable(environ, name)
  if not re.fullmatch("[0-9]+", text, re.ASCII):
    raise UserError(f"{name}={text}: expected a number")
  return int(text)


def _tasks_per_node(text: str) -> list[int]:
  """Returns the number of each node's tasks: [2, 2, 2, 1] for "2(x3),1"."""
  counts = []
  for part in text.split(","):
    match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
    if not match:
      raise UserError(f'SLURM_STEP_TASKS_PER_NODE={text}: expected the form "2(x3),1"')
    counts += [int(match[1])] * int(match[2] or 1)
  return counts


def _hosts(nodes: str) -> list[str]:
  """Returns the names that `scontrol`, which knows the form best, finds in "node[01-03,7]"."""
  command = ["scontrol", "show", "hostnames", nodes]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError as error:
    raise UserError(
      f"cannot run scontrol ({error.strerror}): put Slurm's commands on PATH"
    ) from error
  if found.returncode or not found.stdout.split():
    told = " ".join(found.stderr.split()) or f"status {found.returncode}, no names"
    raise UserError(f"{' '.join(command)}: {told}")
  return found.stdout.split()


def main(argv: list[str]) -> int:
  try:
    config = tf_config(os.environ, _PORT.value)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  # One that came along from where the job was submitted would be of another run.
  os.environ.pop("TF_CONFIG", None)
  if config:
    os.environ["TF_CONFIG"] = config
  sys.stdout.flush()
  os.execv(sys.executable, [sys.executable, "-m", "tf_largebatch.train", *argv[1:]])


if __name__ == "__main__":
  app.run(main)
