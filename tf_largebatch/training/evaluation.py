"""Evaluation: every validation example counts once, on any number of replicas."""

import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.data import input_pipeline
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest
from tf_largebatch.training import step
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.batches import distribute, next_batch


def make_evaluation(
  strategy: tf.distribute.Strategy,
  model: keras.Model,
  recipe: Recipe,
  source,
  batch_size: int,
  bad: BadExamples | None = None,
  stop: StopRequest | None = None,
) -> Callable[[], dict[str, float] | None]:
  """Builds a function that evaluates `model` on every example of `source`.

  Args:
    strategy: in whose scope the model was made.
    model: the network for evaluation.
    recipe: resolved.
    source: of the validation examples.
    batch_size: images per replica and step, at most.
    bad: records the examples that are left out; None: a bad example raises an error.
    stop: a request to stop ends the evaluation.

  Returns:
    A function that returns the means {"loss", "error"}, or None if a task was asked to stop.
  """
  replicas = strategy.num_replicas_in_sync
  batch_size = min(batch_size, -(-source.num_examples // replicas))  # More would be padding.
  steps = input_pipeline.evaluation_steps(source, batch_size, replicas)

  def ids(number):
    """Of all replicas: which of them belong to this task is not known here."""
    first = number * replicas * batch_size
    return range(first, min(first + replicas * batch_size, source.num_examples))

  evaluation_step = step.make_evaluation_step(strategy, model)
  distributed = _distribute_dataset(strategy, recipe, source, batch_size, bad)

  def evaluate() -> dict[str, float] | None:
    batches = iter(distributed)
    sums, previous = np.zeros(4), None
    for number in range(steps):
      split = recipe.validation_split
      batch = next_batch(batches, recipe, split, source, ids(number), bad is not None)
      stop_here = tf.constant(float(stop is not None and stop.signal is not None))
      values = evaluation_step(batch, stop_here)
      if previous is not None:
        *addends, requests = map(float, previous)
        sums += addends
        if requests:
          return None
      previous = values
    loss, errors, count, unreadable = sums + list(map(float, previous[:4]))
    if count + unreadable != source.num_examples:
      raise AssertionError(f"Evaluated {count + unreadable:g} examples of {source.num_examples}.")
    return {"loss": float(loss / count), "error": float(errors / count)}

  return evaluate


def _distribute_dataset(strategy, recipe: Recipe, source, batch_size: int, bad):
  """Distributes the validation batches: to each replica its share of every step's."""
  replicas = strategy.num_replicas_in_sync
  on_bad = None if bad is None else functools.partial(bad.record, recipe.validation_split, source)

  def dataset(context):
    local = replicas // context.num_input_pipelines
    return input_pipeline.evaluation_dataset(
      recipe,
      source,
      batch_size=batch_size,
      first_replica=context.input_pipeline_id * local,
      num_replicas=local,
      replicas=replicas,
      on_bad_example=on_bad,
    )

  return distribute(strategy, dataset)
