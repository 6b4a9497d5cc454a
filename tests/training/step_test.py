"""The step against the paper's sums, whichever way it is computed (`RunOptions`)."""

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
from tf_largebatch.errors import UserError
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import step
from tf_largebatch.training import workers_per_pass as passes

_CLASSES, _SIDE = 3, 6


def _recipe(workers=4, n=5, dtype="float32"):
  return Recipe(
    dataset="synthetic", network="resnet8", workers=workers, per_worker_batch_size=n, dtype=dtype
  )


def _model(n, dtype):
  keras.utils.set_random_seed(0)
  variable_dtype = keras.dtype_policies.get(dtype).variable_dtype
  return keras.Sequential(
    [
      keras.Input((_SIDE, _SIDE, 2), dtype=variable_dtype),
      keras.layers.Rescaling(1 / 100.0, dtype=variable_dtype),
      keras.layers.Conv2D(4, 3, use_bias=False, dtype=dtype),
      PerWorkerBatchNormalization(n, dtype=dtype),
      keras.layers.ReLU(dtype=dtype),
      keras.layers.GlobalAveragePooling2D(dtype=variable_dtype),
      keras.layers.Dense(_CLASSES, dtype=variable_dtype),
    ]
  )


def _batches(recipe, count=3):
  rng = np.random.default_rng(0)
  shape = (recipe.workers, recipe.per_worker_batch_size)
  for _ in range(count):
    images = rng.integers(0, 256, (*shape, _SIDE, _SIDE, 2), dtype=np.uint8)
    yield tf.constant(images), tf.constant(rng.integers(0, _CLASSES, shape, dtype=np.int32))


def _steps(recipe, options, dtype):
  """The weights (float64) and scalars after three steps."""
  keras.config.set_floatx("float64" if dtype == "float64" else "float32")  # The optimizer's rate.
  try:
    return _steps_in(recipe, options, dtype)
  finally:
    keras.config.set_floatx("float32")


def _steps_in(recipe, options, dtype):
  model = _model(recipe.per_worker_batch_size, dtype)
  optimizer = MomentumCorrectedSGD(0.2, weight_decay=0.1, jit_compile=step.uses_xla(options))
  optimizer.build(model.trainable_variables)
  loss_scale = LossScale() if dtype == "mixed_float16" else None
  train_step = step.make_train_step(
    tf.distribute.get_strategy(), model, optimizer, recipe, options, loss_scale
  )
  scalars = [train_step(batch) for batch in _batches(recipe)]
  values = [{name: float(value) for name, value in each.items()} for each in scalars]
  return [weight.numpy().astype(np.float64) for weight in model.weights], values


def _difference(some, others):
  """The largest, relative to each array's largest value."""
  return max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(some, others, strict=True))


@functools.cache
def _one_by_one():
  return _steps(_recipe(dtype="float64"), RunOptions(workers_per_pass=1), "float64")


@pytest.mark.parametrize("workers_per_pass, jit", [(2, False), (2, True), (4, False)])
def test_any_number_of_workers_in_a_pass_takes_the_same_steps(workers_per_pass, jit):
  options = RunOptions(workers_per_pass=workers_per_pass, jit_compile=jit)
  weights, scalars = _steps(_recipe(dtype="float64"), options, "float64")
  assert _difference(weights, _one_by_one()[0]) < 1e-12
  for some, others in zip(scalars, _one_by_one()[1], strict=True):
    assert some.keys() == others.keys()
    np.testing.assert_allclose(list(some.values()), list(others.values()), rtol=1e-12)


def test_another_n_is_another_step():
  """What the test above would not see if batch normalisation went over the whole pass."""
  recipe = _recipe(workers=2, n=10, dtype="float64")
  weights, _ = _steps(recipe, RunOptions(workers_per_pass=1), "float64")
  images = recipe.global_batch_size
  assert images == _recipe().global_batch_size
  assert _difference(weights, _one_by_one()[0]) > 1e-3


@pytest.mark.parametrize("workers_per_pass", [1, 2])
def test_float16_with_its_loss_scale_is_near_float32(workers_per_pass):
  options = RunOptions(workers_per_pass=workers_per_pass)
  half, scalars = _steps(_recipe(), options, "mixed_float16")
  single, _ = _steps(_recipe(), options, "float32")
  start = [weight.numpy() for weight in _model(5, "float32").weights]
  assert [each["loss_scale"] for each in scalars] == [2.0**15] * 3
  assert scalars[-1]["skipped_steps"] == 0
  moved = [[a - b for a, b in zip(some, start, strict=True)] for some in (half, single)]
  assert 0 < _difference(*moved) < 2e-2  # float16 has 11 bits.


