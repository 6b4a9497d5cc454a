"""The cluster that `TF_CONFIG` or a launcher describes, validated without importing TensorFlow.

A task is a process named in `TF_CONFIG`; its jobs "chief" and "worker" have nothing to do with the
paper's workers. TensorFlow meets most mistakes in `TF_CONFIG` by waiting for an hour, so they are
refused here with a one-line error.
"""

import collections
import dataclasses
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from tf_largebatch.distributed import launchers
from tf_largebatch.errors import UserError

# A host name or IPv4 address of labels, or an IPv6 address in brackets; a port.
_LABEL = r"[0-9A-Za-z_-]{1,63}"
_ADDRESS = re.compile(
  rf"(?:(?P<name>{_LABEL}(?:\.{_LABEL})*\.?)|\[(?P<ipv6>[0-9A-Fa-f:.]+)\]):(?P<port>[0-9]{{1,5}})"
)
_LONGEST_NAME = 253  # Of DNS.


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The tasks that train together, and which of them this process is.

  Attributes:
    tasks: `host:port` of every task in rank order, the chief first; () for a single task.
    task_index: this task's rank in `tasks`; 0 for a single task.
    launcher: that described the tasks, for messages.
  """

  tasks: tuple[str, ...] = ()
  task_index: int = 0
  launcher: str = dataclasses.field(default="TF_CONFIG", compare=False)

  @property
  def num_tasks(self) -> int:
    return max(1, len(self.tasks))

  @property
  def is_chief(self) -> bool:
    return self.task_index == 0


def read_cluster(environ: Mapping[str, str] = os.environ) -> Cluster:
  """Returns the cluster that `TF_CONFIG` describes, else a launcher's, else a single task.

  `launchers` lists the launchers and their variables. In `TF_CONFIG`, a cluster has a "chief" and
  any number of "worker" tasks, or "worker" tasks only; the first of those is then the chief, as in
  TensorFlow.

  Raises:
    UserError: `TF_CONFIG` is set but does not describe such a cluster, or a launcher's variables
      are incomplete or do not fit together.
  """
  if "TF_CONFIG" in environ:
    return _from_tf_config(environ["TF_CONFIG"])
  found = launchers.find_tasks(environ)
  if found is None:
    return Cluster()
  launcher, addresses, rank = found
  invalid = [address for address in addresses if not _is_address(address)]
  if invalid:
    raise UserError(
      f"{launcher} names the task {invalid[0]!r}, which is not a host name or IP address with a "
      "port in 1..65535; name another."
    )
  return Cluster(tuple(addresses), rank, launcher)


def _from_tf_config(text: str) -> Cluster:
  config = _parse(text)
  jobs = config["cluster"]
  if not jobs or not set(jobs) <= {"chief", "worker"}:
    raise _error("cluster with no or unknown jobs", jobs, 'a "worker" job, a "chief" job or both')
  for job, addresses in jobs.items():
    if not isinstance(addresses, list) or not addresses:
      raise _error(f'job "{job}" without a list of tasks', addresses, 'a list ["host:port", …]')
  if len(jobs.get("chief", [])) > 1:
    raise _error("more than one chief", jobs["chief"], 'one "chief", the others as "worker"')

  tasks = (*jobs.get("chief", []), *jobs.get("worker", []))
  for address in tasks:
    if not _is_address(address):
      expected = '"host:port" or "[IPv6]:port" with a valid host name and a port in 1..65535'
      raise _error("invalid task address", address, expected)
  repeated = [address for address, count in collections.Counter(tasks).items() if count > 1]
  if repeated:
    raise _error("several tasks share an address", repeated, "a different address for each task")

  job, index = config["task"].get("type"), config["task"].get("index")
  if not isinstance(job, str) or job not in jobs:
    raise _error("task type is not a job of the cluster", job, f"one of {sorted(jobs)}")
  # Not isinstance: JSON's true is an int to Python.
  if type(index) is not int or not 0 <= index < len(jobs[job]):
    raise _error(f'invalid task index for "{job}"', index, f"an integer in 0..{len(jobs[job]) - 1}")
  return Cluster(tasks, index + (len(jobs.get("chief", [])) if job == "worker" else 0))


def _is_address(address: Any) -> bool:
  match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
  if not match or not 1 <= int(match["port"]) <= 65535:
    return False
  if match["ipv6"] is None:
    return len(match["name"]) <= _LONGEST_NAME
  try:
    ipaddress.IPv6Address(match["ipv6"])
  except ValueError:
    return False
  return True


def _parse(text: str) -> dict[str, Any]:
  """Returns the JSON object in `TF_CONFIG`, whose "cluster" and "task" are objects.

  Raises:
    UserError: the text is not such an object.
  """
  try:
    config = json.loads(text)
  except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply.
    raise _error(f"not JSON ({error})", text, "a JSON object, or unset it for one task") from error
  if not isinstance(config, dict):
    raise _error("not a JSON object", config, 'an object with the keys "cluster" and "task"')
  if "sparseCluster" in config:
    raise _error(
      'a "sparseCluster", whose tasks come and go',
      config["sparseCluster"],
      'a fixed "cluster" (a TFJob without enableDynamicWorker)',
    )
  for key in ("cluster", "task"):
    if not isinstance(config.get(key), dict):
      raise _error(f'"{key}" is missing or not an object', config, f'a "{key}" object')
  return config


def _error(what: str, given: Any, expected: str) -> UserError:
  return UserError(f"TF_CONFIG: {what}: given {json.dumps(given)}, expected {expected}")
