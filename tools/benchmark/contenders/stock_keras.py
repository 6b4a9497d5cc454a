"""Stock Keras as a contender: a plain compiled step, and `Model.fit`."""

import functools

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
  import keras
  import tensorflow as tf

  recipe = Recipe(**contender.recipe)
  model, optimizer = _build(recipe)
  jit = contender.step_options.get("jit_compile")
  model.compile(
    optimizer,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    jit_compile="auto" if jit is None else jit,
  )
  batch = tuple(tf.constant(x) for x in random_batch(recipe, recipe.per_worker_batch_size))
  data = tf.data.Dataset.from_tensors(batch).cache().repeat()

  def run(steps: int) -> float:
    history = model.fit(data, epochs=1, steps_per_epoch=steps * recipe.workers, verbose=0)
    return history.history["loss"][-1]

  return Runner(run, recipe.workers)
