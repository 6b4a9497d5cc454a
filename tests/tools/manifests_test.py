"""Checks the manifests for Kubernetes and SkyPilot against schemas and the trainer's requirements.

The schemas of Kubernetes are the OpenAPI models in Kubeflow Trainer's own Python package, which has
JobSet's and Kubernetes' too. SkyPilot's own parser is used where it is installed.
"""

import copy
import re
import shlex
import signal

import pytest
import yaml
from absl import flags
from kubeflow_trainer_api import models

from tests.launching import ROOT
from tf_largebatch import train  # noqa: F401 - Defines the flags.
from tf_largebatch.command_line import recipe_from_flags
from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.errors import LOST_TASK

_TEXT = (ROOT / "tools/kubernetes/trainjob.yaml").read_text()
_MODELS = {
  ("v1", "PersistentVolumeClaim"): models.IoK8sApiCoreV1PersistentVolumeClaim,
  ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): models.TrainerV1alpha1TrainingRuntime,
  ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
}
# Kubernetes' Quantity, of the integers and suffixes that manifests use.
_QUANTITY = re.compile(r"[1-9][0-9]*(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")


def load(text):
  """Returns the documents of a manifest by kind, after checking them.

  Raises:
    ValueError: a field is missing, unknown or of another type.
  """
  documents = {}
  for document in yaml.safe_load_all(text):
    # The models check types, ignore unknown fields, fill missing ones, and print the result.
    understood = _MODELS[document["apiVersion"], document["kind"]].from_dict(document).to_dict()
    if understood != document:
      raise ValueError(f"{document['kind']}: a field is unknown or missing")
    documents.setdefault(document["kind"], []).append(document)
  return documents


@pytest.fixture
def documents():
  return load(_TEXT)


@pytest.fixture
def trainjob(documents):
  (job,) = documents["TrainJob"]
  return job


@pytest.fixture
def runtime(documents):
  (runtime,) = documents["TrainingRuntime"]
  return runtime


