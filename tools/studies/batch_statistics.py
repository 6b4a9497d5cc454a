"""The validation error of a run's final weights with three kinds of batch statistics.

The statistics of a pass in training come from the layers themselves: with a momentum of 0, the
moving averages of `PerWorkerBatchNormalization` become the mean over the minibatches of the pass.

Source: Wu and Johnson 2021 (arXiv 2105.07576), §3.
"""

import os
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.data import input_pipeline, preparation, sources
from tf_largebatch.errors import UserError, summary
from tf_largebatch.foreign_settings import keras_defaults
from tf_largebatch.models.networks import build_model
from tf_largebatch.models.normalization import PerWorkerBatchNormalization
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import passes, step, work_directory
from tf_largebatch.training.batches import next_batch
from tf_largebatch.training.evaluation import make_evaluation
from tf_largebatch.training.finishing import weights_sha256
from tf_largebatch.training.resolution import resolve

# Images in a pass, about: enough to keep a device busy, and their activations fit in memory.
_IMAGES_PER_PASS = 256
# Images of which one may count differently than in the run: on another device, or with another
# number of images in a pass, floats round differently.
_IMAGES_PER_FLIP = 2000


@keras_defaults()
def measure(work_dir: str, recipe: Recipe, result: dict, data_dir: str, images: int) -> dict:
  """Evaluates the final weights of a complete run on its validation split.

  Args:
    work_dir: of the run.
    recipe, result: of the run.
    data_dir: TensorFlow Datasets' data directory.
    images: how many training images the recomputed statistics come from, at most.

  Returns:
    "running", "recomputed" and "minibatch", each with the error (a fraction) and the number of
    validation images that were counted; "recomputed" also with the number of training images.

  Raises:
    UserError: the run, its network or its data cannot be used.
  """
  tf.config.experimental.enable_tensor_float_32_execution(False)  # As in training.
  recipe, training, validation = _open(work_dir, recipe, data_dir)
  count = _whole_minibatches(recipe, recipe.train_split, training, images)
  validation_count = _whole_minibatches(recipe, recipe.validation_split, validation)
  model = build_model(recipe, training.num_classes, "evaluation")
  layers = _normalizations(work_dir, model)
  _load(model, work_dir, recipe, training.num_classes, result["weights_sha256"])
  evaluate = make_evaluation(
    tf.distribute.get_strategy(), model, recipe, validation, _IMAGES_PER_PASS
  )
  running = evaluate()["error"]
  _require_agreement(work_dir, running, result["val_error"], validation.num_examples)
  variables, training_pass = _make_training_pass(model, layers)

  chunks = _chunks(recipe, recipe.validation_split, validation, validation_count)
  wrong = sum(float(training_pass(*batch)[1]) for batch, _ in chunks)
  counted = validation_count * recipe.per_worker_batch_size
  minibatch = {"error": wrong / counted, "images": counted}

  # Last, because it overwrites the moving averages.
  chunks = _chunks(recipe, recipe.train_split, training, count)
  _assign_means(variables, ((training_pass(*batch)[0], weight) for batch, weight in chunks))
  return {
    "running": {"error": running, "images": validation.num_examples},
    "recomputed": {
      "error": evaluate()["error"],
      "images": validation.num_examples,
      "training_images": count * recipe.per_worker_batch_size,
    },
    "minibatch": minibatch,
  }


def _open(work_dir: str, recipe: Recipe, data_dir: str) -> tuple:
  """Returns the resolved recipe, and the sources of the training and the validation examples.

  Raises:
    UserError: the data are missing, or are not those of the run.
  """
  if recipe.dataset not in sources.GENERATED:
    preparation.prepare(recipe.dataset, data_dir)
  recipe = resolve(recipe, 1, data_dir)
  splits = (recipe.train_split, recipe.validation_split)
  data = sources.identify(recipe.dataset, *splits, data_dir)
  work_directory.find_run(work_dir, recipe, data)
  training, validation = (
    sources.open_source(recipe.dataset, split, data_dir, recipe.image_size) for split in splits
  )
  now = {"train": training.fingerprint, "validation": validation.fingerprint}
  stored = work_directory.stored_fingerprints(work_dir, data)
  advice = "give the data_dir that it began with"
  work_directory.require_same_examples(work_dir, stored, now, advice)
  return recipe, training, validation


