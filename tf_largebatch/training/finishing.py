"""Stage 6 of a run: the exported network and the result, which marks the run as complete."""

import hashlib
import os
import statistics

import keras
from absl import logging

from tf_largebatch import files
from tf_largebatch.errors import UserError, summary
from tf_largebatch.models.networks import build_model
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import environment
from tf_largebatch.training.loop import Loop


def finish(loop: Loop, num_classes: int, is_chief: bool) -> dict:
  """Exports the network and writes the result; only the chief writes.

  Args:
    loop: after its last epoch.
    num_classes: width of the logits.
    is_chief: whether this task is the chief.

  Returns:
    What `result.json` holds.

  Raises:
    UserError: the work directory cannot be written, or the clock is wrong.
  """
  errors = [record["error"] for record in loop.metrics.evaluations]
  images = loop.done * loop.recipe.global_batch_size
  result = {
    "status": "complete",
    "steps": loop.done,
    "val_error": errors[-1] if errors else None,  # None if metrics.jsonl was lost.
    "val_error_median_last_5": statistics.median(errors[-5:]) if errors else None,
    "images_per_second": images / loop.seconds if loop.seconds else None,
    "seconds": loop.seconds,
    "weights_sha256": weights_sha256(loop.networks.model),
  }
  logging.info("weights_sha256 %s", result["weights_sha256"])
  if is_chief:
    environment.require_clock()
    work_dir = loop.options.work_dir
    loop.checkpoints.wait()
    try:
      path = os.path.join(work_dir, "model.keras")
      export(loop.networks.model, loop.recipe, num_classes, path)
      files.write_json(os.path.join(work_dir, "result.json"), result)
    except files.FAILURES as error:
      raise UserError(
        f"All {loop.done} steps are done, but work_dir={work_dir} cannot be written "
        f"({summary(error)}); free space there or make it writable, then run the same "
        "command again."
      ) from error
  return result


def weights_sha256(model: keras.Model) -> str:
  """SHA-256 over all weights in `model.weights` order as float32 little-endian bytes."""
  digest = hashlib.sha256()
  for weight in model.weights:
    digest.update(weight.numpy().astype("<f4").tobytes())
  return digest.hexdigest()


def export(model: keras.Model, recipe: Recipe, num_classes: int, path: str) -> None:
  """Saves the trained network as plain Keras layers, built outside the strategy's scope.

  Args:
    model: trained.
    recipe: resolved.
    num_classes: width of the logits.
    path: ends in .keras.
  """
  plain = build_model(recipe, num_classes, "export")
  plain.set_weights(model.get_weights())
  partial = path.removesuffix(".keras") + ".partial.keras"  # Keras requires the ending.
  with files.completing(partial, path):
    plain.save(partial)
