"""A task's process: times its step with and without communication, and the all-reduce alone."""

import itertools
import math
import threading
import time
from collections.abc import Callable

from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tools.benchmark import harness
from tools.benchmark.contenders.contender import random_batch
from tools.benchmark.reductions import prepare_reduce
from tools.forecasting.layers import usual_classes

_SCALARS = 4  # The step reduces loss, error, a squared norm and the request to stop.
_EXAMPLES = 1_281_167  # Of an epoch: ImageNet's. It decides the learning rates only.


class Task:
  """What a task can time, compiled; each of `alone`, `steps`, `reduces` does it once."""

  def __init__(self, recipe: Recipe, packs: list[int]):
    """Waits for the other tasks.

    Args:
      recipe: k is the number of tasks.
      packs: values of --bytes_per_pack.
    """
    import tensorflow as tf

    from tf_largebatch.distributed.cluster import read_cluster
    from tf_largebatch.distributed.strategy import make_strategy
    from tf_largebatch.training.passes import Variables

    tf.get_logger().setLevel("ERROR")  # It warns of retracing, which is intended here.
    cluster = read_cluster()
    # A large all-reduce on the slowest links delays heartbeats by more than the usual 10 s.
    strategy = make_strategy(
      cluster, "ring" if cluster.num_tasks > 1 else "auto", heartbeat_timeout_seconds=600.0
    )
    # A replica that is by itself computes the same step of k workers, for one of them, and sends
    # nothing.
    (self.alone,), _ = _make_steps(tf.distribute.get_strategy(), recipe, [0])
    self.steps, model = [self.alone for _ in packs], None
    self.reduces, self.collectives, self.bytes = [], [], 0
    if cluster.num_tasks > 1:
      self.steps, model = _make_steps(strategy, recipe, packs)
      variables = Variables.of(model)
      # In the step's order, so that the packs are the same.
      shapes = [tuple(v.shape) for v in variables.statistics] + [()] * _SCALARS
      shapes += [tuple(v.shape) for v in variables.weights]
      self.bytes = 4 * sum(math.prod(shape) for shape in shapes)
      prepared = [prepare_reduce(strategy, shapes, [], pack) for pack in packs]
      self.reduces, self.collectives = zip(*prepared, strict=True)


def _make_steps(strategy, recipe: Recipe, packs: list[int]) -> tuple[list[Callable], object]:
  """Builds a step for each size of packs, called without arguments, and their model."""
  import tensorflow as tf

  from tf_largebatch.models.networks import build_model
  from tf_largebatch.optim.optimizers import build_optimizer
  from tf_largebatch.training import step

  with strategy.scope():
    model = build_model(recipe, usual_classes(recipe.network))
    optimizer = build_optimizer(recipe, _EXAMPLES, jit_compile=False)
    optimizer.build(model.trainable_variables)
  batch = [tf.constant(x[None]) for x in random_batch(recipe, recipe.per_worker_batch_size)]
  if strategy.num_replicas_in_sync > 1:
    make = strategy.experimental_distribute_values_from_function
    batch = [make(lambda _, x=x: x) for x in batch]
  batch, stop = tuple(batch), tf.constant(0.0)

  def make_step(pack: int) -> Callable:
    options = RunOptions(workers_per_pass=1, jit_compile=False, bytes_per_pack=pack)
    train_step = step.make_train_step(strategy, model, optimizer, recipe, options)
    return lambda: float(train_step(batch, stop)["loss"])

  return [make_step(pack) for pack in packs], model


def serve():
  """The process' program.

  The first message is {"recipe": its fields, "packs": values of --bytes_per_pack}. The first report
  says what is reduced: {"bytes", "collectives": by pack}. Each further message is one of
    {"step": index of the packs, "untimed": calls, "timed": calls}, {"reduce": …} alike,
    {"alone": True, …} alike: the task goes on with such steps until {"stop": True}.
  Each is answered with {"seconds": of each timed call}; "stop" with {}.
  """
  from tf_largebatch import train  # Not at the top: it defines the trainer's flags.

  messages = harness.messages()
  first = next(messages)
  recipe = Recipe(**first["recipe"])
  train.set_environment(recipe)
  try:
    task = Task(recipe, first["packs"])
  except UserError as error:
    harness.report({"error": summary(error)})
    return
  for call in (task.alone, *task.steps):  # Compiles them.
    call()
  harness.report({"bytes": task.bytes, "collectives": task.collectives})
  for message in messages:
    if "alone" in message:
      _compute_until_stopped(task.alone, message, messages)
    else:
      name, calls = ("step", task.steps) if "step" in message else ("reduce", task.reduces)
      call = calls[message[name]]
      _time(call, message["untimed"])
      harness.report({"seconds": _time(call, message["timed"])})


def _time(call: Callable, count: int) -> list[float]:
  """The seconds of each of so many calls."""
  times = [time.monotonic()]
  for _ in range(count):
    call()
    times.append(time.monotonic())
  return [after - before for before, after in itertools.pairwise(times)]


def _compute_until_stopped(call: Callable, message: dict, messages):
  """Reports the seconds of the timed calls, and keeps the cores busy until the next message."""
  stopped = threading.Event()

  def compute():
    _time(call, message["untimed"])
    harness.report({"seconds": _time(call, message["timed"])})
    while not stopped.is_set():
      call()

  thread = threading.Thread(target=compute)
  thread.start()
  next(messages)
  stopped.set()
  thread.join()
  harness.report({})
