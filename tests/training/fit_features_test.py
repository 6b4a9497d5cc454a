"""What `fit` and `evaluate` take, against Keras' own with one worker, and what they refuse."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.fit_test import assert_equal, crossentropy, examples, float64, mlp, values
from tf_largebatch import evaluate, fit
from tf_largebatch.distributed.place import Place
from tf_largebatch.training.fit_data import EvaluationData, TrainingData, Workers

assert float64  # A fixture of every test here.


def both(make, *data, expected_options=None, **options):
  """Trains two equal models with Keras' `fit` and with ours, and compares all that they hold."""
  stock, ours = make(), make()
  n = options.pop("batch_size", 8)
  expected = stock.fit(*data, batch_size=n, verbose=0, **options).history
  actual = fit(ours, *data, workers=1, per_worker_batch_size=n, verbose=0, **options).history
  assert_equal(values(ours), values(stock))
  assert {k: pytest.approx(v, rel=1e-9) for k, v in expected.items()} == actual
  return stock, ours


def test_sample_weights_and_weighted_metrics():
  x, y = examples(48)
  weights = np.random.default_rng(1).uniform(0, 2, 48)
  make = lambda: mlp(keras.optimizers.SGD(0.1), weighted_metrics=["accuracy"])  # noqa: E731
  both(make, x, y, sample_weight=weights, shuffle=False, epochs=2)


def test_class_weights():
  x, y = examples(48)
  make = lambda: mlp(keras.optimizers.SGD(0.1))  # noqa: E731
  both(make, x, y, class_weight={0: 0.5, 2: 3.0}, shuffle=False)


def two_headed():
  """Two inputs, two outputs with losses of their own, an added loss and a loss weight."""
  keras.utils.set_random_seed(0)

  class Sparse(keras.layers.Layer):
    def call(self, x):
      self.add_loss(0.01 * keras.ops.mean(keras.ops.abs(x)))
      return x

  a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
  x = Sparse()(keras.layers.Dense(5, "tanh")(keras.layers.Concatenate()([a, b])))
  outputs = {
    "label": keras.layers.Dense(3, name="label")(x),
    "value": keras.layers.Dense(1, name="value")(x),
  }
  model = keras.Model({"a": a, "b": b}, outputs)
  model.compile(
    keras.optimizers.Adam(0.01),
    loss={"label": crossentropy(), "value": "mse"},
    loss_weights={"label": 1.0, "value": 0.3},
    metrics={"label": ["accuracy"], "value": ["mae"]},
  )
  return model


def test_several_inputs_and_outputs_and_added_losses():
  x, y = examples(48)
  inputs, targets = {"a": x, "b": x[:, :2]}, {"label": y, "value": x.sum(1, keepdims=True)}
  # Of whole batches: Keras does not weigh the losses of outputs by the size of a partial one.
  validation = ({"a": x[:16], "b": x[:16, :2]}, {"label": y[:16], "value": x[:16, :1]})
  both(two_headed, inputs, targets, shuffle=False, validation_data=validation, epochs=2)


class Scaled(keras.Sequential):
  """Has a loss and a metric of its own."""

  def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    return 2 * super().compute_loss(x, y, y_pred, sample_weight, training)

  def compute_metrics(self, x, y, y_pred, sample_weight=None):
    return {"scaled": 1.0} | super().compute_metrics(x, y, y_pred, sample_weight)


def test_a_loss_and_metrics_of_the_models_own():
  def make():
    keras.utils.set_random_seed(0)
    model = Scaled([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), metrics=["accuracy"])
    return model

  x, y = examples(32)
  stock, ours = make(), make()
  stock.fit(x, y, batch_size=8, shuffle=False, verbose=0)
  fit(ours, x, y, workers=1, per_worker_batch_size=8, shuffle=False, verbose=0)
  assert_equal(values(ours), values(stock))


def test_moving_average_of_the_weights():
  x, y = examples(56)
  for frequency in (3, None):
    optimizer = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": frequency}
    make = lambda: mlp(keras.optimizers.SGD(0.1, **optimizer))  # noqa: B023, E731
    both(make, x, y, shuffle=False)


def test_loss_scale_optimizer_and_mixed_precision():
  """The scale is a power of two, so only steps that overflow are any different: the first ones."""
  keras.config.set_floatx("float32")
  keras.config.set_dtype_policy("float32")
  x, y = (part.astype("float32") for part in examples(48))

  def make():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**40)
    return mlp(optimizer, dtype="mixed_float16")

  stock, ours = make(), make()
  options = {"shuffle": False, "verbose": 0, "epochs": 6}
  stock.fit(x, y, batch_size=8, **options)
  fit(ours, x, y, workers=1, per_worker_batch_size=8, **options)
  assert float(ours.optimizer.dynamic_scale) == float(stock.optimizer.dynamic_scale) < 2.0**40
  assert 0 < int(ours.optimizer.iterations) == int(stock.optimizer.iterations) < 36
  assert_equal(ours.get_weights(), stock.get_weights(), 2e-3)


