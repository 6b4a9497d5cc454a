"""Checks the manifest in `tools/kubernetes/` against its schemas and the trainer's requirements.

The schemas are the OpenAPI models in Kubeflow's and Kubernetes' own Python packages.
"""

import copy
import json

import pytest
import yaml
from absl import flags
from kubeflow.training import models as kubeflow_models
from kubernetes.client import models as kubernetes_models
from kubernetes.utils import parse_quantity

from tests.launching import ROOT
from tf_largebatch import train  # noqa: F401 - Defines the flags.
from tf_largebatch.command_line import recipe_from_flags
from tf_largebatch.distributed.cluster import Cluster, read_cluster

_TEXT = (ROOT / "tools/kubernetes/train.yaml").read_text()
_KINDS = {
  ("v1", "PersistentVolumeClaim"): "V1PersistentVolumeClaim",
  ("kubeflow.org/v1", "TFJob"): "KubeflowOrgV1TFJob",
}
_MODELS = {**vars(kubernetes_models), **vars(kubeflow_models)}
_PLAIN = {"bool": bool, "float": float, "int": int, "str": str, "Quantity": str}


def check(kind, value, where):
  """Builds the model that `kind` names.

  Raises:
    ValueError: a field is missing, unknown or of another type. (The models themselves check only
      for missing fields.)
  """
  if kind == "object":
    return value
  container = list if kind.startswith("list[") else _PLAIN.get(kind, dict)
  if type(value) is not container:
    raise ValueError(f"{where}: {value!r} is not of type {kind}")
  if kind in _PLAIN:
    return value
  if kind.startswith("list["):
    return [check(kind[5:-1], item, f"{where}[{i}]") for i, item in enumerate(value)]
  if kind.startswith("dict("):
    of = kind.removeprefix("dict(str, ").removesuffix(")")
    return {key: check(of, item, f"{where}.{key}") for key, item in value.items()}
  model, arguments = _MODELS[kind], {}
  names = {field: name for name, field in model.attribute_map.items()}
  for field, item in value.items():
    if field not in names:
      raise ValueError(f"{where}: {field} is not a field of {kind}")
    name = names[field]
    arguments[name] = check(model.openapi_types[name], item, f"{where}.{field}")
  try:
    return model(**arguments)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def load(text):
  """Returns the documents of a manifest after checking them."""
  documents = list(yaml.safe_load_all(text))
  for document in documents:
    check(_KINDS[document["apiVersion"], document["kind"]], document, document["kind"])
  return documents


def tf_config(job, job_type, index):
  """Returns the operator's `TF_CONFIG` for a pod, None if it sets none.

  Follows genTFConfigJSONStr in the operator's source.
  """
  specs = job["spec"]["tfReplicaSpecs"]
  replicas = {kind.lower(): spec["replicas"] for kind, spec in specs.items()}
  if sum(replicas.values()) == 1:
    return None
  cluster = {
    kind: [f"{job['metadata']['name']}-{kind}-{i}.team.svc:2222" for i in range(count)]
    for kind, count in sorted(replicas.items())
  }
  task = {"type": job_type, "index": index}
  config = {"cluster": cluster, "task": task, "environment": "cloud"}
  return json.dumps(config, separators=(",", ":"))


@pytest.fixture
def documents():
  return load(_TEXT)


@pytest.fixture
def job(documents):
  (job,) = (document for document in documents if document["kind"] == "TFJob")
  return job


@pytest.fixture
def pod(job):
  return job["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"]


@pytest.fixture
def container(pod):
  (container,) = pod["containers"]
  return container


