"""The check of an all-reduce's result."""

import pytest

from tf_largebatch.errors import UserError
from tools.benchmark import reductions


def test_a_wrong_sum_is_refused(monkeypatch):
  import tensorflow as tf

  right, strategy = reductions.make_reduce, tf.distribute.get_strategy()
  timed = reductions.time_reduce(strategy, [(3,)], [()], 2)
  assert timed["min"] <= timed["seconds"] <= timed["max"]

  def make_wrong(*arguments):
    def reduce(gradients, others):
      number, sums = right(*arguments)(gradients, others)
      return number, [sums[0] * (1 + 2**-20), *sums[1:]]

    return reduce

  monkeypatch.setattr(reductions, "make_reduce", make_wrong)
  with pytest.raises(UserError, match=r"float32 tensor of shape \(3,\)"):
    reductions.time_reduce(strategy, [(3,)], [()], 2)
