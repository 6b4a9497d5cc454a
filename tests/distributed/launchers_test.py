"""Environment → cluster, for each launcher; Slurm's are in tests/tools/slurm_test.py."""

import pytest

from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError

_HOSTS = {"TF_LARGEBATCH_HOSTS": "a,b"}


def _mpirun(rank, size, local=None):
  """As Open MPI sets them."""
  ranks = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size)}
  return ranks | ({} if local is None else {"OMPI_COMM_WORLD_LOCAL_RANK": str(local)})


def _torchrun(rank, size, local):
  """As PyTorch's `torchrun` sets them, with further variables that do not count."""
  ranks = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)}
  return ranks | {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}


def _skypilot(rank, addresses):
  """As SkyPilot sets them on each node."""
  addresses = addresses.split()
  return {
    "SKYPILOT_NODE_RANK": str(rank),
    "SKYPILOT_NODE_IPS": "\n".join(addresses),
    "SKYPILOT_NUM_NODES": str(len(addresses)),
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
  }


def _sagemaker(current, hosts='["algo-1","algo-2"]'):
  """As SageMaker's training toolkit sets them."""
  return {"SM_HOSTS": hosts, "SM_CURRENT_HOST": current, "SM_NUM_GPUS": "8"}


def _jobset(index, nodes="2"):
  """As tools/kubernetes/ and Kubernetes set them."""
  return {
    "TF_LARGEBATCH_JOBSET": "run",
    "TF_LARGEBATCH_NODES": nodes,
    "JOB_COMPLETION_INDEX": str(index),
  }


_AB = ("a:2222", "b:2222")


@pytest.mark.parametrize(
  "environ, tasks, rank, launcher",
  [
    (_HOSTS | _mpirun(1, 2, 0), _AB, 1, "a list of hosts"),
    (_HOSTS | _mpirun(1, 2), _AB, 1, "a list of hosts"),
    # Two processes on each host.
    (_HOSTS | _mpirun(3, 4, 1), ("a:2222", "a:2223", "b:2222", "b:2223"), 3, "a list of hosts"),
    (
      {"TF_LARGEBATCH_HOSTS": " a, a ,b,"} | _torchrun(2, 3, 0),
      ("a:2222", "a:2223", "b:2222"),
      2,
      "a list of hosts",
    ),
    (
      {"TF_LARGEBATCH_HOSTS": "a,b", "TF_LARGEBATCH_PORT": "4000"} | _torchrun(0, 2, 0),
      ("a:4000", "b:4000"),
      0,
      "a list of hosts",
    ),
    (_skypilot(1, "10.0.0.1 10.0.0.2"), ("10.0.0.1:2222", "10.0.0.2:2222"), 1, "SkyPilot"),
    (_skypilot(0, "fd00::1 fd00::2"), ("[fd00::1]:2222", "[fd00::2]:2222"), 0, "SkyPilot"),
    (_sagemaker("algo-2"), ("algo-1:2222", "algo-2:2222"), 1, "SageMaker"),
    (_jobset(1), ("run-node-0-0.run:2222", "run-node-0-1.run:2222"), 1, "a JobSet"),
    # mpirun within SageMaker or SkyPilot: the innermost launcher knows its processes.
    (_sagemaker("algo-2") | _HOSTS | _mpirun(0, 2, 0), _AB, 0, "a list of hosts"),
  ],
)
def test_tasks_of_a_launcher(environ, tasks, rank, launcher):
  cluster = read_cluster(environ)
  assert cluster == Cluster(tasks, rank)
  assert cluster.launcher == launcher


