"""SGD whose momentum stays correct while the learning rate changes."""

import keras
import tensorflow as tf

# Arguments of Keras' optimizers that are passed on to the base class.
_KERAS_ARGUMENTS = (
  *("clipnorm", "clipvalue", "global_clipnorm"),
  *("use_ema", "ema_momentum", "ema_overwrite_frequency", "loss_scale_factor"),
)


@keras.saving.register_keras_serializable(package="tf_largebatch")
class MomentumCorrectedSGD(keras.optimizers.Optimizer):
  """The paper's SGD: momentum correction (remark 2) and coupled weight decay (remark 1).

  With g the gradient of the loss, plus λ·w for decayed weights, each step is

      v ← m · (η_{t+1} / η_t) · v + η_{t+1} · g   (eq. 10 with the correction)
      w ← w − v                                   (Nesterov: w ← w − (m · v + η_{t+1} · g))

  With v = η · u this is eq. 9, u ← m · u + g, w ← w − η_{t+1} · u, for any sequence of rates,
  whether from a schedule or assigned to `learning_rate`. `keras.optimizers.SGD` is eq. 10 without
  the correction: its accumulated momentum is too small after the rate rises and too large after it
  falls. A rate of 0 leaves the weights unchanged while u keeps accumulating as in eq. 9; the buffer
  is then scaled by the last rate other than 0.

  Weight decay adds the gradient of λ/2‖w‖² once per minibatch, to variables whose name ends in
  "kernel" (convolutions and dense layers), never to γ, β or biases. `exclude_from_weight_decay`
  excludes more variables; Keras does not save the exclusions, so call it again after loading. In
  Keras, by contrast, `weight_decay` is decoupled (it bypasses the momentum), and the gradient of
  its L2(λ) is 2λw.

  Source: Goyal et al. 2017 (arXiv 1706.02677), §3, eqs. 8 to 10; Sutskever et al. 2013 (Nesterov).

  Args:
    learning_rate: η, a float, a `LearningRateSchedule` or a callable.
    momentum: m, in [0, 1).
    nesterov: use Nesterov momentum.
    momentum_correction: False leaves out the factor η_{t+1} / η_t, as an ablation.
    weight_decay: λ, at least 0.
    jit_compile: compile the update with XLA, which fuses the operations of each variable into one
      kernel. Takes effect in cross-replica context only, with gradients summed over the replicas.
    name: name of the optimizer.
    clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency,
      loss_scale_factor: as in `keras.optimizers.SGD`. Gradients are clipped before weight decay is
      added.
    gradient_accumulation_steps: refused, because the momentum is corrected at each step; use larger
      batches instead.

  The momentum buffers, one per variable and of its shape, and the rate that they are scaled by are
  part of the optimizer's saved state.

  Raises:
    ValueError: an argument is out of range or refused.
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
    clipnorm=None,
    clipvalue=None,
    global_clipnorm=None,
    use_ema=False,
    ema_momentum=0.99,
    ema_overwrite_frequency=None,
    loss_scale_factor=None,
    gradient_accumulation_steps=None,
  ):
    if gradient_accumulation_steps is not None:
      raise ValueError(
        "MomentumCorrectedSGD does not accumulate gradients over calls "
        f"(gradient_accumulation_steps={gradient_accumulation_steps}): it corrects the momentum at "
        "each step; use larger batches."
      )
    # The base class' own weight_decay, which is decoupled, stays None.
    super().__init__(
      learning_rate=learning_rate,
      name=name,
      clipnorm=clipnorm,
      clipvalue=clipvalue,
      global_clipnorm=global_clipnorm,
      use_ema=use_ema,
      ema_momentum=ema_momentum,
      ema_overwrite_frequency=ema_overwrite_frequency,
      loss_scale_factor=loss_scale_factor,
    )
    if not 0 <= momentum < 1:
      raise ValueError(f"momentum must lie in [0, 1), not {momentum}.")
    if not weight_decay >= 0:
      raise ValueError(f"weight_decay must be at least 0, not {weight_decay}.")
    self.momentum = momentum
    self.nesterov = nesterov
    self.momentum_correction = momentum_correction
    self.coupled_weight_decay = weight_decay
    self.jit_compile = jit_compile

  @property
  def learning_rate(self):
    """η_{t+1}, the rate of the next step; in float64 if the schedule has a method `exact`."""
    exact = getattr(self._learning_rate, "exact", None)
    return super().learning_rate if exact is None else exact(self.iterations)

  @learning_rate.setter
  def learning_rate(self, learning_rate):
    keras.optimizers.Optimizer.learning_rate.fset(self, learning_rate)

  def build(self, variables):
    if self.built:
      return
    super().build(variables)
    self.momentums = self.add_optimizer_variables(variables, "momentum")
    # η in v = η · u; 0 before the first step.
    self.buffer_learning_rate = self.add_variable(
      shape=(),
      dtype="float64" if any(v.dtype == "float64" for v in variables) else "float32",
      aggregation="only_first_replica",
      name="buffer_learning_rate",
    )

  def apply(self, grads, trainable_variables=None):
    # Read first: super().apply() increments the step, and with it the schedule's rate.
    learning_rate = self.learning_rate
    super().apply(grads, trainable_variables)
    if len(grads) > 0:
      scale, _ = self._buffer_scale(learning_rate, self.buffer_learning_rate.dtype)
      self.buffer_learning_rate.assign(scale)

  def momentum_correction_factor(self):
    """Returns η_{t+1} / η_t for the next step; 1 before the first step or without correction."""
    if not (self.built and self.momentum_correction):
      return tf.ones([], keras.config.floatx())
    return self._buffer_scale(self.learning_rate, self.buffer_learning_rate.dtype)[1]

  def _buffer_scale(self, learning_rate, dtype):
    """Returns (η that this step scales the buffers by, factor that rescales the old buffers)."""
    learning_rate = tf.cast(learning_rate, dtype)
    last = tf.cast(self.buffer_learning_rate, dtype)
    known = last != 0
    # v = 0 · u would lose u: at a rate of 0 keep the last scale (1 if there was none yet).
    scale = tf.where(learning_rate != 0, learning_rate, tf.where(known, last, tf.ones_like(last)))
    # The inner tf.where avoids 0 / 0, which must not occur even in the branch that is not taken.
    factor = tf.where(known, scale / tf.where(known, last, tf.ones_like(last)), 1)
    return scale, factor

  def _backend_update_step(self, grads, trainable_variables, learning_rate):
    # The coefficients depend on the rate only, so they are computed once for all variables.
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
      # In a replica, as in `fit`, these are its own gradients; Keras sums them over the replicas.
      super()._backend_update_step(grads, trainable_variables, coefficients)
      return
    # In cross-replica context the caller has already summed them; just update each copy.
    weights = [getattr(variable, "value", variable) for variable in trainable_variables]
    buffers = [self.momentums[index].value for index in indices]
    decayed = [self._is_decayed(index) for index in indices]

    def update_all(_, weights, buffers, gradients, coefficients):
      for variables in zip(weights, buffers, gradients, decayed, strict=True):
        self._update(*variables, coefficients)

    if self.jit_compile:
      update_all = tf.function(update_all, jit_compile=True, autograph=False)
    # One call per device for all variables; weights[0] only selects the devices.
    tf.distribute.get_strategy().extended.update(
      weights[0], update_all, args=(weights, buffers, list(grads), coefficients), group=False
    )

  def update_step(self, gradient, variable, learning_rate):
    """Updates one variable; `learning_rate` holds `_backend_update_step`'s coefficients."""
    index = self._get_variable_index(variable)
    buffer = self.momentums[index].value
    self._update(variable, buffer, gradient, self._is_decayed(index), learning_rate)

  def _is_decayed(self, index: int) -> bool:
    # By index, because a replica's copy has a different name ("kernel/replica_1").
    variable = self._trainable_variables[index]
    kernel = variable.name.split(":")[0].endswith("kernel")
    return kernel and self._use_weight_decay(variable)

  def _rescale_absent(self, present: list[int], factor):
    """Rescales the buffers of variables without a gradient in this step, so that u is unchanged."""
    # Variables that are overwritten with their gradients (FP8 scales) have no buffer.
    absent = [
      buffer.value
      for index, buffer in enumerate(self.momentums)
      if buffer is not None and index not in set(present)
    ]
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
    if decayed:
      gradient = self._decay(gradient, variable)
    velocity = by["decay"] * buffer + by["scale"] * gradient
    buffer.assign(velocity)
    update = by["moves_buffer"] * velocity
    if self.nesterov:
      update += by["moves_gradient"] * gradient
    variable.assign_sub(update)

  def _decay(self, gradient, variable):
    """Adds the gradient of the weight decay to that of a decayed variable."""
    if not self.coupled_weight_decay:
      return gradient
    return gradient + tf.constant(self.coupled_weight_decay, gradient.dtype) * variable

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
      **{name: getattr(self, name) for name in _KERAS_ARGUMENTS},
    }
