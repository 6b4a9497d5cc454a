"""The reference's loss, workers, learning rate and step, against figures worked out by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT
from tests.tools.conformance import small_networks
from tests.tools.conformance.small_networks import MEAN, STD
from tools.conformance import reference


def test_shares_no_code_with_the_package():
  # `tools` itself loads the settings that programs ignore.
  program = (
    "import sys, tools; before = set(sys.modules); from tools.conformance import reference; "
    "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
    "sys.exit(bool({'tf_largebatch', 'tensorflow', 'keras'} & new or 'tensorflow' in before))"
  )
  assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# The loss.


def test_cross_entropy_by_hand():
  logits = np.log([0.5, 0.25, 0.25]) + 1000
  loss, gradient = reference.cross_entropy(logits, 1, 0.0)
  assert loss == pytest.approx(math.log(4), rel=1e-9)
  np.testing.assert_allclose(gradient, [0.5, -0.75, 0.25], atol=1e-9)


def test_label_smoothing_by_hand():
  loss, gradient = reference.cross_entropy(np.log([0.5, 0.25, 0.25]), 1, 0.3)
  # Targets 0.1, 0.8, 0.1.
  assert loss == pytest.approx(0.1 * math.log(2) + 0.9 * math.log(4))
  np.testing.assert_allclose(gradient, [0.4, -0.55, 0.15])


def test_error_count():
  parameters = small_networks.parameters("plain")
  parameters["logits/kernel"][:] = 0
  parameters["logits/bias"][:] = [0, 0, 9, 0, 0]
  images, _ = small_networks.batch(4)
  worker = reference.worker_pass(
    "plain", parameters, images, np.array([2, 0, 2, 1]), mean=MEAN, std=STD
  )
  assert worker.error_count == 2


# Workers: eq. 5 to 7 and remark 3.


def _minibatch(network, parameters, images, labels):
  return reference.minibatch(network, parameters, images, labels, mean=MEAN, std=STD)


def test_minibatch_is_the_mean_of_its_workers():
  parameters = small_networks.parameters("small_residual")
  images, labels = small_networks.batch(3, 4)
  whole = _minibatch("small_residual", parameters, images, labels)
  workers = [
    reference.worker_pass("small_residual", parameters, *pair, mean=MEAN, std=STD)
    for pair in zip(images, labels, strict=True)
  ]
  assert whole.loss == pytest.approx(sum(w.loss_sum for w in workers) / 12, rel=1e-12)
  assert whole.error == sum(w.error_count for w in workers) / 12
  for key in parameters:
    expected = (
      workers[0].gradients[key] + workers[1].gradients[key] + workers[2].gradients[key]
    ) / 12
    np.testing.assert_allclose(whole.gradients[key], expected, rtol=1e-10, atol=1e-14)
  assert len(whole.means) == len(whole.variances) == 7
  for name in whole.means:
    for field in ("means", "variances"):
      expected = np.mean([getattr(w, field)[name] for w in workers], axis=0)
      np.testing.assert_allclose(getattr(whole, field)[name], expected, rtol=1e-12)


@pytest.mark.parametrize(("network", "same"), [("plain", True), ("small_residual", False)])
def test_the_number_of_workers_matters_only_with_batch_norm(network, same):
  """Without batch normalisation only kn matters; with it, n changes the loss itself (§2.3)."""
  parameters = small_networks.parameters(network)
  images, labels = small_networks.batch(2, 4)
  two = _minibatch(network, parameters, images, labels)
  one = _minibatch(network, parameters, images.reshape(1, 8, 8, 8, 3), labels.reshape(1, 8))
  if same:
    assert one.loss == pytest.approx(two.loss, rel=1e-12)
  else:
    assert abs(one.loss - two.loss) > 1e-3
  difference = max(np.abs(one.gradients[key] - two.gradients[key]).max() for key in parameters)
  assert difference < 1e-12 if same else difference > 1e-3


def test_permuting_images_within_and_between_workers():
  """The order within a worker does not matter; an exchange between workers changes the loss."""
  parameters = small_networks.parameters("small_residual")
  images, labels = small_networks.batch(2, 4)
  whole = _minibatch("small_residual", parameters, images, labels)
  within = _minibatch("small_residual", parameters, images[:, ::-1], labels[:, ::-1])
  assert within.loss == pytest.approx(whole.loss, rel=1e-12)
  images[[0, 1], 0], labels[[0, 1], 0] = images[[1, 0], 0], labels[[1, 0], 0]
  between = _minibatch("small_residual", parameters, images, labels)
  assert abs(between.loss - whole.loss) > 1e-6


# The learning rate.


def _rate(t, **changes):
  recipe = {"steps_per_epoch": 10, "batch": 8192, "reference_rate": 0.1, "reference_batch": 256}
  return reference.rate(t, reference.Schedule(**{**recipe, **changes}))


@pytest.mark.parametrize(
  ("t", "expected"),
  [
    (0, 0.1),
    (1, 0.162),  # 0.1 + 3.1/50.
    (25, 1.65),
    (49, 3.138),
    (50, 3.2),
    (299, 3.2),
    (300, 0.32),
    (599, 0.32),
    (600, 0.032),
    (799, 0.032),
    (800, 0.0032),
    (899, 0.0032),
  ],
)
def test_rate_of_the_headline(t, expected):
  assert _rate(t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
  ("t", "changes", "expected"),
  [
    (0, {"warmup": "constant"}, 0.1),
    (49, {"warmup": "constant"}, 0.1),
    (50, {"warmup": "constant"}, 3.2),
    (0, {"warmup": "none"}, 3.2),
    (300, {"warmup": "none"}, 0.32),
    (50, {"scaling": "sqrt"}, 0.1 * math.sqrt(32)),
    (25, {"scaling": "sqrt"}, 0.05 + 0.05 * math.sqrt(32)),
    (0, {"scaling": "none"}, 0.1),
    (200, {"scaling": "none"}, 0.1),
    (0, {"batch": 256}, 0.1),
    (0, {"batch": 128}, 0.05),  # No warmup towards a lower rate.
    (300, {"batch": 128}, 0.005),
    (0, {"batch": 512}, 0.1),
    (50, {"batch": 512}, 0.2),
    (51, {"steps_per_epoch": 10.4}, 0.1 + 3.1 * 51 / 52),
    (52, {"steps_per_epoch": 10.4}, 3.2),
    (311, {"steps_per_epoch": 10.4}, 3.2),
    (312, {"steps_per_epoch": 10.4}, 0.32),
    (309, {"steps_per_epoch": 10.32}, 3.2),
    (310, {"steps_per_epoch": 10.32}, 0.32),  # 309.6, rounded.
    (20, {"decay_epochs": (2.0,), "decay_factor": 0.5, "warmup": "none"}, 1.6),
    (20, {"decay_epochs": (2.0,), "decay_factor": 0.5}, 1.34),
    (50, {"decay_epochs": (2.0,), "decay_factor": 0.5}, 1.6),
  ],
)
def test_rate_of_the_ablations(t, changes, expected):
  assert _rate(t, **changes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", [{"warmup": "gradually"}, {"scaling": "cubic"}])
def test_rate_refuses_unknown_names(changes):
  with pytest.raises((ValueError, KeyError)):
    _rate(1000, **changes)


# The step.


def _scalar_batch(g, **arrays):
  return reference.Minibatch(0.0, 0.0, {"a/kernel": np.array([g])}, **arrays)


def _trajectory(rates, gradients, **settings):
  """The weight and the momentum buffer after each step, from w = 1."""
  state = reference.initial_state({"a/kernel": np.array([1.0])}, {})
  weights, moments = [], []
  for eta, g in zip(rates, gradients, strict=True):
    state = reference.sgd_step(state, _scalar_batch(g, means={}, variances={}), eta, **settings)
    weights.append(float(state.parameters["a/kernel"][0]))
    moments.append(float(state.momentum["a/kernel"][0]))
  return weights, moments


@pytest.mark.parametrize(
  ("correction", "nesterov", "weights", "moments"),
  [
    # m = 0.5, η = 0.1 then 0.2, g = 2 then −1: u = 2, 0.
    (True, False, [0.8, 0.8], [2, 0]),
    (True, True, [0.7, 0.9], [2, 0]),  # −0.1·(1 + 2), then −0.2·(0 − 1).
    # v = 0.2, then 0.1 − 0.2 = −0.1.
    (False, False, [0.8, 0.9], [0.2, -0.1]),
    (False, True, [0.7, 0.95], [0.2, -0.1]),  # −(0.1 + 0.2), then −(−0.05 − 0.2).
  ],
)
def test_two_steps_by_hand(correction, nesterov, weights, moments):
  settings = {"momentum": 0.5, "momentum_correction": correction, "nesterov": nesterov}
  found = _trajectory([0.1, 0.2], [2.0, -1.0], **settings)
  np.testing.assert_allclose(found, [weights, moments], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_eq_10_is_eq_9_only_at_a_constant_rate(nesterov):
  gradients = [2.0, -1.0, 0.5, 3.0]
  for rates, same in (([0.1] * 4, True), ([0.1, 0.1, 0.2, 0.2], False)):
    corrected, _ = _trajectory(rates, gradients, nesterov=nesterov, momentum_correction=True)
    stale, _ = _trajectory(rates, gradients, nesterov=nesterov, momentum_correction=False)
    np.testing.assert_allclose(stale[:2], corrected[:2], rtol=1e-12)
    assert np.allclose(stale, corrected, rtol=1e-12) == same


def test_corrected_eq_10_is_eq_9():
  """Remark 2: v ← m·(η_{t+1}/η_t)·v + η_{t+1}·g."""
  rates, gradients = [0.1, 0.3, 0.3, 0.02], [2.0, -1.0, 0.5, 3.0]
  found, _ = _trajectory(rates, gradients, nesterov=False)
  w, v, previous, expected = 1.0, 0.0, rates[0], []
  for eta, g in zip(rates, gradients, strict=True):
    v = 0.9 * eta / previous * v + eta * g
    w, previous = w - v, eta
    expected.append(w)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_weight_decay_is_for_kernels_once_and_inside_the_momentum():
  names = ["a/kernel", "a/bias", "b/gamma", "b/beta"]
  state = reference.initial_state({name: np.array([2.0]) for name in names}, {})
  batch = reference.Minibatch(0.0, 0.0, {name: np.array([1.0]) for name in names}, {}, {})
  after = reference.sgd_step(state, batch, 0.1, momentum=0.5, nesterov=False, weight_decay=0.25)
  assert {key: float(u[0]) for key, u in after.momentum.items()} == {
    "a/kernel": 1.5,
    "a/bias": 1.0,
    "b/gamma": 1.0,
    "b/beta": 1.0,
  }
  assert after.parameters["a/kernel"][0] == pytest.approx(1.85)
  assert after.parameters["b/gamma"][0] == pytest.approx(1.9)
  stale = reference.sgd_step(
    state, batch, 0.1, momentum=0.5, nesterov=False, weight_decay=0.25, momentum_correction=False
  )
  assert stale.momentum["a/kernel"][0] == pytest.approx(0.15)
  # The state before the step is not changed.
  assert state.parameters["a/kernel"][0] == 2 and state.momentum["a/kernel"][0] == 0


def test_moving_statistics():
  state = reference.initial_state(
    {"a/kernel": np.array([1.0])},
    {"b/moving_mean": np.array([1.0]), "b/moving_variance": np.array([2.0])},
  )
  batch = _scalar_batch(0.0, means={"b": np.array([11.0])}, variances={"b": np.array([4.0])})
  after = reference.sgd_step(state, batch, 0.1, batch_norm_momentum=0.75)
  assert after.statistics == {"b/moving_mean": 3.5, "b/moving_variance": 2.5}
  assert state.statistics["b/moving_mean"] == 1
  after = reference.sgd_step(state, batch, 0.1)
  assert after.statistics["b/moving_mean"] == pytest.approx(2)


def test_k_small_steps_are_one_large_step_for_a_frozen_gradient():
  """Eq. 3 and 4: η̂ = kη makes them equal if ∇l(x, w_{t+j}) = ∇l(x, w_t), else nearly so."""
  k, eta = 4, 1e-3
  parameters = small_networks.parameters("plain")
  images, labels = small_networks.batch(k, 4)
  plain_sgd = {"momentum": 0.0, "nesterov": False}
  start = reference.initial_state(parameters, {})
  small, frozen = start, start
  for j in range(k):
    batch = _minibatch("plain", small.parameters, images[j : j + 1], labels[j : j + 1])
    small = reference.sgd_step(small, batch, eta, **plain_sgd)
    batch = _minibatch("plain", parameters, images[j : j + 1], labels[j : j + 1])
    frozen = reference.sgd_step(frozen, batch, eta, **plain_sgd)
  batch = _minibatch("plain", parameters, images, labels)
  large = reference.sgd_step(start, batch, k * eta, **plain_sgd)
  unscaled = reference.sgd_step(start, batch, eta, **plain_sgd)

  def distance(state):
    return math.sqrt(
      sum(((state.parameters[key] - large.parameters[key]) ** 2).sum() for key in parameters)
    )

  assert distance(frozen) < 1e-14
  assert 1e-6 < distance(small) < 0.1 * distance(start)
  assert distance(unscaled) > 0.5 * distance(start)
