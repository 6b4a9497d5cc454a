"""`MomentumCorrectedSGD` against the paper's equations 9 and 10, written in NumPy float64."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.launching import run_program
from tf_largebatch.optim.schedule import LinearScalingSchedule
from tf_largebatch.optim.sgd import MomentumCorrectedSGD

STEPS = 200
# 10 steps per epoch, kn = 8192: 50 steps of warmup, decays at steps 90, 140 and 170.
SCHEDULE = {
  "steps_per_epoch": 10,
  "global_batch_size": 8192,
  "warmup_epochs": 5,
  "decay_epochs": (9, 14, 17),
}


def schedule_rates():
  """The rates of SCHEDULE: from 0.1 to 3.2 over 50 steps, then divided by 10 at each decay."""
  rates = []
  for t in range(STEPS):
    if t < 50:
      rates.append(0.1 + (3.2 - 0.1) * t / 50)
    else:
      rates.append(3.2 * 0.1 ** sum(t >= boundary for boundary in (90, 140, 170)))
  return rates


def equation_9(weights, gradients, rates, momentum, nesterov, decay):
  """u ← m·u + g, w ← w − η·u (Nesterov: w ← w − η·(m·u + g)), g with λ·w."""
  w, u = weights.copy(), np.zeros_like(weights)
  history = []
  for gradient, rate in zip(gradients, rates, strict=True):
    g = gradient + decay * w
    u = momentum * u + g
    w = w - rate * ((momentum * u + g) if nesterov else u)
    history.append(w)
  return np.array(history)


def equation_10(weights, gradients, rates, momentum, nesterov, decay):
  """v ← m·v + η·g, w ← w − v (Nesterov: w ← w − (m·v + η·g)), g with λ·w."""
  w, v = weights.copy(), np.zeros_like(weights)
  history = []
  for gradient, rate in zip(gradients, rates, strict=True):
    g = gradient + decay * w
    v = momentum * v + rate * g
    w = w - ((momentum * v + rate * g) if nesterov else v)
    history.append(w)
  return np.array(history)


@pytest.fixture(params=["float64", "float32"])
def floatx(request):
  before = keras.config.floatx()
  keras.config.set_floatx(request.param)
  yield request.param
  keras.config.set_floatx(before)


def problem(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(3, 4)), rng.normal(size=(STEPS, 3, 4))


def run(optimizer, weights, gradients, dtype, rates=None, name="kernel"):
  variable = keras.Variable(weights, dtype=dtype, name=name)

  @tf.function
  def step(gradient):
    optimizer.apply([gradient], [variable])

  optimizer.build([variable])
  history = []
  for i, gradient in enumerate(gradients):
    if rates is not None:
      optimizer.learning_rate = rates[i]
    step(tf.constant(gradient, dtype))
    history.append(variable.numpy())
  return np.array(history, np.float64)


def relative(actual, expected):
  return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_equation_9_with_correction(floatx, nesterov):
  weights, gradients = problem()
  optimizer = MomentumCorrectedSGD(
    LinearScalingSchedule(**SCHEDULE), nesterov=nesterov, weight_decay=1e-3
  )
  actual = run(optimizer, weights, gradients, floatx)
  expected = equation_9(weights, gradients, schedule_rates(), 0.9, nesterov, 1e-3)
  assert relative(actual, expected) < (1e-12 if floatx == "float64" else 2e-6)


def test_the_rate_is_rounded_once():
  """Whatever floatx is: through float32, 0.1 would become 0.10000000149."""
  weight = keras.Variable(0.0, dtype="float64")
  MomentumCorrectedSGD(LinearScalingSchedule(1, 256), nesterov=False).apply(
    [tf.constant(1.0, tf.float64)], [weight]
  )
  assert float(weight) == -0.1


def test_a_variable_that_its_gradient_overwrites():
  """Keras' FP8 layers keep scales in such variables, which have no momentum."""
  scale, weight = (keras.Variable(1.0, dtype="float64") for _ in range(2))
  scale.overwrite_with_gradient = True
  optimizer = MomentumCorrectedSGD(0.5, nesterov=False)
  optimizer.build([scale, weight])
  for _ in range(2):
    optimizer.apply([tf.constant(3.0, tf.float64)] * 2, [scale, weight])
  assert float(scale) == 3.0
  assert float(weight) == pytest.approx(-3.35, rel=1e-14)


