"""The package against `tools.conformance.reference`, on several clusters and for many recipes."""

import functools
import pickle

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tests.launching import launch
from tests.tools.conformance import conformance_task
from tf_largebatch.data.input_pipeline import example_ids
from tools.conformance import reference
from tools.conformance.comparison import reference_rates, reference_step, reference_steps
from tools.conformance.observation import observe
from tools.conformance.problem import make_examples, make_parameters, make_recipe

# All in one process, because the fixture that they share is slow.
pytestmark = pytest.mark.xdist_group("conformance")

# (tasks, replicas per task): 4, 2 or 1 workers per replica. `fit_tasks_test` has three tasks.
CLUSTERS = [(1, 1), (1, 2), (2, 2)]
# float32, whose BN uses another kernel, on the simplest and the most complex cluster.
RUNS = [(cluster, "float64") for cluster in CLUSTERS] + [
  (cluster, "float32") for cluster in ((1, 1), (2, 2))
]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
  """Maps (tasks, replicas) to what each task saw."""
  directory, found = tmp_path_factory.mktemp("clusters"), {}
  for tasks, replicas in CLUSTERS:
    dtypes = ",".join(dtype for cluster, dtype in RUNS if cluster == (tasks, replicas))
    finished = launch(
      tasks, "tests.tools.conformance.conformance_task", str(directory), str(replicas), dtypes
    )
    assert finished.returncode == 0, finished.stdout
    paths = [directory / f"{tasks}_{replicas}_{task}.pickle" for task in range(tasks)]
    found[tasks, replicas] = [pickle.loads(path.read_bytes()) for path in paths]
  return found


def norm(values):
  return np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in values))


@functools.cache
def reference_run(dtype):
  """Returns the reference's own run: its states, and each step's loss, error and gradient.

  Only the choice of each worker's examples is the package's; `verify` and other tests check that.
  """
  recipe = conformance_task.CASES[dtype]
  total = len(make_examples(recipe)[0])
  state = reference.initial_state(*make_parameters("small_residual"))
  states, batches = [state], []
  for step, rate in enumerate(reference_rates(recipe, conformance_task.STEPS)):
    ids = [example_ids(recipe, total, step, worker) for worker in range(recipe.workers)]
    batch, state = reference_step(state, recipe, "small_residual", np.array(ids), rate)
    states.append(state)
    batches.append(batch)
  return states, batches


@pytest.mark.parametrize("cluster, dtype", RUNS)
def test_a_run_is_the_references_on_every_cluster(observed, cluster, dtype):
  """36 steps from the same weights, each from the end of the previous one."""
  states, batches = reference_run(dtype)
  # Training amplifies float32's rounding errors, by 1.17 per step on CPUs with AVX-512, to 1.0e-5
  # after 36. In the next test, each step starts from the observed weights, so errors do not grow.
  limits = [1e-12 if dtype == "float64" else 2.0**-23 * 1.2**step for step in range(len(states))]
  seen = observed[cluster][0][dtype]
  for step, state in enumerate(states):
    expected = state.parameters | state.statistics
    difference = [seen.variables[step][name] - value for name, value in expected.items()]
    assert norm(difference) <= limits[step] * norm(expected.values()), step
  for name in ("loss", "error"):
    expected = np.array([getattr(batch, name) for batch in batches])
    difference = np.abs(seen.scalars[name] - expected)
    assert np.all(difference <= np.maximum(limits[1:], 1e-6 * (dtype == "float32")) * expected)
  # The weights have moved by more than a tenth of their norm, so the agreement is not trivial.
  first, last = states[0].parameters, states[-1].parameters
  assert norm([last[name] - first[name] for name in first]) > 0.1 * norm(first.values())


@pytest.mark.parametrize("cluster, dtype", RUNS)
def test_every_step_is_the_references(observed, cluster, dtype):
  """Each step from the observed weights, to the rounding of one step, and its scalars."""
  assert_steps(observed[cluster][0][dtype], conformance_task.CASES[dtype], "small_residual")


@pytest.mark.parametrize("cluster, dtype", RUNS)
def test_every_replica_of_every_task_holds_the_same_bytes(observed, cluster, dtype):
  found = [seen[dtype] for seen in observed[cluster]]
  assert [seen.spread for seen in found] == [0] * cluster[0]
  weights = {b"".join(x.tobytes() for x in seen.variables[-1].values()) for seen in found}
  assert len(found) == cluster[0] and len(weights) == 1
  for name in found[0].scalars:
    assert len({seen.scalars[name].tobytes() for seen in found}) == 1


@pytest.mark.parametrize("cluster, dtype", RUNS)
def test_every_cluster_sees_the_same_examples(observed, cluster, dtype):
  recipe = conformance_task.CASES[dtype]
  total = len(make_examples(recipe)[0])
  expected = [
    [example_ids(recipe, total, step, worker) for worker in range(4)] for step in range(36)
  ]
  for seen in observed[cluster]:
    np.testing.assert_array_equal(seen[dtype].ids, expected)
    for epoch in seen[dtype].ids.reshape(3, -1):
      assert len(set(epoch)) == len(epoch) == 240


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_optimizer_sums_over_the_replicas_that_call_it(observed, cluster):
  """Nesterov's first step: −η (1 + m) Σ g, with g = (r + 1) · (1, 10) of replica r (trap 7)."""
  total = sum(range(1, cluster[0] * cluster[1] + 1))
  for seen in observed[cluster]:
    expected = -0.5 * 1.9 * total * np.array([1, 10])
    np.testing.assert_allclose(seen["applied"], expected, rtol=1e-12)


