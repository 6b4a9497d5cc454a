"""The step against the paper's sums, for every option that decides how it is computed."""

import functools
import itertools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.launching import ROOT
from tests.training.small_steps import make_batches, make_model, make_recipe
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.options import RunOptions
from tf_largebatch.training import step

# Estimates from the spread of the passes, so they differ where the passes do.
_NOISE = {"gradient_variance", "squared_gradient"}


def _steps(recipe, options, dtype):
  """The weights (float64) and scalars after three steps."""
  keras.config.set_floatx("float64" if dtype == "float64" else "float32")  # The rate's too.
  try:
    return _steps_in(recipe, options, dtype)
  finally:
    keras.config.set_floatx("float32")


def _steps_in(recipe, options, dtype):
  model = make_model(recipe.per_worker_batch_size, dtype)
  optimizer = MomentumCorrectedSGD(0.2, weight_decay=0.1, jit_compile=step.uses_xla(options))
  optimizer.build(model.trainable_variables)
  loss_scale = LossScale() if dtype == "mixed_float16" else None
  train_step = step.make_train_step(
    tf.distribute.get_strategy(), model, optimizer, recipe, options, loss_scale
  )
  scalars = [train_step(batch) for batch in make_batches(recipe)]
  values = [{name: float(value) for name, value in each.items()} for each in scalars]
  return [weight.numpy().astype(np.float64) for weight in model.weights], values


def _difference(some, others):
  """The largest difference, relative to each array's largest value."""
  return max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(some, others, strict=True))


@functools.cache
def _one_by_one():
  return _steps(make_recipe(dtype="float64"), RunOptions(workers_per_pass=1), "float64")


@pytest.mark.parametrize("workers_per_pass, jit", [(2, False), (2, True), (4, False)])
def test_workers_per_pass_do_not_change_the_steps(workers_per_pass, jit):
  options = RunOptions(workers_per_pass=workers_per_pass, jit_compile=jit)
  weights, scalars = _steps(make_recipe(dtype="float64"), options, "float64")
  assert _difference(weights, _one_by_one()[0]) < 1e-12
  for some, others in zip(scalars, _one_by_one()[1], strict=True):
    for name in (some.keys() | others.keys()) - _NOISE:
      np.testing.assert_allclose(some[name], others[name], rtol=1e-12)


def test_another_n_changes_the_steps():
  """Shows that the test above would fail if batch normalisation went over the whole pass."""
  recipe = make_recipe(workers=2, n=10, dtype="float64")
  weights, _ = _steps(recipe, RunOptions(workers_per_pass=1), "float64")
  images = recipe.global_batch_size
  assert images == make_recipe().global_batch_size
  assert _difference(weights, _one_by_one()[0]) > 1e-3


@pytest.mark.parametrize("workers_per_pass", [1, 2])
def test_float16_with_its_loss_scale_is_near_float32(workers_per_pass):
  options = RunOptions(workers_per_pass=workers_per_pass)
  half, scalars = _steps(make_recipe(), options, "mixed_float16")
  single, _ = _steps(make_recipe(), options, "float32")
  start = [weight.numpy() for weight in make_model(5, "float32").weights]
  assert [each["loss_scale"] for each in scalars] == [2.0**15] * 3
  assert scalars[-1]["skipped_steps"] == 0
  moved = [[a - b for a, b in zip(some, start, strict=True)] for some in (half, single)]
  assert 0 < _difference(*moved) < 2e-2  # float16 has 11 bits.


