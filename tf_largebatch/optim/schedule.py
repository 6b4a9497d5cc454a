"""The learning rate as a pure function of the step: linear scaling, warmup and step decay."""

import math

import keras
import tensorflow as tf

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import DECAYS, WARMUPS, scaled_learning_rate, warms_up

# The rate during the warmup from η, η̂ and t / T_w (§2.2), by name; "none" has no warmup.
_WARMUP_RATES = {
  "gradual": lambda reference, peak, progress: reference + (peak - reference) * progress,
  "constant": lambda reference, peak, progress: reference,
}


# Share of the peak rate that is left after the warmup, from the share p in [0, 1] of the way to the
# end and the power, by name; "steps" does not depend on p.
_SMOOTH_DECAYS = {
  "cosine": lambda progress, power: (1 + tf.cos(math.pi * progress)) / 2,
  "polynomial": lambda progress, power: (1 - progress) ** power,
}


def _require_choice(name: str, value, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}.")


def _require_in_range(name: str, *values: float) -> None:
  if not all(0 <= value < math.inf for value in values):
    text = ",".join(map(str, values))
    raise UserError(f"{name}={text} is out of range; it must be finite and at least 0.")


def _to_int(name: str, value) -> int:
  """Converts a count, which may be a tensor such as a data set's cardinality.

  Raises:
    UserError: it is not a whole number that is known now.
  """
  try:
    number = int(value)
    if number != value:
      raise ValueError("not a whole number")
  except (TypeError, ValueError, OverflowError) as error:
    raise UserError(
      f"{name}={value!r} is not a whole number that is known when the schedule is made; give an "
      "int."
    ) from error
  if number in (tf.data.INFINITE_CARDINALITY, tf.data.UNKNOWN_CARDINALITY):
    raise UserError(
      f"{name}={number} is the cardinality of a tf.data set of unknown or infinite size; give the "
      "number itself."
    )
  return number


@keras.saving.register_keras_serializable(package="tf_largebatch")
class LinearScalingSchedule(keras.optimizers.schedules.LearningRateSchedule):
  """The paper's learning rate η_t: scaled with the minibatch, warmed up, decayed in steps.

      η̂   = η · kn / 256                               (linear scaling rule, §2.1)
      η_t = η + (η̂ − η) · t / T_w        for t < T_w    (gradual warmup, §2.2)
      η_t = η̂ · f^(number of decay boundaries ≤ t)      otherwise

  t counts steps from 0. T_w is warmup epochs · steps per epoch, and a decay boundary is decay epoch
  · steps per epoch, each rounded to a whole step. Only minibatches above 256 images warm up (§5.3).
  The warmup does not shift the boundaries; one that lies inside it takes effect at T_w. Ablations:
  "constant" warmup keeps the rate at η for t < T_w, and "none" starts at η̂; "sqrt" scaling sets
  η̂ = η · √(kn / 256), and "none" sets η̂ = η. Two other decays leave the warmup and the scaling as
  they are; with p = (t − T_w) / (T − T_w) and T the steps of the run, after the warmup

      η_t = η̂ · (1 + cos πp) / 2                      (decay "cosine")
      η_t = η̂ · (1 − p)^power                         (decay "polynomial")

  Source: Goyal et al. 2017 (arXiv 1706.02677), §2.1, §2.2, §5.1, §5.3; Loshchilov and Hutter 2017
  (arXiv 1608.03983), eq. 5; You et al. 2017 (arXiv 1708.03888), §5 (power 2).

  Args:
    steps_per_epoch: steps in one pass over the training set; an int, or a tensor such as the
      cardinality of the batched data set.
    global_batch_size: kn, images in one step.
    reference_learning_rate: η, the rate for a minibatch of `reference_batch_size` images.
    reference_batch_size: images in the reference minibatch; 256 in the paper.
    scaling: "linear", "sqrt" or "none".
    warmup: "gradual", "constant" or "none".
    warmup_epochs: length of the warmup in epochs.
    decay_epochs: epochs at which the rate is multiplied by `decay_factor`, in increasing order.
    decay_factor: f.
    decay: "steps", "cosine" or "polynomial".
    decay_power: of the polynomial.
    epochs: of the whole run; needed unless `decay` is "steps".
    name: name of the schedule's operations.

  Call: maps a step (integer scalar) to η_t (scalar in Keras' `floatx`, as every optimizer of Keras
    takes it). `exact` returns η_t in float64.

  Raises:
    UserError (a ValueError): scaling, warmup or decay is unknown, a count is below 1, a rate, an
      epoch, factor or power is negative or not finite, or a smooth decay ends before the warmup.
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
    decay="steps",
    decay_power=2.0,
    epochs=None,
  ):
    super().__init__()
    _require_choice("warmup", warmup, WARMUPS)
    _require_choice("decay", decay, DECAYS)
    steps_per_epoch = _to_int("steps_per_epoch", steps_per_epoch)
    global_batch_size = _to_int("global_batch_size", global_batch_size)
    reference_batch_size = _to_int("reference_batch_size", reference_batch_size)
    if steps_per_epoch < 1 or global_batch_size < 1 or reference_batch_size < 1:
      raise UserError(
        "steps_per_epoch, global_batch_size and reference_batch_size must be at least 1, not "
        f"{steps_per_epoch}, {global_batch_size} and {reference_batch_size}."
      )
    _require_in_range("reference_learning_rate", reference_learning_rate)
    _require_in_range("warmup_epochs", warmup_epochs)
    _require_in_range("decay_epochs", *decay_epochs)
    _require_in_range("decay_factor", decay_factor)
    _require_in_range("decay_power", decay_power)
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
    self.warmup_steps = 0
    if warms_up(warmup, global_batch_size, reference_batch_size):
      self.warmup_steps = round(warmup_epochs * steps_per_epoch)
    self.decay_steps = tuple(round(epoch * steps_per_epoch) for epoch in self.decay_epochs)
    self.decay = decay
    self.decay_power = decay_power
    self.epochs = epochs
    self.total_steps = None if epochs is None else round(epochs * steps_per_epoch)
    if decay != "steps" and not (self.total_steps or 0) > self.warmup_steps:
      raise UserError(
        f"decay={decay!r} ends with the run, so it needs epochs above the warmup's, not {epochs}."
      )

  def __call__(self, step):
    return tf.cast(self.exact(step), keras.config.floatx())

  def exact(self, step) -> tf.Tensor:
    """η_t of a step (integer scalar) in float64, to be rounded once, where it is used."""
    step = tf.cast(step, tf.float64)
    reference = tf.constant(self.reference_learning_rate, tf.float64)
    peak = tf.constant(self.peak_learning_rate, tf.float64)
    with tf.name_scope(self.name):
      rate = peak * self._share_left(step)
      if self.warmup_steps == 0:
        return rate
      warm = _WARMUP_RATES[self.warmup](reference, peak, step / self.warmup_steps)
      return tf.where(step < self.warmup_steps, warm, rate)

  def _share_left(self, step):
    """η_t / η̂ after the warmup."""
    if self.decay == "steps":
      decays = tf.add_n(
        [tf.cast(step >= boundary, tf.float64) for boundary in self.decay_steps]
        or [tf.zeros([], tf.float64)]
      )
      return tf.constant(self.decay_factor, tf.float64) ** decays
    progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
    return _SMOOTH_DECAYS[self.decay](tf.clip_by_value(progress, 0, 1), self.decay_power)

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
      "decay": self.decay,
      "decay_power": self.decay_power,
      "epochs": self.epochs,
    }