@pytest.fixture
def job(runtime):
  (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
  return replicated


@pytest.fixture
def pod(job):
  return job["template"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
  (container,) = pod["containers"]
  return container


@pytest.mark.parametrize(
  "right, wrong, message",
  [
    ("maxRestarts", "maxRestart", "TrainingRuntime: a field is unknown or missing"),
    ("backoffLimit", "backofLimit", "TrainingRuntime: a field is unknown or missing"),
    (
      "terminationGracePeriodSeconds",
      "terminationGrace",
      "TrainingRuntime: a field is unknown or missing",
    ),
    ("sizeLimit", "sizelimit", "TrainingRuntime: a field is unknown or missing"),
    ("accessModes", "accessMode", "PersistentVolumeClaim: a field is unknown or missing"),
    ("numNodes: 2", "nodes: 2", "TrainJob: a field is unknown or missing"),
    ("numNodes: 2", 'numNodes: "2"', r"numNodes\n.*valid integer"),
    ("numNodes: 2", "numNodes: true", r"numNodes\n.*valid integer"),
    ('value: "2"', "value: 2", r"value\n.*valid string"),
    ("values: [1]", 'values: ["1"]', r"values.0\n.*valid integer"),
    ("readOnly: true", 'readOnly: "true"', r"readOnly\n.*valid boolean"),
    ("[ReadWriteMany]", "ReadWriteMany", r"accessModes\n.*valid list"),
    ("action: FailJobSet", "# action", "TrainingRuntime: a field is unknown or missing"),
    (
      "      - name: node\n",
      "      - image: i\n",
      "TrainingRuntime: a field is unknown or missing",
    ),
    ("claimName: ", "readOnly: true #", "TrainingRuntime: a field is unknown or missing"),
  ],
)
def test_the_schema_is_strict(right, wrong, message):
  load(_TEXT)
  text = _TEXT.replace(" # Kubeflow requires this name.", "").replace(right, wrong, 1)
  assert text != _TEXT
  with pytest.raises(ValueError, match=message):
    load(text)


def test_failures_restart_the_run_only_where_that_helps(trainjob, runtime, job, pod, container):
  jobset = runtime["spec"]["template"]["spec"]
  # A status of 1 fails the job for good …
  assert job["template"]["spec"]["podFailurePolicy"]["rules"] == [
    {
      "action": "FailJob",
      "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1]},
    }
  ]
  assert [
    (rule["action"], rule["onJobFailureReasons"]) for rule in jobset["failurePolicy"]["rules"]
  ] == [("FailJobSet", ["PodFailurePolicy"])]
  # … and every other one restarts all pods, which by then have ended.
  assert job["template"]["spec"]["backoffLimit"] == 0
  assert pod["restartPolicy"] == "Never"
  assert jobset["failurePolicy"]["maxRestarts"] == 20
  assert jobset["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
  assert trainjob["spec"]["activeDeadlineSeconds"] == 7 * 24 * 3600
  # At most 30 s to save, and the rest of a step.
  assert pod["terminationGracePeriodSeconds"] >= 60
  # Without a shell, which would not forward SIGTERM.
  assert container["command"] == ["python", "-m", "tf_largebatch.train"]


def test_kubeflow_applies_the_trainjob_to_the_runtime(trainjob, runtime, job, container):
  reference = {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
  assert trainjob["spec"]["runtimeRef"] == reference
  # Kubeflow looks for this label and this container.
  label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
  assert job["template"]["metadata"]["labels"] == label
  assert container["name"] == "node"
  # It adds the TrainJob's command and arguments, so each of them stands in one place only.
  assert "args" not in container
  assert "command" not in trainjob["spec"]["trainer"]


def test_every_pod_finds_the_cluster(trainjob, job, container):
  nodes = trainjob["spec"]["trainer"]["numNodes"]
  (jobset,) = container["env"]
  field = "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
  assert jobset["valueFrom"] == {"fieldRef": {"fieldPath": field}}
  (count,) = trainjob["spec"]["trainer"]["env"]
  # Kubeflow names the JobSet as the TrainJob. JobSet names the pods' hosts, and by default its
  # headless service as itself.
  name = trainjob["metadata"]["name"]
  hosts = [f"{name}-{job['name']}-0-{index}.{name}" for index in range(nodes)]
  assert container["ports"] == [{"containerPort": 2222, "protocol": "TCP"}]
  for index in range(nodes):
    variables = {
      jobset["name"]: name,
      count["name"]: count["value"],
      "JOB_COMPLETION_INDEX": str(index),
    }
    cluster = read_cluster(variables)
    assert cluster.tasks == tuple(f"{host}:2222" for host in hosts)
    assert cluster.task_index == index
    assert cluster.launcher == "a JobSet"


def parse_flags(arguments, replicas, monkeypatch):
  """Returns the values of the trainer's flags, after checking that the replicas can share k."""
  monkeypatch.chdir(ROOT)
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  assert values(["train", *arguments]) == ["train"]
  assert replicas == 16
  assert recipe_from_flags(values).workers % replicas == 0
  return values


def test_the_flags_fit_the_pods(trainjob, container, monkeypatch):
  trainer = trainjob["spec"]["trainer"]
  replicas = trainer["numNodes"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
  values = parse_flags(trainer["args"], replicas, monkeypatch)
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
    for document in documents["PersistentVolumeClaim"]
  }
  assert all(claim["accessModes"] == ["ReadWriteMany"] for claim in claims.values())
  volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
  assert volumes.pop("shm") == {"emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}
  claimed = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values()}
  assert claimed == set(claims)
  mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert mounted == {"data": "/data", "runs": "/runs", "shm": "/dev/shm"}


def test_the_quantities_are_valid(documents, container):
  claims = [document["spec"] for document in documents["PersistentVolumeClaim"]]
  resources = [claim["resources"] for claim in claims] + [container["resources"]]
  found = [value for part in resources for values in part.values() for value in values.values()]
  assert found == ["100Gi", "500Gi", "32", "256Gi", "8"]
  assert all(_QUANTITY.fullmatch(value) for value in found)


def test_the_image_contains_what_exists():
  lines = (ROOT / "tools/kubernetes/Dockerfile").read_text().splitlines()
  copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
  assert sorted(copied) == ["flags", "requirements.txt", "tf_largebatch", "tools"]
  assert all((ROOT / path).exists() for path in copied)


@pytest.fixture
def skypilot():
  return yaml.safe_load((ROOT / "tools/skypilot/train.yaml").read_text())


def test_skypilots_flags_fit_the_nodes(skypilot, monkeypatch):
  words = shlex.split(skypilot["run"].replace("\\\n", " "))
  # In the shell's place, so that SIGTERM reaches the trainer.
  assert words[:4] == ["exec", "~/tf_largebatch/bin/python", "-m", "tf_largebatch.train"]
  accelerator, count = skypilot["resources"]["accelerators"].split(":")
  assert accelerator == "H100"
  values = parse_flags(words[4:], skypilot["num_nodes"] * int(count), monkeypatch)
  (volume,) = skypilot["volumes"]
  for path in (values.data_dir, values.work_dir, values.index_dir):
    assert path.startswith(f"{volume}/")


def test_skypilot_recovers_the_job_only_where_that_helps(skypilot):
  assert skypilot["resources"]["job_recovery"] == {
    "recover_on_exit_codes": [LOST_TASK, 128 + signal.SIGTERM]
  }


def test_skypilots_own_parser_reads_the_manifest(skypilot, monkeypatch):
  sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
  monkeypatch.chdir(ROOT)
  task = sky.Task.from_yaml("tools/skypilot/train.yaml")
  (resources,) = task.resources
  assert (task.name, task.num_nodes) == ("kn8192", 2)
  assert resources.accelerators == {"H100": 8}
  assert resources.job_recovery["recover_on_exit_codes"] == [138, 143]
  assert task.run == skypilot["run"]
