"""LARS: SGD whose step on each layer is proportional to the norm of the layer's weights."""

import keras
import tensorflow as tf

from tf_largebatch.optim.sgd import MomentumCorrectedSGD


@keras.saving.register_keras_serializable(package="tf_largebatch")
class LARS(MomentumCorrectedSGD):
  """Layer-wise adaptive rate scaling, with momentum correction.

  For variables that have weight decay (kernels), with g the gradient of the loss, the gradient that
  `MomentumCorrectedSGD` uses is

      q · (g + λ·w),   q = trust_coefficient · ‖w‖ / (‖g‖ + λ·‖w‖),

  and q = 1 if ‖w‖ or ‖g‖ is 0. All other variables are updated as by `MomentumCorrectedSGD`. At a
  constant rate this is algorithm 1 of the source.

  Source: You et al. 2017 (arXiv 1708.03888), eqs. 6 and 7, algorithm 1.

  Args:
    learning_rate, momentum: γ and m of the source.
    nesterov: use Nesterov momentum; the source does not.
    weight_decay: λ, at least 0.
    trust_coefficient: η of the source, above 0.
    name: name of the optimizer.
    **arguments: the others of `MomentumCorrectedSGD`.

  Raises:
    ValueError: an argument is out of range or unknown.
  """

  def __init__(
    self,
    learning_rate=0.1,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    trust_coefficient=0.001,
    name="LARS",
    **arguments,
  ):
    super().__init__(
      learning_rate,
      momentum=momentum,
      nesterov=nesterov,
      weight_decay=weight_decay,
      name=name,
      **arguments,
    )
    if not trust_coefficient > 0:
      raise ValueError(f"trust_coefficient must be above 0, not {trust_coefficient}.")
    self.trust_coefficient = trust_coefficient

  def _decay(self, gradient, variable):
    decay = tf.constant(self.coupled_weight_decay, gradient.dtype)
    weight_norm, gradient_norm = tf.norm(variable), tf.norm(gradient)
    known = (weight_norm > 0) & (gradient_norm > 0)
    # The inner tf.where avoids 0 / 0, which must not occur even in the branch that is not taken.
    below = tf.where(known, gradient_norm + decay * weight_norm, 1)
    trust = tf.constant(self.trust_coefficient, gradient.dtype)
    ratio = tf.where(known, trust * weight_norm / below, 1)
    return ratio * super()._decay(gradient, variable)

  def get_config(self):
    return {**super().get_config(), "trust_coefficient": self.trust_coefficient}
