"""Random input: it is read, or refused in one line."""

import copy
import dataclasses
import json
import math
import pathlib
import shutil
import tempfile

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

from tests.bad_input.checks import (
  SMALL,
  contents,
  recipe_of,
)
from tests.bad_input.stored_run import store_run, tiny
from tf_largebatch import command_line
from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError
from tf_largebatch.optim.optimizers import build_optimizer
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import resolution, work_directory
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.checkpoint import Checkpoints, Manifest
from tf_largebatch.training.metrics import read_metrics


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "stored"
  store_run(directory)
  return directory


@pytest.fixture(scope="module")
def variables():
  return tiny()


def one_line(call, *arguments):
  """Returns what the call returns, or None if it raises a UserError of one line."""
  try:
    return call(*arguments)
  except UserError as error:
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 2500
    hypothesis.event("refused")
    return None


def few(examples):
  return hypothesis.settings(
    max_examples=examples,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
  lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=9), each, max_size=3),
  max_leaves=5,
)


_ADDRESSES = st.lists(
  st.sampled_from(["a:1", "b.c-d_e:65535", "[::1]:2222", "10.0.0.1:80"])
  | st.from_regex(r"[a-z.:\[\]\n\0 ü]{0,5}:[0-9]{0,6}", fullmatch=True)
  | _JSON,
  max_size=4,
)


_CONFIGS = st.fixed_dictionaries(
  {},
  optional={
    "cluster": st.dictionaries(
      st.sampled_from(["chief", "worker", "worker", "ps", "", "\n"]), _ADDRESSES | _JSON, max_size=3
    )
    | _JSON,
    "task": st.fixed_dictionaries(
      {},
      optional={
        "type": st.sampled_from(["chief", "worker"]) | _JSON,
        "index": st.integers(-1, 4) | _JSON,
      },
    )
    | _JSON,
    "environment": _JSON,
  },
)


@st.composite
def mutated(draw, content: bytes):
  """The content with a few bytes replaced, removed or inserted."""
  for _ in range(draw(st.integers(1, 3))):
    first = draw(st.integers(0, len(content)))
    last = min(len(content), first + draw(st.sampled_from([0, 1, 2, 8, 10**6])))
    content = content[:first] + draw(st.binary(max_size=4)) + content[last:]
  return content


def texts(config):
  """The configuration as JSON, also with a few bytes changed."""
  text = json.dumps(config)
  return st.just(text) | mutated(text.encode()).map(
    lambda content: content.decode(errors="replace")
  )


@few(400)
@hypothesis.given(_CONFIGS.flatmap(texts) | st.text())
def test_any_tf_config_is_a_cluster_or_refused(text):
  cluster = one_line(read_cluster, {"TF_CONFIG": text})
  if cluster is not None:
    assert isinstance(cluster, Cluster) and 0 <= cluster.task_index < cluster.num_tasks
    assert len(set(cluster.tasks)) == cluster.num_tasks
    assert all(task.isascii() and task.isprintable() for task in cluster.tasks)


_LAUNCHERS_VARIABLES = (
  *("TF_LARGEBATCH_HOSTS", "TF_LARGEBATCH_PORT", "TF_LARGEBATCH_JOBSET", "TF_LARGEBATCH_NODES"),
  *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
  *("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SM_HOSTS", "SM_CURRENT_HOST"),
  "JOB_COMPLETION_INDEX",
)
_LAUNCHERS_VALUES = st.sampled_from(
  ["0", "1", "2", "-1", "a", "a,b", "a,a", "b", "::1,b", "a\nb", '["a", "b"]', '["a", 1]', "[]", ""]
) | st.text(max_size=8)


@few(400)
@hypothesis.given(st.dictionaries(st.sampled_from(_LAUNCHERS_VARIABLES), _LAUNCHERS_VALUES))
def test_any_launchers_variables_are_a_cluster_or_refused(environ):
  cluster = one_line(read_cluster, environ)
  if cluster is not None:
    assert 0 <= cluster.task_index < cluster.num_tasks and len(cluster.tasks) != 1
    assert len(set(cluster.tasks)) == len(cluster.tasks)


_NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 2**31, 2**63, -(10**20), 1e308])


_VALUES = (
  _NUMBERS.map(str)
  | st.lists(_NUMBERS, max_size=4).map(lambda numbers: ",".join(map(str, numbers)))
  | st.sampled_from(["", " ", "true", "none", "0x10", "1_0", "1e5", "٣", "linear", "float64"])
  | st.text(max_size=20)
)


def build_recipe(arguments):
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  command_line.parse_flags(["train", *arguments], values)
  recipe = command_line.recipe_from_flags(values)
  recipe = dataclasses.replace(recipe, workers=recipe.workers or 8)
  derived = recipe.derived(1_281_167, 1)
  assert math.isfinite(derived["peak_learning_rate"]) and derived["total_steps"] > 0
  build_optimizer(recipe, 1_281_167).learning_rate  # noqa: B018 - Computes the rate.
  again = Recipe(**recipe.to_dict() | {"workers": values.workers})
  assert command_line.recipe_from_flags(values) == again
  return recipe


@few(250)
@hypothesis.given(
  st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(Recipe)]), _VALUES, max_size=3
  )
)
def test_any_flags_are_a_recipe_or_refused(given):
  one_line(build_recipe, [f"--{name}={value}" for name, value in given.items()])


@few(60)
@hypothesis.given(data=st.data(), name=st.sampled_from(["recipe.json", "result.json"]))
def test_any_work_directory_is_a_run_or_refused(stored_run, data, name):
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    shutil.copytree(stored_run, directory, dirs_exist_ok=True)
    (directory / name).write_bytes(data.draw(mutated((stored_run / name).read_bytes())))
    before = contents(directory)
    recipe = resolution.resolve(recipe_of(*SMALL), 1, "")
    for workers in (None, 2):
      given = dataclasses.replace(recipe, workers=workers)
      one_line(work_directory.with_stored_workers, given, str(directory))
    result = one_line(work_directory.find_run, str(directory), recipe, {"name": "synthetic"})
    assert result is None or result["status"] == "complete"
    assert contents(directory) == before


@few(60)
@hypothesis.given(data=st.data(), name=st.sampled_from(["metrics.jsonl", "bad_examples.jsonl"]))
def test_any_list_of_records_is_read_or_refused(stored_run, data, name):
  bad = b'{"split": "train", "example": 7, "fault": "example 7: no JPEG"}\n' * 2
  content = (stored_run / "metrics.jsonl").read_bytes() if name == "metrics.jsonl" else bad
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    (directory / name).write_bytes(data.draw(mutated(content)))
    before = contents(directory)
    for record in read_metrics(str(directory)):
      assert record["step"] + 1 and record["epoch"] + 1 and record["error"] + 1
    one_line(BadExamples, str(directory), 0, 3)
    assert contents(directory) == before


@few(60)
@hypothesis.given(data=st.data(), kind=st.sampled_from(["json", "json", "npz"]))
def test_any_checkpoint_is_restored_or_skipped(stored_run, variables, data, kind):
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    shutil.copytree(stored_run / "checkpoints", directory, dirs_exist_ok=True)
    path = directory / f"step-0000000002.{kind}"
    content = data.draw(mutated(path.read_bytes()))
    same = content == path.read_bytes()
    path.write_bytes(content)
    before = contents(directory)
    manifest = Checkpoints(str(directory), *variables, saves=False).restore_newest()
    assert isinstance(manifest, Manifest) and (manifest.step == 1 or same or kind == "json")
    assert contents(directory) == before
