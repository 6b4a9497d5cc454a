"""`LinearScalingSchedule` against precomputed rates."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch import recipe
from tf_largebatch.errors import UserError
from tf_largebatch.optim import schedule as schedule_lib
from tf_largebatch.optim.schedule import LinearScalingSchedule

# Steps per epoch of ImageNet: 1281167 // 64, 1281167 // 256, 1281167 // 8192.
STEPS_PER_EPOCH = {64: 20018, 256: 5004, 8192: 156}

# {step: rate} before, at and after the decays at epochs 30, 60 and 80, by kn.
DECAYS = {
  64: {
    600539: 0.025, 600540: 0.0025, 600541: 0.0025,
    1201079: 0.0025, 1201080: 0.00025, 1201081: 0.00025,
    1601439: 0.00025, 1601440: 0.000025, 1601441: 0.000025, 1801619: 0.000025,
  },
  256: {
    150119: 0.1, 150120: 0.01, 150121: 0.01,
    300239: 0.01, 300240: 0.001, 300241: 0.001,
    400319: 0.001, 400320: 0.0001, 400321: 0.0001, 450359: 0.0001,
  },
  8192: {
    4679: 3.2, 4680: 0.32, 4681: 0.32,
    9359: 0.32, 9360: 0.032, 9361: 0.032,
    12479: 0.032, 12480: 0.0032, 12481: 0.0032, 14039: 0.0032,
  },
}  # fmt: skip

# {step: rate} at the start and the end of the 5 epochs of warmup, which kn up to 256 never have.
FLAT_64 = {0: 0.025, 1: 0.025, 100089: 0.025, 100090: 0.025, 100091: 0.025}
FLAT_256 = {0: 0.1, 1: 0.1, 25019: 0.1, 25020: 0.1, 25021: 0.1}
WARMUPS = {
  (64, "gradual"): FLAT_64,
  (64, "constant"): FLAT_64,
  (64, "none"): FLAT_64,
  (256, "gradual"): FLAT_256,
  (256, "constant"): FLAT_256,
  (256, "none"): FLAT_256,
  (8192, "gradual"): {
    0: 0.1, 1: 0.1 + 3.1 / 780, 390: 1.65, 779: 3.2 - 3.1 / 780, 780: 3.2, 781: 3.2
  },
  (8192, "constant"): {0: 0.1, 1: 0.1, 390: 0.1, 779: 0.1, 780: 3.2, 781: 3.2},
  (8192, "none"): {0: 3.2, 1: 3.2, 390: 3.2, 779: 3.2, 780: 3.2, 781: 3.2},
}  # fmt: skip


def assert_rates(schedule, expected):
  """Compares in float64 precision; a rounding to float32 on the way would be an error of 1e-8."""
  exact = getattr(schedule, "exact", schedule)
  actual = [float(exact(step)) for step in expected]
  np.testing.assert_allclose(actual, list(expected.values()), rtol=1e-13)


@pytest.mark.parametrize("kn, warmup", WARMUPS)
def test_imagenet_rates_around_every_boundary(kn, warmup):
  schedule = LinearScalingSchedule(STEPS_PER_EPOCH[kn], kn, warmup=warmup)
  assert_rates(schedule, WARMUPS[kn, warmup] | DECAYS[kn])


@pytest.mark.parametrize(
  "kn, reference, at_3_epochs",
  [
    (255, 256, 0.1 * 255 / 256 * 0.1),
    (256, 256, 0.01),
    (257, 256, 0.1 + (0.1 * 257 / 256 - 0.1) * 0.6),
    (256, 128, 0.16),
  ],
)
def test_only_minibatches_above_the_reference_warm_up(kn, reference, at_3_epochs):
  """At kn = 256 a warmup from 0.1 to 0.1 would show only as a delay of the decay at epoch 3."""
  schedule = LinearScalingSchedule(10, kn, reference_batch_size=reference, decay_epochs=(3,))
  assert_rates(schedule, {30: at_3_epochs})


SQRT_PEAK = 0.5656854249492381  # 0.1·√32 = 0.4·√2.


@pytest.mark.parametrize(
  "eta, scaling, expected",
  [
    (0.1, "linear", {0: 0.1, 390: 1.65, 780: 3.2, 4680: 0.32}),
    (0.05, "linear", {0: 0.05, 390: 0.825, 780: 1.6, 4680: 0.16}),
    (0.2, "linear", {0: 0.2, 390: 3.3, 780: 6.4, 4680: 0.64}),
    (0.1, "sqrt", {0: 0.1, 390: 0.33284271247461903, 780: SQRT_PEAK, 4680: SQRT_PEAK / 10}),
    (0.1, "none", {0: 0.1, 390: 0.1, 780: 0.1, 4680: 0.01}),
  ],
)  # fmt: skip
def test_scalings_of_table_2a(eta, scaling, expected):
  schedule = LinearScalingSchedule(156, 8192, reference_learning_rate=eta, scaling=scaling)
  assert_rates(schedule, expected)


@pytest.mark.parametrize(
  "epochs, expected",
  [
    # 24.6, 37.4 and 42.6 steps are rounded to 25, 37 and 43.
    (
      {"warmup_epochs": 2.46, "decay_epochs": (3.74, 4.26), "decay_factor": 0.5},
      {0: 0.1, 23: 0.192, 24: 0.196, 25: 0.2, 36: 0.2, 37: 0.1, 42: 0.1, 43: 0.05, 44: 0.05},
    ),
    # The boundaries at steps 30 and 50 both take effect at step 50, when the warmup ends.
    (
      {"warmup_epochs": 5, "decay_epochs": (3, 5, 8)},
      {29: 0.158, 30: 0.16, 31: 0.162, 49: 0.198, 50: 0.002, 51: 0.002, 79: 0.002, 80: 0.0002},
    ),
    # No warmup, no decay.
    ({"warmup_epochs": 0, "decay_epochs": ()}, {0: 0.2, 1: 0.2, 10**6: 0.2}),
  ],
)
def test_other_epochs(epochs, expected):
  assert_rates(LinearScalingSchedule(10, 512, **epochs), expected)


@pytest.mark.parametrize(
  "decay, rates",
  [
    # T_w = 20 of T = 100 steps; at p = 0, 1/4, 1/2 and 1, and beyond the end.
    ({"decay": "cosine"}, {20: 0.2, 40: 0.1 + 0.05 * 2**0.5, 60: 0.1, 100: 0, 120: 0}),
    ({"decay": "polynomial"}, {20: 0.2, 40: 0.2 * 9 / 16, 60: 0.05, 100: 0, 120: 0}),
    ({"decay": "polynomial", "decay_power": 1}, {20: 0.2, 40: 0.15, 60: 0.1, 100: 0, 120: 0}),
  ],
)
def test_smooth_decays_begin_at_the_peak_and_end_with_the_run(decay, rates):
  """The warmup is that of the paper, and the boundaries of the step decay have no effect."""
  schedule = LinearScalingSchedule(10, 512, warmup_epochs=2, decay_epochs=(3,), epochs=10, **decay)
  np.testing.assert_allclose(
    [float(schedule.exact(step)) for step in rates], list(rates.values()), rtol=1e-13, atol=1e-16
  )
  assert_rates(schedule, {0: 0.1, 1: 0.105, 19: 0.195})


def test_large_int64_steps_in_a_graph():
  """Steps above 2^24, where float32 merges neighbours, and above 2^31, where int32 overflows."""
  schedule = LinearScalingSchedule(20_000_001, 8192, warmup_epochs=1, decay_epochs=(200,))
  graph = tf.function(schedule.exact, input_signature=[tf.TensorSpec([], tf.int64)])
  expected = {20_000_000: 3.2 - 3.1 / 20_000_001, 20_000_001: 3.2, 4_000_000_199: 3.2}
  assert_rates(lambda step: graph(tf.constant(step, tf.int64)), expected | {4_000_000_200: 0.32})


def test_config_round_trip():
  config = {
    "steps_per_epoch": 7,
    "global_batch_size": 96,
    "reference_learning_rate": 0.3,
    "reference_batch_size": 32,
    "scaling": "sqrt",
    "warmup": "constant",
    "warmup_epochs": 1.5,
    "decay_epochs": (2.0, 4.0),
    "decay_factor": 0.25,
    "name": "rates",
    "decay": "steps",
    "decay_power": 3.0,
    "epochs": 5,
  }
  schedule = LinearScalingSchedule(**config)
  serialized = keras.optimizers.schedules.serialize(schedule)
  clone = keras.optimizers.schedules.deserialize(serialized)
  assert schedule.get_config() == clone.get_config() == config
  peak = 0.5196152422706632  # 0.3·√3
  assert_rates(clone, {9: 0.3, 10: peak, 13: peak, 14: peak / 4, 27: peak / 4, 28: peak / 16})


def test_keras_sgd_uses_these_rates_through_fit_save_and_load(tmp_path):
  """The gradient of |w + 100| is 1, so after t steps w is minus the sum of the first t rates.

  With 2 steps per epoch and kn = 512 the rates are 0.1, 0.125, 0.15 | 0.175, 0.2, 0.2, 0.02, 0.02.
  """
  model = keras.Sequential(
    [keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
  )
  schedule = LinearScalingSchedule(2, 512, warmup_epochs=2, decay_epochs=(3,))
  model.compile(keras.optimizers.SGD(schedule), "mae")
  model.fit(np.ones((3, 1)), np.full((3, 1), -100.0), batch_size=1, verbose=0)
  np.testing.assert_allclose(model.get_weights()[0], [[-0.375]], rtol=1e-6)
  model.save(tmp_path / "model.keras")
  loaded = keras.models.load_model(tmp_path / "model.keras")
  loaded.fit(np.ones((5, 1)), np.full((5, 1), -100.0), batch_size=1, verbose=0)
  np.testing.assert_allclose(loaded.get_weights()[0], [[-0.99]], rtol=1e-6)


@pytest.mark.parametrize("floatx", ["float32", "float64"])
def test_called_it_returns_floatx(floatx):
  keras.config.set_floatx(floatx)
  try:
    rate = LinearScalingSchedule(156, 8192)(1)
  finally:
    keras.config.set_floatx("float32")
  assert rate.dtype == floatx
  np.testing.assert_allclose(rate, 0.1 + 3.1 / 780, rtol=1e-15 if floatx == "float64" else 6e-8)


# Those that compute with the rate as it is (Muon) and those that cast it to each variable's dtype.
@pytest.mark.parametrize("optimizer", ["Muon", "Adam", "AdamW", "RMSprop", "Lion", "SGD"])
def test_optimizers_of_keras_take_it_as_its_own_schedules(optimizer):
  """Steps 0 to 2 have the rates 0.001, 0.001 and 0.0001 in both."""
  ours = LinearScalingSchedule(2, 256, reference_learning_rate=1e-3, decay_epochs=(1,))
  theirs = keras.optimizers.schedules.PiecewiseConstantDecay([1], [1e-3, 1e-4])
  weights = []
  for schedule in (ours, theirs):
    variable = keras.Variable(np.arange(12.0).reshape(3, 4), name="kernel", dtype="float32")
    made = getattr(keras.optimizers, optimizer)(schedule)
    for _ in range(3):
      made.apply([tf.ones((3, 4))], [variable])
    weights.append(variable.numpy())
  np.testing.assert_allclose(*weights, rtol=1e-6)
  assert np.all(weights[0] < np.arange(12.0).reshape(3, 4))


def test_every_warmup_of_the_recipe_has_a_rate():
  assert {*schedule_lib._WARMUP_RATES, "none"} == set(recipe.WARMUPS)


@pytest.mark.parametrize(
  "bad",
  [
    {"scaling": "cubic"},
    {"decay": "sudden"},
    {"warmup": "slow"},
    {"steps_per_epoch": 0},
    {"global_batch_size": 0},
    {"reference_batch_size": -1},
    {"reference_learning_rate": math.nan},
    {"warmup_epochs": -3},
    {"decay_factor": math.inf},
  ],
)
def test_rejects_bad_arguments(bad):
  ((name, value),) = bad.items()
  with pytest.raises(UserError, match=f"{name}.*{value}"):
    LinearScalingSchedule(**{"steps_per_epoch": 10, "global_batch_size": 512, **bad})


@pytest.mark.parametrize(
  "options, message",
  [
    ({"decay": "cosine"}, "needs epochs above the warmup's, not None"),
    ({"decay": "cosine", "epochs": 5}, "needs epochs above the warmup's, not 5"),
    ({"decay": "polynomial", "epochs": 9, "decay_power": -1.0}, "decay_power=-1.0"),
  ],
)
def test_a_smooth_decay_needs_an_end(options, message):
  with pytest.raises(UserError, match=message):
    LinearScalingSchedule(10, 512, **options)


def test_a_data_sets_cardinality_is_converted():
  dataset = tf.data.Dataset.range(1000).batch(8)
  schedule = LinearScalingSchedule(dataset.cardinality(), np.int64(512), reference_batch_size=256.0)
  config = schedule.get_config()
  counts = [config[n] for n in ("steps_per_epoch", "global_batch_size", "reference_batch_size")]
  assert counts == [125, 512, 256] and {type(count) for count in counts} == {int}


@pytest.mark.parametrize(
  "steps, expected",
  [
    (tf.data.Dataset.range(9).repeat().cardinality(), "steps_per_epoch=-1 is the cardinality"),
    (tf.data.UNKNOWN_CARDINALITY, "steps_per_epoch=-2 is the cardinality"),
    (1.5, "steps_per_epoch=1.5 is not a whole number"),
    ("ten", "steps_per_epoch='ten' is not a whole number"),
    (math.nan, "steps_per_epoch=nan is not a whole number"),
  ],
)
def test_a_count_that_is_not_known_is_refused_in_words(steps, expected):
  with pytest.raises(UserError, match=expected):
    LinearScalingSchedule(steps, 512)


def test_a_symbolic_tensor_is_refused_in_words():
  make = tf.function(lambda steps: LinearScalingSchedule(steps, 512) and steps, autograph=False)
  with pytest.raises(UserError, match="not a whole number that is known"):
    make(tf.constant(10))
