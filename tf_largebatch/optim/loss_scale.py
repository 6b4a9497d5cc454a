"""Dynamic loss scaling, which keeps small gradients from underflowing in float16."""

import keras
import tensorflow as tf


class LossScale:
  """The factor that multiplies the loss before backpropagation in float16.

      scale ← scale / 2    after a step whose gradients are not finite (in any worker)
      scale ← scale · 2    after `GROWTH_STEPS` steps in a row whose gradients are finite

  within `LIMITS`. Non-finite gradients mean that the scale was too large: that step changes neither
  weights nor momentum. The scale is a power of two, so scaling rounds nothing.

  Source: Micikevicius et al. 2018 (arXiv 1710.03740), §3.2.

  Attributes:
    scale: float32 scalar.
    good_steps: int64 scalar, steps with finite gradients since the scale last changed.
    skipped_steps: int64 scalar, steps with non-finite gradients since training began.
    variables: these three, which belong in a checkpoint.
  """

  INITIAL = 2.0**15
  GROWTH_STEPS = 2000
  # Smallest and largest scale; beyond them, the gradients themselves or sums in float32 must be at
  # fault.
  LIMITS = (1.0, 2.0**24)

  def __init__(self):
    """Creates the variables; call it in the strategy's scope."""
    self.scale = self._variable(self.INITIAL, "float32", "loss_scale")
    self.good_steps = self._variable(0, "int64", "good_steps")
    self.skipped_steps = self._variable(0, "int64", "skipped_steps")
    self.variables = [self.scale, self.good_steps, self.skipped_steps]

  @staticmethod
  def _variable(value, dtype: str, name: str) -> keras.Variable:
    return keras.Variable(
      value, dtype=dtype, trainable=False, aggregation="only_first_replica", name=name
    )

  def update(self, finite):
    """Adapts the scale to a step's gradients; call it in cross-replica context.

    Args:
      finite: boolean scalar, whether all gradients of the step are finite.
    """
    good_steps = tf.where(finite, self.good_steps.value + 1, 0)
    grows = good_steps >= self.GROWTH_STEPS
    factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
    self.scale.assign(tf.clip_by_value(self.scale.value * factor, *self.LIMITS))
    self.good_steps.assign(tf.where(grows, tf.zeros_like(good_steps), good_steps))
    self.skipped_steps.assign(self.skipped_steps.value + tf.cast(~finite, "int64"))