def test_another_schedule_may_be_assigned():
  optimizer = MomentumCorrectedSGD(LinearScalingSchedule(1, 256))
  optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(0.25, 10)
  assert float(optimizer.learning_rate) == 0.25


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_equation_10_and_not_9_without_correction(floatx, nesterov):
  weights, gradients = problem()
  optimizer = MomentumCorrectedSGD(
    LinearScalingSchedule(**SCHEDULE),
    nesterov=nesterov,
    momentum_correction=False,
    weight_decay=1e-3,
  )
  actual = run(optimizer, weights, gradients, floatx)
  arguments = (weights, gradients, schedule_rates(), 0.9, nesterov, 1e-3)
  assert relative(actual, equation_10(*arguments)) < (1e-12 if floatx == "float64" else 2e-6)
  assert relative(actual, equation_9(*arguments)) > 1e-2


@pytest.mark.parametrize("nesterov", [False, True])
def test_corrects_for_assigned_rates_too(floatx, nesterov):
  weights, gradients = problem(1)
  rates = np.random.default_rng(2).uniform(0.01, 2, STEPS)
  actual = run(MomentumCorrectedSGD(0.5, nesterov=nesterov), weights, gradients, floatx, rates)
  expected = equation_9(weights, gradients, rates, 0.9, nesterov, 0)
  assert relative(actual, expected) < (1e-12 if floatx == "float64" else 5e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("zeros", [[0], [0, 1, 2], [5], [5, 6, 100]])
def test_a_rate_of_zero_keeps_the_momentum(zeros, nesterov):
  weights, gradients = problem(3)
  rates = np.linspace(0.1, 1, STEPS)
  rates[zeros] = 0
  keras.config.set_floatx("float64")
  try:
    actual = run(MomentumCorrectedSGD(0.5, nesterov=nesterov), weights, gradients, "float64", rates)
  finally:
    keras.config.set_floatx("float32")
  expected = equation_9(weights, gradients, rates, 0.9, nesterov, 0)
  assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("name", ["gamma", "beta", "bias", "moving_mean"])
def test_only_kernels_decay(name):
  weights, gradients = problem(4)
  decayed = run(MomentumCorrectedSGD(0.1, weight_decay=0.1), weights, gradients[:20], "float32")
  spared = run(
    MomentumCorrectedSGD(0.1, weight_decay=0.1), weights, gradients[:20], "float32", name=name
  )
  rates = [0.1] * 20
  assert relative(spared, equation_9(weights, gradients[:20], rates, 0.9, True, 0)) < 2e-6
  assert relative(decayed, equation_9(weights, gradients[:20], rates, 0.9, True, 0.1)) < 2e-6
  assert relative(decayed, spared) > 1e-2


def test_exclude_from_weight_decay():
  kernels = [keras.Variable(np.ones(3), name=name) for name in ("a_kernel", "b_kernel")]
  optimizer = MomentumCorrectedSGD(0.1, momentum=0, nesterov=False, weight_decay=0.5)
  optimizer.exclude_from_weight_decay(var_names=["b_kernel"])
  optimizer.apply([tf.zeros(3), tf.zeros(3)], kernels)
  np.testing.assert_allclose(kernels[0].numpy(), 0.95, rtol=1e-6)
  np.testing.assert_array_equal(kernels[1].numpy(), 1)


def test_weight_decay_can_be_excluded_again_after_loading(tmp_path):
  model = small_model(MomentumCorrectedSGD(0.1, weight_decay=0.5))
  model.optimizer.build(model.trainable_variables)
  model.save(tmp_path / "model.keras")
  model = keras.models.load_model(tmp_path / "model.keras")
  model.optimizer.exclude_from_weight_decay(var_names=["kernel"])
  before = [variable.numpy() for variable in model.trainable_variables]
  model.optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables])
  for variable, value in zip(model.trainable_variables, before, strict=True):
    np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_variable_without_gradient_keeps_its_momentum(compiled):
  """Eq. 9 for each variable: without a gradient u stays the same, even if the rate changes."""
  rates, gradient = [1.0, 0.1, 0.25, 0.5], 2.0
  has_gradient = [True, False, False, True]
  a, b = (keras.Variable(np.zeros(3), name="bias", dtype="float64") for _ in range(2))
  optimizer = MomentumCorrectedSGD(1.0, nesterov=False)
  optimizer.build([a, b])

  def step(takes_part):
    gradients = [tf.fill([3], tf.constant(gradient, tf.float64))] * (1 + takes_part)
    optimizer.apply(gradients, [a, b][: 1 + takes_part])

  if compiled:
    step = tf.function(step)
  u, w = 0.0, 0.0
  for rate, takes_part in zip(rates, has_gradient, strict=True):
    optimizer.learning_rate = rate
    step(takes_part)
    if takes_part:
      u = 0.9 * u + gradient
      w -= rate * u
  np.testing.assert_allclose(b.numpy(), w, rtol=1e-6)  # Keras' rates are float32.