def test_a_constraint():
  keras.utils.set_random_seed(0)

  def make():
    keras.utils.set_random_seed(0)
    constraint = keras.constraints.MaxNorm(0.3)
    model = keras.Sequential(
      [keras.Input((6,)), keras.layers.Dense(3, kernel_constraint=constraint)]
    )
    model.compile(keras.optimizers.SGD(0.5), crossentropy())
    return model

  both(make, *examples(32), shuffle=False)


def test_frozen_weights_keep_their_bits():
  x, y = examples(48)
  model = mlp(keras.optimizers.AdamW(0.01))
  model.layers[0].trainable = False
  model.compile(keras.optimizers.AdamW(0.01), crossentropy())
  before = [v.numpy() for v in model.variables]
  fit(model, x, y, workers=3, per_worker_batch_size=4, verbose=0)
  after = [v.numpy() for v in model.variables]
  changed = [np.any(a != b) for a, b in zip(before, after, strict=True)]
  # The frozen kernel; γ, β, the moving mean and variance, the last kernel and bias.
  assert changed == [False, True, True, True, True, True, True]


def test_evaluation_counts_each_example_once():
  x, y = examples(45)
  model = mlp(keras.optimizers.SGD(0.1))
  found = evaluate(model, x, y, batch_size=8, return_dict=True, verbose=0)
  logits = model.predict(x, verbose=0)
  losses = -np.log(np.exp(logits)[np.arange(45), y] / np.exp(logits).sum(1))
  regularization = float(sum(model.losses))
  assert found["loss"] == pytest.approx(losses.mean() + regularization, rel=1e-12)
  assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == y), rel=1e-6)
  dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
  assert evaluate(model, dataset, verbose=0) == pytest.approx(list(found.values()), rel=1e-9)
  expected = model.evaluate(dataset, steps=2, verbose=0)
  assert evaluate(model, dataset, steps=2, verbose=0) == pytest.approx(expected, rel=1e-9)


class Count(keras.metrics.Metric):
  def __init__(self):
    super().__init__(name="seen")
    self.seen = self.add_variable((), "zeros", name="seen")

  def update_state(self, y_true, y_pred, sample_weight=None):
    self.seen.assign_add(keras.ops.cast(keras.ops.shape(y_true)[0], self.seen.dtype))

  def result(self):
    return self.seen


def test_a_metric_may_return_its_variable():
  x, y = examples(45)
  model = mlp(keras.optimizers.SGD(0.1), metrics=[Count()])
  found = evaluate(model, x, y, batch_size=8, return_dict=True, verbose=0)
  assert found["seen"] == 45


def trained(x, y=None, **options):
  """All that a model holds after `fit` on some form of the same data."""
  model = mlp(keras.optimizers.SGD(0.1, momentum=0.9))
  options = {"workers": 2, "per_worker_batch_size": 4, "epochs": 2, "verbose": 0} | options
  history = fit(model, x, y, shuffle=False, **options)
  return values(model), len(history.epoch)


def test_all_forms_of_the_same_data_train_the_same():
  x, y = examples(43)  # 5 steps of 8, and 3 examples that are dropped.
  expected, _ = trained(x, y)
  dataset = tf.data.Dataset.from_tensor_slices((x, y))
  unknown = dataset.batch(5).filter(lambda *_: True)
  assert int(unknown.cardinality()) == tf.data.UNKNOWN_CARDINALITY
  endless = dataset.take(40).repeat().batch(3)
  for data, options in (
    ((tf.constant(x), tf.constant(y)), {}),
    ((dataset.batch(8),), {}),
    ((dataset.batch(3),), {}),
    ((unknown,), {}),
    ((lambda epoch: dataset.batch(5),), {}),
    ((endless,), {"steps_per_epoch": 5}),
  ):
    actual, epochs = trained(*data, **options)
    assert_equal(actual, expected, 0)
    assert epochs == 2


def cached_batches(size):
  """A data set of 5000 numbers whose batches are cached, and fetched ahead."""
  numbers = tf.data.Dataset.range(5_000).map(lambda i: (i[None], i), num_parallel_calls=2)
  return numbers.prefetch(2).batch(size).cache().prefetch(2)


def test_cached_batches_stay_whole():
  """Looking at the first batch must not truncate what TensorFlow caches."""
  place = Place.of(tf.distribute.get_strategy())
  for _ in range(5):
    data = EvaluationData(cached_batches(3_000), place, 1)
    assert len(data.first()[1]) == 3_000
    for _ in range(2):
      assert [len(parts[0][1]) for parts, *_ in data.groups()] == [3_000, 2_000]
    data = TrainingData(cached_batches(3_000), place, Workers(4, 500))
    assert list(data.first_worker_batch()[1]) == list(range(500))
    for epoch in range(2):
      assert len(list(data.epoch(epoch))) == 2


