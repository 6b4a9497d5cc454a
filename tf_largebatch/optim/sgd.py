"""SGD with momentum that stays right while the learning rate changes."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="tf_largebatch")
class MomentumCorrectedSGD(keras.optimizers.Optimizer):
  """The paper's SGD: momentum corrected for the rate (remark 2), coupled L2 (remark 1).

  With g the gradient of the loss plus λ·w for decayed weights, each step is

      v ← m · (η_{t+1} / η_t) · v + η_{t+1} · g   (eq. 10 with the correction)
      w ← w − v                                   (Nesterov: w ← w − (m · v + η_{t+1} · g))

  which equals eq. 9, u ← m · u + g, w ← w − η_{t+1} · u, by v = η · u, for any sequence of rates,
  from a schedule or assigned by hand. `keras.optimizers.SGD` is eq. 10 without the factor: a
  rising rate makes its old momentum too small and a falling one too large. A rate of 0 leaves the
  weights alone while the momentum goes on as in eq. 9: the buffer keeps the last other rate.

  Weight decay is the gradient of λ/2‖w‖², once for the minibatch, on variables whose name ends in
  "kernel" (convolutions and dense layers), never on γ, β or biases; `exclude_from_weight_decay`
  takes out more (Keras saves no exclusions: after loading, call it again). Keras' own
  `weight_decay` is decoupled (it by-passes the momentum), and its L2(λ) has the gradient 2λw.

  Source: Goyal et al. 2017 (arXiv 1706.02677), §3, eqs. 8 to 10; Sutskever et al. 2013 (Nesterov).

  Args:
    learning_rate: η, a float, a `LearningRateSchedule` or a callable.
    momentum: m, in [0, 1).
    nesterov: step by the momentum as it will be, not as it is.
    momentum_correction: False is the ablation, eq. 10 as it stands.
    weight_decay: λ.
    jit_compile: whether XLA compiles the update of all variables, which makes one kernel of each
      variable's; for gradients that were summed over the replicas before (`step`).
    name: of the optimizer.

  The momentum buffers and the rate they are scaled by are part of the optimizer's saved state.

  Raises:
    ValueError: momentum or weight_decay is out of range.
  """

  def __init__(
    self,
    learning_rate=0.1,
    momentum=0.9,
    nesterov=True,
    momentum_correction=True,
    weight_decay=0.0,
    jit_compile=False,
    name="MomentumCorrectedSGD",
  ):
    # The base class' weight_decay would be the decoupled one, so it stays None.
    super().__init__(learning_rate=learning_rate, name=name)
    if not 0 <= momentum < 1:
      raise ValueError(f"momentum must lie in [0, 1), not {momentum}.")
    if not weight_decay >= 0:
      raise ValueError(f"weight_decay must be at least 0, not {weight_decay}.")
    self.momentum = momentum
    self.nesterov = nesterov
    self.momentum_correction = momentum_correction
    self.coupled_weight_decay = weight_decay
    self.jit_compile = jit_compile

  def build(self, variables):
    if self.built:
      return
    super().build(variables)
    self.momentums = self.add_optimizer_variables(variables, "momentum")
    # The rate η that the buffers v = η · u are scaled by; 0 before the first step.
    self.buffer_learning_rate = self.add_variable(
      shape=(),
      dtype="float64" if any(v.dtype == "float64" for v in variables) else "float32",
      aggregation="only_first_replica",
      name="buffer_learning_rate",
    )

  def apply(self, grads, trainable_variables=None):
    # The rate of this step: the base class counts the step before it returns.
    learning_rate = self.learning_rate
    super().apply(grads, trainable_variables)
    if len(grads) > 0:
      scale, _ = self._buffer_scale(learning_rate, self.buffer_learning_rate.dtype)
      self.buffer_learning_rate.assign(scale)

  def momentum_correction_factor(self):
    """η_{t+1} / η_t for the step that comes next (1 before the first, or without correction)."""
    if not (self.built and self.momentum_correction):
      return tf.ones([], keras.config.floatx())
    return self._buffer_scale(self.learning_rate, self.buffer_learning_rate.dtype)[1]

  def _buffer_scale(self, learning_rate, dtype):
    """The rate that this step's buffer is scaled by, and the factor that takes the old there."""
    learning_rate = tf.cast(learning_rate, dtype)
    last = tf.cast(self.buffer_learning_rate, dtype)
    known = last != 0
    # Where the rate is 0, v = 0 · u would forget u: keep the last scale (any, at the start).
    scale = tf.where(learning_rate != 0, learning_rate, tf.where(known, last, tf.ones_like(last)))
    # Divided only where it may be: 0 / 0 must not appear even in the branch not taken.
    factor = tf.where(known, scale / tf.where(known, last, tf.ones_like(last)), 1)
    return scale, factor

  def _backend_update_step(self, grads, trainable_variables, learning_rate):
    # What depends on the rate alone is computed here, once for all variables.
    learning_rate = tf.cast(learning_rate, self.buffer_learning_rate.dtype)
    scale, factor, moves = learning_rate, 1.0, 1.0
    if self.momentum_correction:
      scale, factor = self._buffer_scale(learning_rate, learning_rate.dtype)
      moves = tf.cast(learning_rate != 0, scale.dtype)
    coefficients = {
      "decay": self.momentum * factor,  # v ← decay · v + scale · g
      "scale": scale,
      "moves_buffer": moves * (self.momentum if self.nesterov else 1.0),
      "moves_gradient": moves * scale,  # w ← w − (moves_buffer · v + moves_gradient · g)
    }
    coefficients = {name: tf.convert_to_tensor(x, scale.dtype) for name, x in coefficients.items()}
    indices = [self._get_variable_index(variable) for variable in trainable_variables]
    if self.momentum_correction:
      self._rescale_absent(indices, factor)
    if not tf.distribute.in_cross_replica_context():
      # A replica's own gradients, as in `fit`: Keras sums them over the replicas (SUM, not mean).
      super()._backend_update_step(grads, trainable_variables, coefficients)
      return
    # The caller has summed them (`step`, in one reduction with all else): only update the copies.
    weights = [getattr(variable, "value", variable) for variable in trainable_variables]
    buffers = [self.momentums[index].value for index in indices]
    decayed = [self._is_decayed(index) for index in indices]

    def update_all(_, weights, buffers, gradients, coefficients):
      for variables in zip(weights, buffers, gradients, decayed, strict=True):
        self._update(*variables, coefficients)

    if self.jit_compile:
      update_all = tf.function(update_all, jit_compile=True)
    # All variables at once, per device: the first only tells on which.
    tf.distribute.get_strategy().extended.update(
      weights[0], update_all, args=(weights, buffers, list(grads), coefficients), group=False
    )

  def update_step(self, gradient, variable, learning_rate):
    """Updates one variable; `learning_rate` holds the coefficients made from it above."""
    index = self._get_variable_index(variable)
    buffer = self.momentums[index].value
    self._update(variable, buffer, gradient, self._is_decayed(index), learning_rate)

  def _is_decayed(self, index: int) -> bool:
    # By index, for a replica's copy has a name of its own ("kernel/replica_1").
    variable = self._trainable_variables[index]
    kernel = variable.name.split(":")[0].endswith("kernel")
    return kernel and self._use_weight_decay(variable)

  def _rescale_absent(self, present: list[int], factor):
    """Takes the buffers of variables that sit this step out to its rate: u stays as it is."""
    absent = [b.value for index, b in enumerate(self.momentums) if index not in set(present)]
    if not absent:
      return

    def rescale(strategy, factor):
      for buffer in absent:
        strategy.extended.update(buffer, lambda b, f: b.assign(b * tf.cast(f, b.dtype)), (factor,))

    if tf.distribute.in_cross_replica_context():
      rescale(tf.distribute.get_strategy(), factor)
    else:
      tf.distribute.get_replica_context().merge_call(rescale, (factor,))

  def _update(self, variable, buffer, gradient, decayed: bool, coefficients):
    dtype = variable.dtype
    by = {name: tf.cast(value, dtype) for name, value in coefficients.items()}
    gradient = tf.cast(tf.convert_to_tensor(gradient), dtype)
    if decayed and self.coupled_weight_decay:
      gradient += tf.constant(self.coupled_weight_decay, dtype) * variable
    velocity = by["decay"] * buffer + by["scale"] * gradient
    buffer.assign(velocity)
    update = by["moves_buffer"] * velocity
    if self.nesterov:
      update += by["moves_gradient"] * gradient
    variable.assign_sub(update)

  def get_config(self):
    learning_rate = self._learning_rate
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
      learning_rate = keras.optimizers.schedules.serialize(learning_rate)
    elif isinstance(learning_rate, keras.Variable):
      learning_rate = float(learning_rate.numpy())
    else:  # A callable.
      learning_rate = keras.saving.serialize_keras_object(learning_rate)
    return {
      "learning_rate": learning_rate,
      "momentum": self.momentum,
      "nesterov": self.nesterov,
      "momentum_correction": self.momentum_correction,
      "weight_decay": self.coupled_weight_decay,
      "jit_compile": self.jit_compile,
      "name": self.name,
    }
