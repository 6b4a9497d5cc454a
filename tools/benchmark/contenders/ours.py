"""This package as a contender: its compiled step, the trainer's loop around it, its evaluation."""

import itertools
import tempfile
import time

from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tools.benchmark.contenders.contender import Contender, Runner, random_batch
from tools.forecasting.layers import usual_classes


def make_ours(contender: Contender, cluster) -> Runner:
  import tensorflow as tf

  from tf_largebatch.distributed.strategy import make_strategy
  from tf_largebatch.models.networks import build_model
  from tf_largebatch.optim.loss_scale import LossScale
  from tf_largebatch.optim.optimizers import build_optimizer
  from tf_largebatch.training import step
  from tf_largebatch.training.workers_per_pass import with_workers_per_pass

  strategy = make_strategy(cluster)
  recipe, options = Recipe(**contender.recipe), RunOptions(**contender.step_options)
  replicas = strategy.num_replicas_in_sync
  with strategy.scope():
    model = build_model(recipe, usual_classes(recipe.network))
    optimizer = build_optimizer(recipe, 1_281_167, step.uses_xla(options))
    optimizer.build(model.trainable_variables)
    loss_scale = LossScale() if recipe.dtype == "float16" else None
  options = with_workers_per_pass(options, strategy, model, recipe)
  train_step = step.make_train_step(strategy, model, optimizer, recipe, options, loss_scale)
  batch = _distribute_batch(strategy, recipe)
  stop = tf.constant(0.0)  # A tensor, as in the trainer: a number would be traced once more.

  def run_bare(steps: int) -> float:
    return [float(train_step(batch, stop)["loss"]) for _ in range(steps)][-1]

  passes = recipe.workers // replicas // options.workers_per_pass
  if contender.kind == "loop":
    return _make_loop(model, optimizer, recipe, train_step, batch, Runner(run_bare, passes))
  return Runner(run_bare, passes)


def make_evaluation(contender: Contender, cluster) -> Runner:
  """Builds the evaluation of the kn images; one call of the compiled function is a step."""
  import tensorflow as tf

  from tf_largebatch.distributed.strategy import make_strategy
  from tf_largebatch.models.networks import build_model
  from tf_largebatch.training.step import make_evaluation_step

  strategy = make_strategy(cluster)
  recipe = Recipe(**contender.recipe)
  purpose = "training" if recipe.evaluation_dtype == "training" else "evaluation"
  with strategy.scope():
    model = build_model(recipe, usual_classes(recipe.network), purpose)
  evaluation_step = make_evaluation_step(strategy, model)
  images, labels = random_batch(recipe, recipe.global_batch_size)
  batch = tuple(map(tf.constant, (images, labels, [1.0] * len(labels))))
  stop = tf.constant(0.0)
  return Runner(
    lambda steps: [float(evaluation_step(batch, stop)[0]) for _ in range(steps)][-1], passes=1
  )


def _distribute_batch(strategy, recipe: Recipe):
  """The same random batch on every replica, `[workers of the replica, n, H, W, C]`."""
  import tensorflow as tf

  replicas = strategy.num_replicas_in_sync
  images, labels = random_batch(recipe, recipe.global_batch_size // replicas)
  shape = (recipe.workers // replicas, recipe.per_worker_batch_size)
  batch = (images.reshape(*shape, *images.shape[1:]), labels.reshape(shape))
  if replicas == 1:
    return tuple(tf.constant(x) for x in batch)
  return tuple(
    strategy.experimental_distribute_values_from_function(lambda _, x=x: tf.constant(x))
    for x in batch
  )


def _make_loop(model, optimizer, recipe: Recipe, train_step, batch, bare: Runner) -> Runner:
  """The trainer's loop around a step that is also timed by itself."""
  from tf_largebatch.signals import StopRequest
  from tf_largebatch.training.checkpoint import Checkpoints
  from tf_largebatch.training.loop import Loop
  from tf_largebatch.training.metrics import MetricsWriter
  from tf_largebatch.training.noise_scale import NoiseScale

  within = 0.0

  def timed_step(*arguments):
    nonlocal within
    began = time.perf_counter()
    scalars = train_step(*arguments)
    within += time.perf_counter() - began
    return scalars

  work_dir = tempfile.mkdtemp()  # The benchmark removes the directory that holds it.
  loop = Loop(
    recipe=recipe,
    options=RunOptions(checkpoint_every_minutes=0),
    steps_per_epoch=1000,
    train_step=timed_step,
    batches=itertools.repeat(batch),
    evaluate=None,
    check_error=None,
    networks=None,
    checkpoints=Checkpoints(work_dir, model, optimizer),
    metrics=MetricsWriter(work_dir, recipe.to_dict(), 0, 10**6),
    bad=None,
    stop=StopRequest(),
    noise=NoiseScale(recipe),
    alone=True,
  )

  def run(steps: int) -> float:
    nonlocal within
    within = 0.0
    loop.train_to(loop.done + steps)
    return float(loop.done)

  return Runner(run, bare.passes, run_bare=bare.run, seconds_in_steps=lambda: within)