def test_the_rate_has_the_precision_of_the_most_precise_variable():
  coarse = keras.Variable(np.zeros(3), name="bias", dtype="bfloat16")
  fine = keras.Variable(np.zeros(3), name="bias")
  optimizer = MomentumCorrectedSGD(0.1, nesterov=False)
  optimizer.apply([tf.ones(3, tf.bfloat16), tf.ones(3)], [coarse, fine])
  np.testing.assert_allclose(fine.numpy(), -0.1, rtol=1e-7)


def test_a_model_without_trainable_weights_is_saved_and_loaded(tmp_path):
  model = small_model(MomentumCorrectedSGD(0.1))
  model.trainable = False
  model.compile(MomentumCorrectedSGD(0.1), "mse")
  model.save(tmp_path / "model.keras")
  assert isinstance(
    keras.models.load_model(tmp_path / "model.keras").optimizer, MomentumCorrectedSGD
  )


# Fits a model on two replicas and prints each copy of its kernel and of the kernel's momentum.
MIRRORED = """
import json
import keras
import numpy as np
import tensorflow as tf
from tf_largebatch.optim.sgd import MomentumCorrectedSGD

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
  model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
  model.compile(MomentumCorrectedSGD(0.1, momentum=0.5, nesterov=False, weight_decay=0.5), "mse")
model.fit(np.zeros((8, 2)), np.zeros((8, 1)), batch_size=4, verbose=0)
variables = model.layers[0].kernel, model.optimizer.momentums[0]
print(json.dumps([[copy.numpy().tolist() for copy in v.value.values] for v in variables]))
"""


def test_all_replicas_decay_equally_in_fit():
  """Inputs of 0 leave only the decay: w ← w - 0.05 w, then also minus half of the last update."""
  kernels, momenta = run_program(MIRRORED)
  first = 0.1 * 0.5
  second = 0.5 * first + 0.1 * 0.5 * (1 - first)
  np.testing.assert_allclose(kernels, np.full((2, 2, 1), 1 - first - second), rtol=1e-6)
  np.testing.assert_allclose(momenta, np.full((2, 2, 1), second), rtol=1e-6)


def test_momentum_correction_factor_is_the_ratio_of_rates():
  variable = keras.Variable(np.ones(3), name="kernel")
  optimizer = MomentumCorrectedSGD(0.1)
  assert float(optimizer.momentum_correction_factor()) == 1
  optimizer.apply([tf.ones(3)], [variable])
  optimizer.learning_rate = 0.4
  np.testing.assert_allclose(float(optimizer.momentum_correction_factor()), 4, rtol=1e-6)
  ablation = MomentumCorrectedSGD(0.1, momentum_correction=False)
  ablation.apply([tf.ones(3)], [keras.Variable(np.ones(3), name="kernel")])
  ablation.learning_rate = 0.4
  assert float(ablation.momentum_correction_factor()) == 1


