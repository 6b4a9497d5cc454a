"""Which tasks train together, from the variables that the launcher of a task sets.

`find_tasks` asks the launchers in this order, the innermost first, and takes the first that says
anything:

  list of hosts  TF_LARGEBATCH_HOSTS=host0,host1,…, with the rank from mpirun or torchrun
                 (OMPI_COMM_WORLD_RANK and _SIZE; RANK and WORLD_SIZE)
  Slurm          SLURM_STEP_NUM_TASKS and others, which srun sets
  SkyPilot       SKYPILOT_NODE_IPS, one address a line, and SKYPILOT_NODE_RANK
  SageMaker      SM_HOSTS, a JSON list, and SM_CURRENT_HOST
  JobSet         TF_LARGEBATCH_JOBSET and TF_LARGEBATCH_NODES, which a manifest of Kubernetes sets,
                 and JOB_COMPLETION_INDEX, which Kubernetes sets

Except under Slurm, which has its own ports, a host's first task listens on TF_LARGEBATCH_PORT
(2222), and its other tasks on the ports after it. A launcher that started several processes but
does not say where they are is refused: each of them would train alone.

Sources: Open MPI 5.0 (docs, 11.1), PyTorch (torch.distributed.run), Slurm's srun(1), SkyPilot
(docs, "Distributed Multi-Node Jobs"), SageMaker Training Toolkit (ENVIRONMENT_VARIABLES.md),
Kubernetes JobSet (docs, "DNS hostnames").
"""

import collections
import json
from collections.abc import Callable, Mapping

from tf_largebatch.distributed import slurm
from tf_largebatch.errors import UserError

_HOSTS, _PORT = "TF_LARGEBATCH_HOSTS", "TF_LARGEBATCH_PORT"
_JOBSET, _NODES = "TF_LARGEBATCH_JOBSET", "TF_LARGEBATCH_NODES"
_INDEX = "JOB_COMPLETION_INDEX"
_USUAL_PORT = 2222  # As in Kubeflow's TFJob.
# (launcher, rank, number of processes, rank among those on the host)
_RANKS = (
  ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
  ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)


def find_tasks(environ: Mapping[str, str]) -> tuple[str, list[str], int] | None:
  """Returns the launcher, `host:port` of every task in rank order, and the rank of this one.

  Returns:
    No addresses for a task that is alone; None if no launcher has set anything.

  Raises:
    UserError: a launcher's variables are incomplete, or do not fit together.
  """
  for name, find in _LAUNCHERS.items():
    found = find(environ)
    if found is not None:
      addresses, rank = found
      return name, addresses if len(addresses) > 1 else [], rank
  return None


