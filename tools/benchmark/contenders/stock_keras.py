"""Stock Keras as a contender: a plain compiled step, and `Model.fit`."""

import functools
import queue
import threading

from tf_largebatch.recipe import Recipe
from tools.benchmark.contenders.contender import Contender, Runner, random_batch
from tools.forecasting.layers import usual_classes


def _build(recipe: Recipe):
  """The model, of stock layers, and its optimizer."""
  import keras

  from tf_largebatch.models import resnet

  policy = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
  normalization = functools.partial(
    keras.layers.BatchNormalization,
    momentum=recipe.batch_norm_momentum,
    epsilon=recipe.batch_norm_epsilon,
  )
  model = resnet.build(
    recipe.network,
    resnet.Layers(normalization, dtype=policy[recipe.dtype]),
    input_shape=(recipe.image_size, recipe.image_size, len(recipe.channel_mean)),
    num_classes=usual_classes(recipe.network),
    channel_mean=recipe.channel_mean,
    channel_std=recipe.channel_std,
  )
  return model, keras.optimizers.SGD(0.1, momentum=recipe.momentum, nesterov=recipe.nesterov)


def make_keras(contender: Contender, cluster) -> Runner:
  import keras
  import tensorflow as tf

  recipe = Recipe(**contender.recipe)
  model, optimizer = _build(recipe)
  images, labels = (tf.constant(x) for x in random_batch(recipe, recipe.per_worker_batch_size))
  crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

  def gradients():
    with tf.GradientTape() as tape:
      loss = crossentropy(labels, model(images, training=True))
    return loss, tape.gradient(loss, model.trainable_variables)

  @tf.function(jit_compile=contender.step_options.get("jit_compile") or False)
  def step():
    loss, total = gradients()
    for _ in range(recipe.workers - 1):
      loss, more = gradients()
      total = [a + b for a, b in zip(total, more, strict=True)]
    optimizer.apply([gradient / recipe.workers for gradient in total], model.trainable_variables)
    return loss

  return Runner(lambda steps: [float(step()) for _ in range(steps)][-1], recipe.workers)


def make_fit(contender: Contender, cluster) -> Runner:
  """Keras' `fit`, or this package's, on the same model."""
  import keras
  import tensorflow as tf

  from tf_largebatch import fit
  from tf_largebatch.models.networks import build_model
  from tf_largebatch.optim.optimizers import build_optimizer

  recipe = Recipe(**contender.recipe)
  if contender.is_ours:
    model = build_model(recipe, usual_classes(recipe.network))
    optimizer = build_optimizer(recipe, 1_281_167)
  else:
    model, optimizer = _build(recipe)
  jit = contender.step_options.get("jit_compile")
  model.compile(
    optimizer,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    jit_compile="auto" if jit is None else jit,
  )
  n, k = recipe.per_worker_batch_size, recipe.workers
  ours = contender.kind == "our_fit"
  batch = tuple(tf.constant(x) for x in random_batch(recipe, n * k if ours else n))
  data = tf.data.Dataset.from_tensors(batch).cache().repeat()
  allowed, losses = queue.SimpleQueue(), queue.SimpleQueue()

  class Gate(keras.callbacks.Callback):
    """Takes a step when `run` allows it: a new call of `fit` would be timed with its start."""

    def on_train_batch_begin(self, batch, logs=None):
      allowed.get()

    def on_train_batch_end(self, batch, logs=None):
      losses.put(logs["loss"])

  def train():
    options = {"steps_per_epoch": 10**9, "verbose": 0, "callbacks": [Gate()]}
    try:
      if ours:
        fit(model, data, workers=k, per_worker_batch_size=n, **options)
      else:
        model.fit(data, **options)
    except Exception as error:
      losses.put(error)

  def run(steps: int) -> float:
    steps = steps if ours else steps * k
    for _ in range(steps):
      allowed.put(None)
    for loss in [losses.get() for _ in range(steps)]:
      if isinstance(loss, Exception):
        raise loss
    return loss

  threading.Thread(target=train, daemon=True).start()
  return Runner(run, k)