@pytest.mark.parametrize(
  "right, wrong, message",
  [
    ("cleanPodPolicy: R", "cleanPodsPolicy: R", "runPolicy: cleanPodsPolicy is not a field"),
    ("restartPolicy: E", "restart_policy: E", "Worker: restart_policy is not a field"),
    (
      "terminationGracePeriodSeconds: 9",
      "terminationGracePeriod: 9",
      "is not a field of V1PodSpec",
    ),
    ("sizeLimit", "sizelimit", r"volumes\[2\]\.emptyDir: sizelimit is not a field"),
    ("accessModes", "accessMode", "PersistentVolumeClaim.spec: accessMode is not a field"),
    ("replicas: 2", 'replicas: "2"', "Worker.replicas: '2' is not of type int"),
    ("replicas: 2", "replicas: true", "Worker.replicas: True is not of type int"),
    ("readOnly: true", 'readOnly: "true"', "readOnly: 'true' is not of type bool"),
    ('gpu: "8"', "gpu: 8", "limits.nvidia.com/gpu: 8 is not of type str"),
    (
      "[ReadWriteMany]",
      "ReadWriteMany",
      r"accessModes: 'ReadWriteMany' is not of type list\[str\]",
    ),
    ("  tfReplicaSpecs:", "status:\n  x:", "spec: .*tf_replica_specs.*must not be `None`"),
    ("containers:", "initContainers:", "template.spec: .*containers.*must not be `None`"),
    ("name: tensorflow", "image: other", r"containers\[0\]: .*name.*must not be `None`"),
    ("claimName: ", "readOnly: true #", "persistentVolumeClaim: .*claim_name.*must not be `None`"),
  ],
)
def test_the_schema_is_strict(right, wrong, message):
  load(_TEXT)
  text = _TEXT.replace(right, wrong, 1)
  assert text != _TEXT
  with pytest.raises(ValueError, match=message):
    load(text)


def test_the_operator_restarts_only_where_that_helps(job, pod, container):
  assert job["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "activeDeadlineSeconds": 604800}
  assert set(job["spec"]) == {"runPolicy", "tfReplicaSpecs"}
  assert set(job["spec"]["tfReplicaSpecs"]) == {"Worker"}
  assert job["spec"]["tfReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"
  assert "restartPolicy" not in pod  # The operator would overwrite it.
  # At most 30 s to save, and the rest of a step.
  assert pod["terminationGracePeriodSeconds"] >= 60
  # Without a shell, which would not forward SIGTERM.
  assert container["command"] == ["python", "-m", "tf_largebatch.train"]


def test_every_pod_reads_the_cluster_that_the_operator_sets(job, container):
  # The operator sets TF_CONFIG in the container of this name, with the port of this name.
  assert container["name"] == "tensorflow"
  assert container["ports"] == [{"name": "tfjob-port", "containerPort": 2222}]
  assert "env" not in container
  tasks = ("kn8192-worker-0.team.svc:2222", "kn8192-worker-1.team.svc:2222")
  for index in range(2):
    assert read_cluster({"TF_CONFIG": tf_config(job, "worker", index)}) == Cluster(tasks, index)
  job["spec"]["tfReplicaSpecs"]["Worker"]["replicas"] = 1
  assert tf_config(job, "worker", 0) is None
  assert read_cluster({}) == Cluster()


def test_the_flags_fit_the_pods(job, container, monkeypatch):
  monkeypatch.chdir(ROOT)
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  assert values(["train", *container["args"]]) == ["train"]
  pods = job["spec"]["tfReplicaSpecs"]["Worker"]["replicas"]
  replicas = pods * int(container["resources"]["limits"]["nvidia.com/gpu"])
  assert replicas == 16
  assert recipe_from_flags(values).workers % replicas == 0
  # Files that must outlive a pod are on the volumes.
  mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
  assert values.data_dir == "/data"
  assert mounts["/data"]["readOnly"]
  assert values.work_dir.startswith("/runs/")
  assert values.index_dir.startswith("/runs/")
  assert "readOnly" not in mounts["/runs"]


def test_the_volumes_are_claimed(documents, pod, container):
  claims = {
    document["metadata"]["name"]: document["spec"]
    for document in documents
    if document["kind"] == "PersistentVolumeClaim"
  }
  assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
  volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
  assert volumes.pop("shm") == {"emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}
  claimed = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values()}
  assert claimed == set(claims)
  mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert mounted == {"data": "/data", "runs": "/runs", "shm": "/dev/shm"}


def test_the_quantities_are_valid(documents, container):
  claims = [document["spec"] for document in documents if document["kind"] != "TFJob"]
  resources = [claim["resources"] for claim in claims] + [container["resources"]]
  found = [value for part in resources for values in part.values() for value in values.values()]
  assert [parse_quantity(value) for value in found] == [100 << 30, 500 << 30, 32, 256 << 30, 8]


def test_the_image_contains_what_exists():
  lines = (ROOT / "tools/kubernetes/Dockerfile").read_text().splitlines()
  copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
  assert sorted(copied) == ["flags", "requirements.txt", "tf_largebatch", "tools"]
  assert all((ROOT / path).exists() for path in copied)
