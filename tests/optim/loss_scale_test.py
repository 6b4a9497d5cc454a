"""`LossScale` against its rule in plain Python."""

import pytest
import tensorflow as tf

from tf_largebatch.optim.loss_scale import LossScale


def _values(loss_scale):
  return [float(variable.value) for variable in loss_scale.variables]


def test_halves_at_once_and_doubles_after_2000_good_steps():
  loss_scale = LossScale()
  update = tf.function(loss_scale.update)
  scale, good, skipped = 2.0**15, 0, 0
  for index in range(6100):
    finite = index not in (0, 1, 1500)
    good = good + 1 if finite else 0
    skipped += not finite
    scale *= 1 if finite else 0.5
    if good == 2000:
      scale, good = 2 * scale, 0
    update(tf.constant(finite))
    assert _values(loss_scale) == [scale, good, skipped]
  assert scale == 2.0 ** (15 - 3 + 2)


@pytest.mark.parametrize("finite, limit", [(False, 1.0), (True, 2.0**24)])
def test_stays_within_its_limits(finite, limit):
  loss_scale = LossScale()
  loss_scale.scale.assign(limit)
  loss_scale.good_steps.assign(1999)
  loss_scale.update(tf.constant(finite))
  assert _values(loss_scale) == [limit, 0, 0 if finite else 1]