def test_gradients_that_float16_cannot_hold_skip_the_step():
  recipe = _recipe()
  model = _model(5, "mixed_float16")
  optimizer = MomentumCorrectedSGD(0.2, weight_decay=0.1)
  optimizer.build(model.trainable_variables)
  loss_scale = LossScale()
  loss_scale.scale.assign(2.0**24)
  train_step = step.make_train_step(
    tf.distribute.get_strategy(), model, optimizer, recipe, loss_scale=loss_scale
  )
  before = [value.numpy() for value in (*model.trainable_variables, *optimizer.momentums)]
  scales, taken = [], []
  for batch in itertools.islice(itertools.cycle(_batches(recipe)), 24):
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
  assert scales == [2.0 ** (24 - i) for i in range(len(taken))]  # Halved after each.
  assert int(loss_scale.skipped_steps.value) == skipped
  assert int(optimizer.iterations.value) == len(taken)  # The schedule went on.


@pytest.mark.parametrize(
  "seconds, workers, expected",
  [
    ({1: 1.0, 2: 1.5, 4: 2.9, 8: 6.0}, 8, 4),  # A worker takes 1, 0.75, 0.725 and 0.75.
    ({1: 1.0, 2: 1.97}, 8, 1),  # Too little faster.
    ({1: 1.0, 2: 1.0, 4: None}, 8, 2),  # No memory for four.
    ({1: 1.0, 2: 1.0}, 6, 2),  # Four do not divide six.
  ],
)
def test_on_a_gpu_workers_go_together_while_that_is_faster(monkeypatch, seconds, workers, expected):
  tried = []

  def make(model, recipe, options):
    tried.append(options.workers_per_pass)
    return lambda *_: (None, None, 0.0, 0.0)

  def measured(_):
    if seconds[tried[-1]] is None:
      raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
    return seconds[tried[-1]]

  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [kind])
  monkeypatch.setattr(passes, "make_replica_sums", make)
  monkeypatch.setattr(passes, "_seconds", measured)
  arguments = (_model(5, "float32"), _recipe(workers), RunOptions(), workers)
  assert passes.choose_workers_per_pass(*arguments) == expected
  assert tried == list(seconds)
  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [])
  assert passes.choose_workers_per_pass(*arguments) == 1


def test_bad_workers_per_pass_is_refused():
  with pytest.raises(
    UserError, match=r"workers_per_pass=3 .* the 8 workers of a replica; use 1, 2, 4, 8 or auto"
  ):
    passes.check_workers_per_pass(3, 8)
  passes.check_workers_per_pass(4, 8)


# Two replicas, which are two logical CPUs; prints the weights after three steps.
_TWO_REPLICAS = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.training import step_test
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
    model = step_test._model(5, dtype)
    optimizer = MomentumCorrectedSGD(0.2, weight_decay=0.1, jit_compile=step.uses_xla(options))
    optimizer.build(model.trainable_variables)
    loss_scale = LossScale() if dtype == "mixed_float16" else None
  recipe = step_test._recipe()
  train_step = step.make_train_step(strategy, model, optimizer, recipe, options, loss_scale)
  for images, labels in step_test._batches(recipe):
    parts = lambda x: strategy.experimental_distribute_values_from_function(
      lambda context: tf.split(x, 2)[context.replica_id_in_sync_group]
    )
    scalars = train_step((parts(images), parts(labels)))
  for weight in model.weights:
    copies = strategy.experimental_local_results(weight.value)
    assert (copies[0].numpy() == copies[1].numpy()).all(), name
  found[name] = [weight.numpy().tolist() for weight in model.weights]
print(json.dumps(found))
"""


def test_two_replicas_and_what_travels_between_them():
  process = subprocess.run(
    [sys.executable, "-c", _TWO_REPLICAS], cwd=ROOT, capture_output=True, text=True, timeout=240
  )
  assert process.returncode == 0, process.stderr
  found = json.loads(process.stdout.splitlines()[-1])
  found = {name: [np.array(weight) for weight in found[name]] for name in found}
  one, _ = _steps(_recipe(), RunOptions(workers_per_pass=1), "float32")
  for name in ("plain", "packs", "jit"):
    assert _difference(found[name], one) < 3e-6, name
  start = [weight.numpy() for weight in _model(5, "float32").weights]
  for name in ("bfloat16", "float16"):
    moved = [[a - b for a, b in zip(some, start, strict=True)] for some in (found[name], one)]
    assert 1e-5 < _difference(*moved) < 2e-2, name  # 8 and 11 bits.
