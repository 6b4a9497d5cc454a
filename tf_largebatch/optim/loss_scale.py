"""Dynamic loss scaling, which keeps small gradients out of float16's underflow."""

import keras
import tensorflow as tf


class LossScale:
  """The factor of the loss before backprop in float16, and what follows from each step.

  A gradient that is not finite, in any worker, means that the scale is too large: the step leaves
  weights and momentum as they are and halves the scale. After `GROWTH_STEPS` steps without one the
  scale doubles. It is a power of two, so that scaling rounds nothing.

  Source: Micikevicius et al. 2018 (arXiv 1710.03740), §3.2.

  Attributes:
    scale: float32 scalar.
    good_steps: since the scale last changed.
    skipped_steps: since training began.
    variables: these three; part of a checkpoint.
  """

  INITIAL = 2.0**15
  GROWTH_STEPS = 2000
  # Largest and smallest: beyond them float32 sums, or the gradients themselves, would be at fault.
  LIMITS = (1.0, 2.0**24)

  def __init__(self):
    """To be made in the strategy's scope."""
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
    """Takes note of a step, in cross-replica context; finite: boolean scalar, of its gradients."""
    good_steps = tf.where(finite, self.good_steps.value + 1, 0)
    grows = good_steps >= self.GROWTH_STEPS
    factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
    self.scale.assign(tf.clip_by_value(self.scale.value * factor, *self.LIMITS))
    self.good_steps.assign(tf.where(grows, tf.zeros_like(good_steps), good_steps))
    self.skipped_steps.assign(self.skipped_steps.value + tf.cast(~finite, "int64"))
