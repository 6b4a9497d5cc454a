"""Batch normalisation over each worker's own n images."""

import numbers

import keras
import tensorflow as tf

_FUSED_DTYPES = (tf.float32, tf.bfloat16, tf.float16)


@keras.saving.register_keras_serializable(package="tf_largebatch")
class PerWorkerBatchNormalization(keras.layers.Layer):
  """Batch normalisation whose statistics never cross a worker (§2.3).

  In training, a batch of g·n images is normalised as g groups of n consecutive images:

      y = γ · (x − μ_j) / sqrt(σ²_j + ε) + β,   μ_j, σ²_j over the images and positions of group j.

  n is a hyper-parameter of the loss: a batch of 256 images on one device is still 8 workers of 32
  images, as in the paper. The moving averages used for inference follow the mean over the groups,

      moving ← momentum · moving + (1 − momentum) · mean_j(statistic_j),

  of the mean and the unbiased variance, as in Caffe2 (which the paper used) and PyTorch; Keras
  takes the biased variance. The replicas of a `tf.distribute` strategy average them, so all copies
  stay equal; the copies of Keras' own layer drift apart. For float32, bfloat16 and float16 all this
  is one fused kernel (`FusedBatchNormV3`, statistics in float32); other dtypes use separate
  operations.

  Source: Goyal et al. 2017 (arXiv 1706.02677), §2.3; Ioffe and Szegedy 2015.

  Args:
    per_worker_batch_size: n, images that are normalised together. None: the whole (local) batch.
    momentum: of the moving averages; 0.9 as in the paper, where Keras has 0.99.
    epsilon: ε, added to the variance.
    center, scale: whether there are β and γ; without them, β = 0 and γ = 1.
    gamma_initializer: initialiser of γ. In the paper, the last γ of a residual block starts at 0.
    beta_initializer: initialiser of β.
    name, trainable, dtype: as in `keras.layers.Layer`. As in Keras' own layer, a layer that is not
      trainable normalises by its moving averages.

  Input: `[batch, …, channels]` (NHWC, or any rank from 2). Output: the same shape, in the compute
    dtype.

  Raises:
    ValueError: an argument is out of range, the number of channels is unknown, a mask is given, or,
      in training, the batch is not a multiple of n (`tf.errors.InvalidArgumentError` if the batch
      size is known only when the graph runs).
  """

  def __init__(
    self,
    per_worker_batch_size=None,
    momentum=0.9,
    epsilon=1e-5,
    gamma_initializer="ones",
    beta_initializer="zeros",
    name=None,
    trainable=True,
    dtype=None,
    center=True,
    scale=True,
  ):
    super().__init__(name=name, trainable=trainable, dtype=dtype)
    if per_worker_batch_size is not None and (
      not isinstance(per_worker_batch_size, numbers.Integral) or per_worker_batch_size < 1
    ):
      raise ValueError(
        f"per_worker_batch_size must be a positive integer or None, not {per_worker_batch_size}."
      )
    if not 0 <= momentum < 1:
      raise ValueError(f"momentum must lie in [0, 1), not {momentum}.")
    if not epsilon > 0:
      raise ValueError(f"epsilon must be above 0, not {epsilon}.")
    self.per_worker_batch_size = per_worker_batch_size
    self.momentum = momentum
    self.epsilon = epsilon
    self.center = center
    self.scale = scale
    self.gamma_initializer = keras.initializers.get(gamma_initializer)
    self.beta_initializer = keras.initializers.get(beta_initializer)

  def build(self, input_shape):
    channels = input_shape[-1]
    if len(input_shape) < 2 or channels is None:
      raise ValueError(
        f"The input must be [batch, …, channels] with channels known, not {input_shape}."
      )
    # The parameters stay in the variable dtype (autocast=False), because the fused kernel takes
    # float32 scales and statistics for images of any dtype.
    weights = {"shape": (channels,), "autocast": False}
    self.gamma = self.beta = None
    if self.scale:
      self.gamma = self.add_weight(name="gamma", initializer=self.gamma_initializer, **weights)
    if self.center:
      self.beta = self.add_weight(name="beta", initializer=self.beta_initializer, **weights)
    statistics = {**weights, "trainable": False, "aggregation": "mean"}
    self.moving_mean = self.add_weight(name="moving_mean", initializer="zeros", **statistics)
    self.moving_variance = self.add_weight(name="moving_variance", initializer="ones", **statistics)

  def call(self, inputs, training=False, mask=None):
    self._refuse(mask)
    inputs = tf.cast(inputs, self.compute_dtype)  # Keras casts floats only.
    if not (training and self.trainable):
      return self._normalize(inputs, self.moving_mean, self.moving_variance)
    groups = self._groups(inputs)
    # [g·n, …, C] → [n, positions, 1, g·C]: each group gets its own channels, so that the fused
    # kernel normalises per group and channel. A single group needs no transposition.
    one = isinstance(groups, int) and groups == 1
    channels = inputs.shape[-1]
    if one and inputs.shape.rank == 4:
      grouped = inputs
    else:
      batch = tf.shape(inputs)[0]
      positions = tf.size(inputs) // (batch * channels)
      # n rather than batch // groups: XLA drops the assertion in _groups, and then this reshape
      # catches a batch that is not a multiple of n.
      n = self.per_worker_batch_size or batch
      grouped = tf.reshape(inputs, [groups, n, positions, channels])
      grouped = tf.transpose(grouped, [1, 2, 0, 3])
      grouped = tf.reshape(grouped, [n, positions, 1, groups * channels])
    scale, offset = (tf.tile(values, [groups]) for values in self._scale_and_offset())
    outputs, mean, variance = self._normalize_batch(grouped, scale, offset)
    mean = tf.reduce_mean(tf.reshape(mean, [groups, channels]), axis=0)
    variance = tf.reduce_mean(tf.reshape(variance, [groups, channels]), axis=0)
    for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
      statistic = tf.cast(statistic, moving.dtype)
      moving.assign(moving * self.momentum + statistic * (1 - self.momentum))
    if grouped is not inputs:
      outputs = tf.reshape(outputs, [n, positions, groups, channels])
      outputs = tf.reshape(tf.transpose(outputs, [2, 0, 1, 3]), tf.shape(inputs))
      outputs.set_shape(inputs.shape)
    return outputs

  def _refuse(self, mask):
    if mask is not None:
      raise ValueError(
        f"{self.name} takes no mask: what it hides would enter the statistics of the group."
      )

  def _scale_and_offset(self):
    """Returns (γ, β), `[channels]`; 1 and 0 where there are none."""
    scale, offset = self.gamma, self.beta
    return (
      tf.ones_like(self.moving_mean) if scale is None else tf.convert_to_tensor(scale),
      tf.zeros_like(self.moving_mean) if offset is None else tf.convert_to_tensor(offset),
    )

  def _groups(self, inputs):
    """Returns g: an int if the batch size is known while tracing, else a checked tensor."""
    n = self.per_worker_batch_size
    batch = inputs.shape[0]
    if n is None:
      return 1
    if batch is not None:
      if batch % n:
        raise ValueError(
          f"{self.name}: a batch of {batch} images cannot be split into groups of "
          f"per_worker_batch_size={n}; use a multiple of {n} (drop the remainder)."
        )
      return batch // n
    batch = tf.shape(inputs)[0]
    message = f"{self.name}: the batch cannot be split into groups of per_worker_batch_size={n}."
    with tf.control_dependencies([tf.debugging.assert_equal(batch % n, 0, message)]):
      return batch // n

  def _normalize_batch(self, x, scale, offset):
    """Normalises x `[n, positions, 1, channels]` by its own statistics.

    Returns:
      (outputs, mean, unbiased variance); the statistics are `[channels]`.
    """
    if x.dtype in _FUSED_DTYPES:
      empty = tf.zeros([0])
      outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.cast(scale, tf.float32),
        offset=tf.cast(offset, tf.float32),
        mean=empty,
        variance=empty,
        epsilon=self.epsilon,
        is_training=True,
      )
      return outputs, mean, variance
    # Not tf.nn.moments: it stops the gradient at the mean, which makes second derivatives wrong.
    mean = tf.reduce_mean(x, axis=[0, 1, 2])
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axis=[0, 1, 2])
    outputs = tf.nn.batch_normalization(x, mean, variance, offset, scale, self.epsilon)
    count = tf.cast(tf.size(x) // tf.size(mean), x.dtype)
    return outputs, mean, variance * count / tf.maximum(count - 1, 1)

  def _normalize(self, inputs, mean, variance):
    """Normalises by the given statistics, `[channels]`."""
    scale, offset = self._scale_and_offset()
    if inputs.dtype not in _FUSED_DTYPES:
      return tf.nn.batch_normalization(inputs, mean, variance, offset, scale, self.epsilon)
    four_d = inputs
    if inputs.shape.rank != 4:
      four_d = tf.reshape(inputs, [tf.shape(inputs)[0], -1, 1, inputs.shape[-1]])
    outputs = tf.raw_ops.FusedBatchNormV3(
      x=four_d,
      scale=tf.cast(scale, tf.float32),
      offset=tf.cast(offset, tf.float32),
      mean=tf.cast(mean, tf.float32),
      variance=tf.cast(variance, tf.float32),
      epsilon=self.epsilon,
      is_training=False,
    ).y
    return outputs if four_d is inputs else tf.reshape(outputs, tf.shape(inputs))

  def compute_output_shape(self, input_shape):
    return input_shape

  def compute_output_spec(self, inputs, training=False, mask=None):
    self._refuse(mask)
    return keras.KerasTensor(inputs.shape, self.compute_dtype)

  def get_config(self):
    return {
      **super().get_config(),
      "per_worker_batch_size": self.per_worker_batch_size,
      "momentum": self.momentum,
      "epsilon": self.epsilon,
      "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
      "beta_initializer": keras.initializers.serialize(self.beta_initializer),
      "center": self.center,
      "scale": self.scale,
    }