@pytest.mark.parametrize(
  "environ",
  [
    {},
    {"JOB_COMPLETION_INDEX": "3"},  # Of an Indexed Job whose pods train alone.
    {"LOCAL_RANK": "0", "MASTER_ADDR": "a"},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # In the script, beside srun.
    _mpirun(0, 1, 0),
    _torchrun(0, 1, 0),
    {"TF_LARGEBATCH_HOSTS": "a"} | _mpirun(0, 1, 0),
    _skypilot(0, "10.0.0.1"),
    _sagemaker("algo-1", '["algo-1"]'),
    _jobset(0, "1"),
  ],
)
def test_a_task_that_is_alone(environ):
  assert read_cluster(environ) == Cluster()


def test_tf_config_comes_first():
  config = '{"cluster": {"worker": ["c:1", "d:2"]}, "task": {"type": "worker", "index": 1}}'
  cluster = read_cluster({"TF_CONFIG": config} | _HOSTS | _mpirun(0, 2))
  assert (cluster, cluster.launcher) == (Cluster(("c:1", "d:2"), 1), "TF_CONFIG")


@pytest.mark.parametrize(
  "environ, message",
  [
    (_HOSTS, "TF_LARGEBATCH_HOSTS is set, but not this task's rank; set OMPI_COMM_WORLD_RANK and"),
    (_mpirun(0, 2), "mpirun started 2 processes .* set TF_LARGEBATCH_HOSTS=host0,host1"),
    (_torchrun(0, 2, 0), "torchrun started 2 processes .* set TF_LARGEBATCH_HOSTS=host0,host1"),
    ({"WORLD_SIZE": "2"}, "torchrun are incomplete: WORLD_SIZE without RANK; set all of them"),
    (_HOSTS | _mpirun(0, 3), "names 2 hosts for OMPI_COMM_WORLD_SIZE=3 processes"),
    (_HOSTS | _mpirun(2, 2), "this is OMPI_COMM_WORLD_RANK=2"),
    (_HOSTS | _mpirun(0, 1), "names 2 hosts for OMPI_COMM_WORLD_SIZE=1"),
    (_HOSTS | _mpirun(1, 4, 0), "Process 1 is number 0 on its host .* --map-by slot"),
    (_HOSTS | _mpirun("x", 2), "OMPI_COMM_WORLD_RANK=x is refused; .* from 0 on"),
    (_HOSTS | _mpirun(0, 0), "OMPI_COMM_WORLD_SIZE=0 is refused; .* from 1 on"),
    ({"TF_LARGEBATCH_PORT": "http"} | _HOSTS | _mpirun(0, 2), "TF_LARGEBATCH_PORT=http is refused"),
    ({"TF_LARGEBATCH_PORT": "65535"} | _HOSTS | _mpirun(0, 4), "names the task 'a:65536'"),
    ({"TF_LARGEBATCH_HOSTS": "a_b!,c"} | _mpirun(0, 2), "names the task 'a_b!:2222'"),
    ({"SKYPILOT_NODE_RANK": "0"}, "SkyPilot are incomplete: SKYPILOT_NODE_RANK without SKY"),
    (_skypilot(2, "a b"), "SKYPILOT_NODE_RANK=2 is the rank of a task, but there are 2"),
    (_skypilot(0, "a a"), "must name each host once"),
    ({"SM_HOSTS": '["a"]'}, "SageMaker are incomplete: SM_HOSTS without SM_CURRENT_HOST"),
    (_sagemaker("algo-3"), "must be a JSON list of hosts that holds SM_CURRENT_HOST=algo-3"),
    (_sagemaker("algo-1", "algo-1"), "must be a JSON list of hosts"),
    (_sagemaker("algo-1", '["algo-1", 2]'), "must name each host once"),
    ({"TF_LARGEBATCH_JOBSET": "run"}, "a JobSet are incomplete: TF_LARGEBATCH_JOBSET without"),
    (_jobset(2), "JOB_COMPLETION_INDEX=2 is the rank of a task, but there are 2 tasks"),
  ],
)
def test_what_does_not_fit_is_refused_in_one_line(environ, message):
  with pytest.raises(UserError, match=message) as error:
    read_cluster(environ)
  assert "\n" not in str(error.value)