def _whole_minibatches(recipe: Recipe, split: str, source, images: int | None = None) -> int:
  """The whole minibatches of n in the first images of a source, or in all of them."""
  available = min(images or source.num_examples, source.num_examples)
  count = available // recipe.per_worker_batch_size
  if not count:
    raise UserError(
      f"A minibatch of per_worker_batch_size={recipe.per_worker_batch_size} images is more than "
      f"the {available} of {recipe.dataset} {split}; use more images, or leave that run out."
    )
  return count


def _normalizations(work_dir: str, model: keras.Model) -> list[PerWorkerBatchNormalization]:
  """Returns the layers that normalise by the statistics of a minibatch in training.

  Raises:
    UserError: there are none, or the network draws random numbers in training.
  """
  layers = [
    layer
    for layer in model._flatten_layers()
    if isinstance(layer, PerWorkerBatchNormalization) and layer.trainable
  ]
  if not layers:
    raise UserError(f"{work_dir}: its network has no batch normalisation; leave that run out.")
  if any(passes.is_seed(variable) for variable in model.variables):
    raise UserError(
      f"{work_dir}: its network draws random numbers in training, such as a dropout's, which would "
      "change the errors; leave that run out."
    )
  return layers


def _load(model: keras.Model, work_dir: str, recipe: Recipe, num_classes: int, sha256: str):
  """Gives the network the final weights of the run.

  Raises:
    UserError: model.keras cannot be read, or does not hold the weights of the result.
  """
  path = os.path.join(work_dir, "model.keras")
  exported = build_model(recipe, num_classes, "export")
  try:
    exported.load_weights(path)
  except Exception as error:  # Of a dozen types, by where the file is damaged.
    raise UserError(f"{path} cannot be read ({summary(error)}); leave that run out.") from error
  model.set_weights(exported.get_weights())
  if weights_sha256(model) != sha256:
    raise UserError(
      f"{path} does not hold the weights whose SHA-256 is in result.json; leave that run out."
    )


def _require_agreement(work_dir: str, error: float, reported: float, images: int):
  """Raises UserError unless the error is that of the run, up to a few images' rounding."""
  differ = round(abs(error - reported) * images)
  if differ > max(1, images // _IMAGES_PER_FLIP):
    raise UserError(
      f"{work_dir}: the error of model.keras is {error:.4%}, but result.json has {reported:.4%}, "
      f"{differ} of {images} images more or less; the data or the network are not those of the "
      "run; leave it out."
    )


def _make_training_pass(
  model: keras.Model, layers: list[PerWorkerBatchNormalization]
) -> tuple[list[keras.Variable], Callable]:
  """Builds a pass in training, which changes no variable.

  Returns:
    (moving averages of the layers, function of images and labels that returns the means over the
    minibatches of the layers' statistics, in the same order, and the number of wrong images).
  """
  for layer in layers:
    layer.momentum = 0.0
  moving = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
  variables = passes.Variables(model.trainable_variables, moving, [])

  @tf.function
  def training_pass(images, labels):
    logits, statistics, *_ = passes.call(
      variables, variables.values(), 0, lambda: model(images, training=True)
    )
    return statistics, step.error_count(labels, logits)

  return moving, training_pass


def _chunks(recipe: Recipe, split: str, source, minibatches: int) -> Iterator:
  """Yields the first minibatches of a split, several at once, as evaluation prepares images.

  Yields:
    ((images, labels), number of minibatches).
  """
  n = recipe.per_worker_batch_size
  at_once = min(max(1, _IMAGES_PER_PASS // n), minibatches)
  dataset = input_pipeline.evaluation_dataset(
    recipe, source, batch_size=at_once * n, first_replica=0, num_replicas=1, replicas=1
  )
  batches = iter(dataset)
  for first in range(0, minibatches, at_once):
    count = min(at_once, minibatches - first)
    ids = range(first * n, (first + count) * n)
    images, labels, _ = next_batch(batches, recipe, split, source, ids, skips=False)
    # Past the last whole minibatch there are other images or padding.
    yield (images[: len(ids)], labels[: len(ids)]), count


def _assign_means(variables: list[keras.Variable], chunks: Iterator) -> None:
  """Assigns the weighted means of what the chunks of (values, weight) have for each variable."""
  sums, total = [0.0] * len(variables), 0
  for values, weight in chunks:
    sums = [s + weight * v.numpy().astype(np.float64) for s, v in zip(sums, values, strict=True)]
    total += weight
  for variable, value in zip(variables, sums, strict=True):
    variable.assign(value / total)
