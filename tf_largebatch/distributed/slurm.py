"""The tasks of a Slurm step, from the variables that `srun` sets.

The port of each node's first task is derived from the job and the step, so that jobs on one node do
not collide; the node's other tasks use the ports after it. Ports are 10000 to 29999, below Linux's
range for outgoing connections. Each node's name in Slurm must also be its host name, as is usual.
"""

import re
import subprocess
from collections.abc import Mapping

from tf_largebatch.errors import UserError

_FIRST_PORT, _PORTS_OF_A_STEP, _STEPS = 10000, 16, 1250


def find_tasks(environ: Mapping[str, str], port: int | None = None) -> tuple[list[str], int]:
  """Returns the addresses of the tasks of a Slurm step in rank order, and the rank of this one.

  Args:
    environ: the variables that Slurm sets for each task.
    port: of each node's first task; None to derive it from the job and the step.

  Returns:
    `([], 0)` for the only task of its step.

  Raises:
    UserError: this is not a task of a Slurm step, its node is not the one that block
      distribution assigns to its rank, or `scontrol` does not return the nodes' names.
  """
  tasks_per_node = _tasks_per_node(_variable(environ, "SLURM_STEP_TASKS_PER_NODE"))
  rank, num_tasks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
  if sum(tasks_per_node) != num_tasks:
    raise UserError(
      f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} has {sum(tasks_per_node)} "
      f"tasks, but SLURM_STEP_NUM_TASKS={num_tasks}: if this is a step of a heterogeneous job, use "
      "one component"
    )
  if num_tasks == 1:
    return [], 0
  hosts = _hosts(_variable(environ, "SLURM_STEP_NODELIST"))
  if len(hosts) != len(tasks_per_node):
    raise UserError(
      f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']} names {len(hosts)} nodes, but "
      f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} has {len(tasks_per_node)}"
    )
  # Block distribution: the first node's tasks have the first ranks.
  places = [(node, local) for node, count in enumerate(tasks_per_node) for local in range(count)]
  here = (_number(environ, "SLURM_NODEID"), _number(environ, "SLURM_LOCALID"))
  if not 0 <= rank < num_tasks or places[rank] != here:
    raise UserError(
      f"task {rank} is number {here[1]} of node {here[0]}, which is not its place in block "
      "distribution: use srun --distribution=block"
    )
  if environ.get("SLURMD_NODENAME", hosts[here[0]]) != hosts[here[0]]:
    raise UserError(
      f"task {rank} runs on {environ['SLURMD_NODENAME']}, but its node in SLURM_STEP_NODELIST="
      f"{environ['SLURM_STEP_NODELIST']} is {hosts[here[0]]}"
    )
  if port is None:
    # Steps of one job may run at the same time; 617 separates them from the next jobs' ports.
    step = _number(environ, "SLURM_JOB_ID") + 617 * _number(environ, "SLURM_STEP_ID")
    port = _FIRST_PORT + _PORTS_OF_A_STEP * (step % _STEPS)
  return [f"{hosts[node]}:{port + local}" for node, local in places], rank


def _variable(environ: Mapping[str, str], name: str) -> str:
  if not environ.get(name):
    raise UserError(f"{name} is not set, as it is in a Slurm step; start the tasks with srun")
  return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
  text = _variable(environ, name)
  if not re.fullmatch("[0-9]+", text, re.ASCII):
    raise UserError(f"{name}={text}: expected a number")
  return int(text)


def _tasks_per_node(text: str) -> list[int]:
  """Returns the number of tasks on each node: [2, 2, 2, 1] for "2(x3),1"."""
  counts = []
  for part in text.split(","):
    match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
    if not match:
      raise UserError(f'SLURM_STEP_TASKS_PER_NODE={text}: expected the form "2(x3),1"')
    counts += [int(match[1])] * int(match[2] or 1)
  return counts


def _hosts(nodes: str) -> list[str]:
  """Returns the names that `scontrol` expands "node[01-03,7]" to."""
  command = ["scontrol", "show", "hostnames", nodes]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError as error:
    raise UserError(
      f"cannot run scontrol ({error.strerror}): add Slurm's commands to PATH"
    ) from error
  if found.returncode or not found.stdout.split():
    reason = " ".join(found.stderr.split()) or f"status {found.returncode}, no names"
    raise UserError(f"{' '.join(command)}: {reason}")
  return found.stdout.split()