def test_gradients_that_overflow_float16_skip_the_step():
  recipe = make_recipe()
  model = make_model(5, "mixed_float16")
  optimizer = MomentumCorrectedSGD(0.2, weight_decay=0.1)
  optimizer.build(model.trainable_variables)
  loss_scale = LossScale()
  loss_scale.scale.assign(2.0**24)
  train_step = step.make_train_step(
    tf.distribute.get_strategy(), model, optimizer, recipe, loss_scale=loss_scale
  )
  before = [value.numpy() for value in (*model.trainable_variables, *optimizer.momentums)]
  scales, taken = [], []
  for batch in itertools.islice(itertools.cycle(make_batches(recipe)), 24):
    scalars = train_step(batch)
    assert np.isfinite(float(scalars["loss"]))
    scales.append(float(scalars["loss_scale"]))
    now = [value.numpy() for value in (*model.trainable_variables, *optimizer.momentums)]
    taken.append(any(np.any(a != b) for a, b in zip(now, before, strict=True)))
    assert all(np.all(np.isfinite(value)) for value in now)
    before = now
    if taken[-1]:
      break
  skipped = len(taken) - 1
  assert skipped >= 1 and taken == [False] * skipped + [True]
  assert scales == [2.0 ** (24 - i) for i in range(len(taken))]  # Halved after each skipped step.
  assert int(loss_scale.skipped_steps.value) == skipped
  assert int(optimizer.iterations.value) == len(taken)  # The schedule advances anyway.


# Prints the weights after three steps on two replicas, which are two logical CPUs.
_TWO_REPLICAS = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.training import small_steps
from tf_largebatch.training import step
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.options import RunOptions

found = {}
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name, dtype, options in (
  ("plain", "float32", {}),
  ("packs", "float32", {"bytes_per_pack": 64}),
  ("bfloat16", "float32", {"allreduce_dtype": "bfloat16"}),
  ("jit", "float32", {"jit_compile": True}),
  ("float16", "mixed_float16", {}),
):
  options = RunOptions(workers_per_pass=2, **options)
  with strategy.scope():
    model = small_steps.make_model(5, dtype)
    optimizer = MomentumCorrectedSGD(0.2, weight_decay=0.1, jit_compile=step.uses_xla(options))
    optimizer.build(model.trainable_variables)
    loss_scale = LossScale() if dtype == "mixed_float16" else None
  recipe = small_steps.make_recipe()
  train_step = step.make_train_step(strategy, model, optimizer, recipe, options, loss_scale)
  for images, labels in small_steps.make_batches(recipe):
    parts = lambda x: strategy.experimental_distribute_values_from_function(
      lambda context: tf.split(x, 2)[context.replica_id_in_sync_group]
    )
    scalars = train_step((parts(images), parts(labels)))
  for weight in model.weights:
    copies = strategy.experimental_local_results(weight.value)
    assert (copies[0].numpy() == copies[1].numpy()).all(), name
  found[name] = [weight.numpy().tolist() for weight in model.weights]
  noise = [float(scalars[name]) for name in ("gradient_variance", "squared_gradient")]
  found[name].append(noise)
print(json.dumps(found))
"""


def test_two_replicas_with_each_option_of_the_all_reduce():
  process = subprocess.run(
    [sys.executable, "-c", _TWO_REPLICAS], cwd=ROOT, capture_output=True, text=True, timeout=240
  )
  assert process.returncode == 0, process.stderr
  found = json.loads(process.stdout.splitlines()[-1])
  noise = {name: found[name].pop() for name in found}
  found = {name: [np.array(weight) for weight in found[name]] for name in found}
  one, _ = _steps(make_recipe(), RunOptions(workers_per_pass=1), "float32")
  for name in ("plain", "packs", "jit"):
    assert _difference(found[name], one) < 3e-6, name
  # One replica that takes as many workers through the network at once has the same two passes.
  _, scalars = _steps(make_recipe(), RunOptions(workers_per_pass=2), "float32")
  expected = [scalars[-1]["gradient_variance"], scalars[-1]["squared_gradient"]]
  for name in ("plain", "packs", "jit"):
    np.testing.assert_allclose(noise[name], expected, rtol=1e-4, err_msg=name)
  start = [weight.numpy() for weight in make_model(5, "float32").weights]
  for name in ("bfloat16", "float16"):
    moved = [[a - b for a, b in zip(some, start, strict=True)] for some in (found[name], one)]
    assert 1e-5 < _difference(*moved) < 2e-2, name  # 8 and 11 bits.