def small_model(optimizer):
  keras.utils.set_random_seed(0)
  model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(2)])
  model.compile(optimizer, "mse")
  return model


def test_fit_save_and_load_continue_the_same_run(tmp_path):
  """Saves during the warmup, where the next step would show if the buffers' rate were lost."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(64, 5)), rng.normal(size=(64, 2))
  fit = {"batch_size": 16, "shuffle": False, "verbose": 0}
  schedule = {"steps_per_epoch": 4, "global_batch_size": 512, "warmup_epochs": 3}
  whole = small_model(MomentumCorrectedSGD(LinearScalingSchedule(**schedule), weight_decay=1e-2))
  whole.fit(x, y, epochs=1, **fit)
  whole.save(tmp_path / "model.keras")
  whole.fit(x, y, epochs=1, **fit)
  resumed = keras.models.load_model(tmp_path / "model.keras")
  assert isinstance(resumed.optimizer, MomentumCorrectedSGD)
  resumed.fit(x, y, epochs=1, **fit)
  for a, b in zip(whole.weights, resumed.weights, strict=True):
    np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
  "learning_rate", [0.25, LinearScalingSchedule(steps_per_epoch=3, global_batch_size=512)]
)
def test_config_round_trip(learning_rate):
  optimizer = MomentumCorrectedSGD(
    learning_rate, 0.8, nesterov=False, momentum_correction=False, weight_decay=0.02, name="sgd"
  )
  clone = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
  assert clone.get_config() == optimizer.get_config()
  assert float(clone.learning_rate) == float(optimizer.learning_rate)


@pytest.mark.parametrize(
  "bad", [{"momentum": 1}, {"momentum": -0.1}, {"weight_decay": -1e-4}, {"weight_decay": math.nan}]
)
def test_rejects_bad_arguments(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    MomentumCorrectedSGD(**bad)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
  "arguments",
  [
    {"clipnorm": 0.25},
    {"clipvalue": 0.25},
    {"global_clipnorm": 0.5},
    {"use_ema": True, "ema_momentum": 0.875, "ema_overwrite_frequency": 3},
    {"loss_scale_factor": 8.0},
  ],
)
def test_arguments_of_keras_at_a_constant_rate(arguments, nesterov):
  # Of numbers that float32 holds exactly, because Keras rounds its own to it.
  rng = np.random.default_rng(0)
  first = [rng.normal(size=shape) for shape in ((3, 4), (5,))]
  steps = [[rng.normal(size=w.shape) for w in first] for _ in range(7)]
  results = []
  for optimizer in (
    MomentumCorrectedSGD(0.125, momentum=0.875, nesterov=nesterov, **arguments),
    keras.optimizers.SGD(0.125, momentum=0.875, nesterov=nesterov, **arguments),
  ):
    weights = [keras.Variable(w, dtype="float64") for w in first]
    for gradients in steps:
      optimizer.apply([tf.constant(g) for g in gradients], weights)
    results.append([w.numpy() for w in weights])
  unclipped = MomentumCorrectedSGD(0.125, momentum=0.875, nesterov=nesterov)
  weights = [keras.Variable(w, dtype="float64") for w in first]
  for gradients in steps:
    unclipped.apply([tf.constant(g) for g in gradients], weights)
  for ours, keras_own, plain in zip(*results, weights, strict=True):
    np.testing.assert_allclose(ours, keras_own, rtol=1e-12, atol=1e-12)
    assert np.abs(ours - plain.numpy()).max() > 1e-3  # The argument did something.
  config = MomentumCorrectedSGD(0.125, **arguments).get_config()
  assert {name: config[name] for name in arguments} == arguments
  assert MomentumCorrectedSGD.from_config(config).get_config() == config


def test_accumulation_over_calls_is_refused_in_words():
  with pytest.raises(ValueError, match=r"does not accumulate gradients.*use larger batches"):
    MomentumCorrectedSGD(0.1, gradient_accumulation_steps=4)