def _from_hosts(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
  hosts = [host.strip() for host in environ.get(_HOSTS, "").split(",") if host.strip()]
  started = next((each for each in _RANKS if _complete(environ, *each[:3])), None)
  if started is None:
    if hosts:
      ranks = " or ".join(f"{rank} and {size}" for _, rank, size, _ in _RANKS)
      raise UserError(f"{_HOSTS} is set, but not this task's rank; set {ranks} too, or unset it.")
    return None
  launcher, rank_name, size_name, local_name = started
  rank, size = _number(environ, rank_name, 0), _number(environ, size_name, 1)
  if not hosts:
    if size == 1:
      return [], 0
    raise UserError(
      f"{launcher} started {size} processes ({size_name}={size}), but nothing says where they are; "
      f"set {_HOSTS}=host0,host1,… in rank order, the same for all, or start one process."
    )
  if size % len(hosts) or rank >= size:
    raise UserError(
      f"{_HOSTS} names {len(hosts)} hosts for {size_name}={size} processes, and this is "
      f"{rank_name}={rank}; the hosts must divide the processes, and ranks are below their number."
    )
  each = [host for host in hosts for _ in range(size // len(hosts))]
  addresses, places = _addresses(each, environ)
  local = _number(environ, local_name, 0) if local_name in environ else places[rank]
  if local != places[rank]:
    raise UserError(
      f"Process {rank} is number {local} on its host ({local_name}), but number {places[rank]} by "
      f"{_HOSTS}; give ranks by host (mpirun --map-by slot), or name a host for each process."
    )
  return addresses, rank


def _from_slurm(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
  if not environ.get("SLURM_STEP_NUM_TASKS"):
    return None  # Not in a step: for example in the job's script, beside srun.
  return slurm.find_tasks(environ, _port(environ) if _PORT in environ else None)


def _from_skypilot(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
  names = ("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK")
  if not _complete(environ, "SkyPilot", *names):
    return None
  hosts = environ[names[0]].split()
  return _one_per_host(hosts, _number(environ, names[1], 0), names, environ)


def _from_sagemaker(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
  names = ("SM_HOSTS", "SM_CURRENT_HOST")
  if not _complete(environ, "SageMaker", *names):
    return None
  try:
    hosts = json.loads(environ[names[0]])
  except ValueError:
    hosts = None
  current = environ[names[1]]
  if not isinstance(hosts, list) or current not in hosts:
    raise UserError(
      f"SM_HOSTS={environ[names[0]]} must be a JSON list of hosts that holds "
      f"SM_CURRENT_HOST={current}."
    )
  return _one_per_host(hosts, hosts.index(current), names, environ)


def _from_jobset(environ: Mapping[str, str]) -> tuple[list[str], int] | None:
  if not (environ.get(_JOBSET) or environ.get(_NODES)):
    return None  # Every pod of an Indexed Job has an index, also of jobs that train alone.
  names = (_JOBSET, _NODES, _INDEX)
  _complete(environ, "a JobSet", *names)
  jobset, nodes = environ[_JOBSET], _number(environ, _NODES, 1)
  # <jobset>-<replicated job>-<index of the job>-<index of the pod>.<subdomain>, the JobSet's name.
  hosts = [f"{jobset}-node-0-{index}.{jobset}" for index in range(nodes)]
  return _one_per_host(hosts, _number(environ, _INDEX, 0), names, environ)


_LAUNCHERS: dict[str, Callable[[Mapping[str, str]], tuple[list[str], int] | None]] = {
  "a list of hosts": _from_hosts,
  "Slurm": _from_slurm,
  "SkyPilot": _from_skypilot,
  "SageMaker": _from_sagemaker,
  "a JobSet": _from_jobset,
}


def _complete(environ: Mapping[str, str], launcher: str, *names: str) -> bool:
  """Whether all variables are set; refuses a part of them."""
  missing = [name for name in names if not environ.get(name)]
  if missing and len(missing) < len(names):
    there = [name for name in names if name not in missing]
    raise UserError(
      f"The variables of {launcher} are incomplete: {', '.join(there)} without "
      f"{', '.join(missing)}; set all of them, or none to train alone."
    )
  return not missing


def _one_per_host(
  hosts: list[str], rank: int, names: tuple[str, ...], environ: Mapping[str, str]
) -> tuple[list[str], int]:
  """A task on each host."""
  if not all(isinstance(host, str) for host in hosts) or len(set(hosts)) < len(hosts):
    raise UserError(f"{names[0]}={environ[names[0]]} must name each host once.")
  if rank >= len(hosts):
    raise UserError(
      f"{names[-1]}={environ[names[-1]]} is the rank of a task, but there are {len(hosts)} tasks "
      f"({names[0]}={environ[names[0]]}); ranks are below their number."
    )
  return _addresses(hosts, environ)[0], rank


def _addresses(hosts: list[str], environ: Mapping[str, str]) -> tuple[list[str], list[int]]:
  """The address of each task, and its number among the tasks of its host."""
  port, seen, places = _port(environ), collections.Counter(), []
  for host in hosts:
    places.append(seen[host])
    seen[host] += 1
  bracketed = [f"[{host}]" if ":" in host and host[0] != "[" else host for host in hosts]
  pairs = zip(bracketed, places, strict=True)
  return [f"{host}:{port + place}" for host, place in pairs], places


def _port(environ: Mapping[str, str]) -> int:
  return _number(environ, _PORT, 1) if _PORT in environ else _USUAL_PORT


def _number(environ: Mapping[str, str], name: str, least: int) -> int:
  text = environ[name]
  if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
    raise UserError(f"{name}={text} is refused; it must be a whole number from {least} on.")
  return int(text)
