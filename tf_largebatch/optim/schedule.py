"""The learning rate as a pure function of the step: linear scaling, warmup, step decay."""

import math

import keras
import tensorflow as tf

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import WARMUPS, scaled_learning_rate


@keras.saving.register_keras_serializable(package="tf_largebatch")
class LinearScalingSchedule(keras.optimizers.schedules.LearningRateSchedule):
  """η_t of the paper: scaled by the minibatch, warmed up, decayed in steps.

      η̂   = η · kn / 256                               (linear scaling rule, §2.1)
      η_t = η + (η̂ − η) · t / T_w        for t < T_w    (gradual warmup, §2.2)
      η_t = η̂ · f^(number of decay boundaries ≤ t)      otherwise

  t counts steps from 0, T_w = warmup epochs · steps per epoch and the boundaries are decay epochs ·
  steps per epoch, each rounded to a whole step. The warmup is for kn > 256 alone (§5.3). After it
  the schedule goes on as if there had been none: a boundary inside the warmup counts from T_w on.
  Ablations: "constant" warmup holds η for t < T_w and "none" starts at η̂; "sqrt" scaling gives
  η̂ = η · √(kn / 256) and "none" η̂ = η.

  Source: Goyal et al. 2017 (arXiv 1706.02677), §2.1, §2.2, §5.1, §5.3.

  Args:
    steps_per_epoch: steps of one pass over the training set.
    global_batch_size: kn, images in one step.
    reference_learning_rate: η, the rate of a minibatch of `reference_batch_size` images.
    reference_batch_size: the paper's 256.
    scaling: "linear", "sqrt" or "none".
    warmup: "gradual", "constant" or "none".
    warmup_epochs: epochs until η̂ is reached.
    decay_epochs: epochs at which the rate is multiplied by `decay_factor`, rising.
    decay_factor: f.

  Call: a step (integer scalar) → η_t, a float64 scalar, so that nothing is lost before the
  optimizer casts it to its weights' dtype.

  Raises:
    UserError (a ValueError): an unknown scaling or warmup, a count below 1, or a rate, epoch or
      factor that is negative or not finite.
  """

  def __init__(
    self,
    steps_per_epoch,
    global_batch_size,
    reference_learning_rate=0.1,
    reference_batch_size=256,
    scaling="linear",
    warmup="gradual",
    warmup_epochs=5.0,
    decay_epochs=(30.0, 60.0, 80.0),
    decay_factor=0.1,
    name="LinearScalingSchedule",
  ):
    super().__init__()
    if warmup not in WARMUPS:
      raise UserError(f"warmup={warmup!r} is unknown; one of {', '.join(WARMUPS)} would do.")
    if steps_per_epoch < 1 or global_batch_size < 1 or reference_batch_size < 1:
      raise UserError(
        "steps_per_epoch, global_batch_size and reference_batch_size must be at least 1, not "
        f"{steps_per_epoch}, {global_batch_size} and {reference_batch_size}."
      )
    given = {
      "reference_learning_rate": (reference_learning_rate,),
      "warmup_epochs": (warmup_epochs,),
      "decay_epochs": tuple(decay_epochs),
      "decay_factor": (decay_factor,),
    }
    for argument, values in given.items():
      if not all(0 <= value < math.inf for value in values):
        told = ",".join(map(str, values))
        raise UserError(f"{argument}={told} is refused; it must be finite and not negative.")
    self.steps_per_epoch = steps_per_epoch
    self.global_batch_size = global_batch_size
    self.reference_learning_rate = reference_learning_rate
    self.reference_batch_size = reference_batch_size
    self.scaling = scaling
    self.warmup = warmup
    self.warmup_epochs = warmup_epochs
    self.decay_epochs = tuple(decay_epochs)
    self.decay_factor = decay_factor
    self.name = name
    self.peak_learning_rate = scaled_learning_rate(
      reference_learning_rate, global_batch_size, reference_batch_size, scaling
    )
    warms_up = warmup != "none" and global_batch_size > reference_batch_size
    self.warmup_steps = round(warmup_epochs * steps_per_epoch) if warms_up else 0
    self.decay_steps = tuple(round(epoch * steps_per_epoch) for epoch in self.decay_epochs)

  def __call__(self, step):
    step = tf.cast(step, tf.float64)
    reference = tf.constant(self.reference_learning_rate, tf.float64)
    peak = tf.constant(self.peak_learning_rate, tf.float64)
    with tf.name_scope(self.name):
      decays = tf.add_n(
        [tf.cast(step >= boundary, tf.float64) for boundary in self.decay_steps]
        or [tf.zeros([], tf.float64)]
      )
      rate = peak * tf.constant(self.decay_factor, tf.float64) ** decays
      if self.warmup_steps == 0:
        return rate
      warm = reference
      if self.warmup == "gradual":
        warm = reference + (peak - reference) * (step / self.warmup_steps)
      return tf.where(step < self.warmup_steps, warm, rate)

  def get_config(self):
    return {
      "steps_per_epoch": self.steps_per_epoch,
      "global_batch_size": self.global_batch_size,
      "reference_learning_rate": self.reference_learning_rate,
      "reference_batch_size": self.reference_batch_size,
      "scaling": self.scaling,
      "warmup": self.warmup,
      "warmup_epochs": self.warmup_epochs,
      "decay_epochs": self.decay_epochs,
      "decay_factor": self.decay_factor,
      "name": self.name,
    }