def test_the_curvature_does_not_depend_on_the_cluster(observed):
  """Its values are those of an exact Hessian in tests/training/curvature_test.py."""
  expected = observed[1, 1][0]["curvature"]
  assert expected["largest_eigenvalue"] > expected["batch_sharpness"] > 0
  found = [seen["curvature"] for seen in observed[2, 2]]
  assert found[0] == found[1]
  for name in ("batch_sharpness", "largest_eigenvalue"):
    np.testing.assert_allclose(found[0][name], expected[name], rtol=1e-12)


def assert_steps(seen, recipe, network):
  """Compares each observed step with the reference's step from the same weights."""
  limit = 1e-12 if recipe.dtype == "float64" else 2e-6
  rates = reference_rates(recipe, len(seen.ids))
  np.testing.assert_allclose(seen.scalars["learning_rate"], rates, rtol=limit)
  factors = [1.0, *(rates[1:] / rates[:-1])] if recipe.momentum_correction else np.ones(len(rates))
  np.testing.assert_allclose(seen.scalars["momentum_correction_factor"], factors, rtol=limit)
  steps = reference_steps(seen, recipe, network, rates)
  for step, (before, batch, after) in enumerate(steps):
    for kind in ("parameters", "statistics"):
      expected = getattr(after, kind)
      measured = {name: seen.variables[step + 1][name] for name in expected}
      difference = norm([measured[name] - value for name, value in expected.items()])
      assert difference <= limit * norm(expected.values()), (step, kind)
    for name, value in {
      "loss": batch.loss,
      "error": batch.error,
      "gradient_norm": norm(batch.gradients.values()),
      "weight_norm": norm(before.parameters.values()),
    }.items():
      np.testing.assert_allclose(seen.scalars[name][step], value, rtol=10 * limit, err_msg=name)
    assert_noise(seen, step, recipe, batch, limit)
  assert len(seen.ids) >= 30


def assert_noise(seen, step, recipe, batch, limit):
  """Compares the estimates from the workers' gradients; both are differences of like numbers."""
  k, n = recipe.workers, recipe.per_worker_batch_size
  if k == 1:
    assert "gradient_variance" not in seen.scalars
    return
  mean, whole = np.mean(batch.squared_gradients), norm(batch.gradients.values()) ** 2
  variance = n * k / (k - 1) * (mean - whole)
  scale = n * k / (k - 1) * (mean + whole)
  measured = {name: seen.scalars[name][step] for name in ("gradient_variance", "squared_gradient")}
  assert abs(measured["gradient_variance"] - variance) <= 10 * limit * scale, step
  expected = whole - variance / (k * n)
  assert abs(measured["squared_gradient"] - expected) <= 10 * limit * (whole + mean), step


@given(
  workers=st.integers(1, 5),
  per_worker_batch_size=st.integers(2, 6),
  network=st.sampled_from(["plain", "small_residual"]),
  dtype=st.sampled_from(["float64", "float32"]),
  warmup=st.sampled_from(["gradual", "constant", "none"]),
  learning_rate_scaling=st.sampled_from(["linear", "sqrt", "none"]),
  reference_batch_size=st.integers(2, 16),
  warmup_epochs=st.floats(0.1, 2.4),
  decay_epochs=st.lists(st.floats(0.1, 2.9), unique=True, max_size=3).map(sorted).map(tuple),
  decay_factor=st.sampled_from([0.1, 0.5]),
  momentum=st.sampled_from([0.0, 0.5, 0.9]),
  nesterov=st.booleans(),
  momentum_correction=st.booleans(),
  weight_decay=st.sampled_from([0.0, 1e-4, 1e-1]),
  label_smoothing=st.sampled_from([0.0, 0.1]),
  batch_norm_momentum=st.sampled_from([0.9, 0.5]),
  seed=st.integers(0, 2**31 - 1),
)
# No shrinking: a case takes seconds, and every case is small.
@settings(max_examples=7, derandomize=True, database=None, phases=[Phase.generate])
def test_every_recipe_is_the_references(network, **changes):
  # With fewer images in a step, an epoch would have more than 12 steps.
  assume(changes["workers"] * changes["per_worker_batch_size"] >= 4)
  recipe = make_recipe(1, reference_learning_rate=0.02, **changes)
  strategy = tf.distribute.get_strategy()
  assert_steps(observe(strategy, recipe, network, 36), recipe, network)


def test_one_step_of_resnet20_is_the_references():
  """The package's own network with option A's shortcuts and γ = 1, in float64."""
  recipe = make_recipe(
    1,
    network="resnet20",
    dtype="float64",
    last_gamma=1.0,
    weight_decay=1e-4,
    warmup="none",
    reference_learning_rate=1.0,
  )
  seen = observe(tf.distribute.get_strategy(), recipe, "resnet20", 1)
  ((before, _, after),) = reference_steps(seen, recipe, "resnet20", reference_rates(recipe, 1))
  assert len(before.parameters) == 19 * 3 + 2
  for name, w in before.parameters.items():
    expected = w - after.parameters[name]
    assert norm([seen.updates(0, [name])[name] - expected]) <= 1e-10 * norm([expected]), name