def test_a_function_is_asked_for_each_epoch():
  """A run that begins at epoch 1 sees what an uninterrupted one saw then."""
  asked = []

  def dataset(epoch):
    asked.append(epoch)
    return tf.data.Dataset.from_tensor_slices(examples(16, seed=epoch)).batch(16)

  trained(dataset, epochs=3, initial_epoch=1)
  assert asked[-2:] == [1, 2]


def test_steps_per_epoch_go_on_where_the_last_epoch_stopped():
  x, y = examples(48)
  dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
  whole, _ = trained(dataset, epochs=1)
  parts, _ = trained(dataset, epochs=3, steps_per_epoch=2)
  assert_equal(parts, whole, 0)


@pytest.mark.parametrize("steps", [2, 4, 9])
def test_steps_per_epoch_of_arrays_as_in_keras(steps):
  """The epochs continue through the arrays: 4 of 6 steps, then 2, then 4 from the start again."""
  x, y = examples(48)
  make = lambda: mlp(keras.optimizers.SGD(0.1))  # noqa: E731
  both(make, x, y, shuffle=False, epochs=3, steps_per_epoch=steps)


def test_steps_per_epoch_of_permuted_arrays():
  """Two epochs of half the steps are one epoch, also for a run that begins with the second."""
  x, y = examples(48)
  options = {"workers": 2, "per_worker_batch_size": 4, "verbose": 0}
  models = [mlp(keras.optimizers.SGD(0.1)) for _ in range(2)]
  fit(models[0], x, y, **options)
  fit(models[1], x, y, steps_per_epoch=3, **options)
  fit(models[1], x, y, steps_per_epoch=3, epochs=2, initial_epoch=1, **options)
  assert_equal(values(models[1]), values(models[0]), 0)


def test_limits_of_keras_configuration(monkeypatch):
  monkeypatch.setattr(keras.config, "max_epochs", lambda: 2)
  monkeypatch.setattr(keras.config, "max_steps_per_epoch", lambda: 3)
  x, y = examples(48)
  seen = []
  watch = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda *_, **__: seen.append("train"),
    on_test_batch_end=lambda *_, **__: seen.append("test"),
  )
  options = {"epochs": 5, "callbacks": [watch], "verbose": 0}
  model = mlp(keras.optimizers.SGD(0.1))
  fit(model, x, y, workers=1, per_worker_batch_size=8, validation_data=(x, y), **options)
  assert seen == 2 * (3 * ["train"] + 3 * ["test"])
  seen.clear()
  evaluate(model, x, y, batch_size=8, callbacks=[watch], verbose=0)
  assert seen == 3 * ["test"]


def test_a_callback_stops_an_evaluation():
  x, y = examples(48)
  model = mlp(keras.optimizers.SGD(0.1))

  class Stop(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
      self.model.stop_evaluating = batch == 1

  expected = evaluate(model, x[:16], y[:16], batch_size=8, verbose=0)
  assert evaluate(model, x, y, batch_size=8, callbacks=[Stop()], verbose=0) == expected


def by_class(y_true, y_pred):
  return keras.ops.mean(keras.ops.cast(y_true, "float64"))


def test_metrics_of_any_shape_and_of_whole_batches():
  """A metric may hold a score for each class, or count batches, not examples, as in Keras."""

  def make():
    model = mlp(keras.optimizers.SGD(0.1))
    scores = keras.metrics.F1Score(name="scores")  # One for each class.
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[scores, by_class])
    return model

  x, y = examples(44)
  y = keras.utils.to_categorical(y, 3).astype("float64")
  stock, ours = make(), make()
  options = {"shuffle": False, "verbose": 0, "validation_data": (x[:20], y[:20])}
  expected = stock.fit(x[:40], y[:40], batch_size=8, **options).history
  history = fit(ours, x, y, workers=1, per_worker_batch_size=8, **options).history
  assert np.shape(history["scores"]) == (1, 3)
  for name, value in expected.items():
    np.testing.assert_allclose(history[name], value, 1e-6)
  expected = stock.evaluate(x, y, batch_size=8, verbose=0)
  actual = evaluate(ours, x, y, batch_size=8, verbose=0)
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, 1e-6)


def test_arrays_are_permuted_by_seed_and_epoch():
  x, y = examples(32)
  seen = []

  def record(epochs, **options):
    seen.clear()
    model = mlp(keras.optimizers.SGD(0.0))
    watch = keras.callbacks.LambdaCallback(
      on_train_batch_end=lambda _, logs: seen.append(logs["loss"])
    )
    options = {
      "workers": 1,
      "per_worker_batch_size": 8,
      "verbose": 0,
      "callbacks": [watch],
    } | options
    fit(model, x, y, epochs=epochs, **options)
    return np.round(seen, 9).tolist()

  two = record(2)
  assert len(set(two)) == 8  # Other batches in each step and epoch.
  assert two == record(2)
  assert two[4:] == record(2, initial_epoch=1)
  assert two != record(2, seed=1)
