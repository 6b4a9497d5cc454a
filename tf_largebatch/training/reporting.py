"""What the log says about a run: its arithmetic before it starts, and a run that learns nothing."""

import math

from absl import logging

from tf_largebatch.recipe import Recipe

REMEDIES = (
  "Use a gradual warmup (--warmup), a longer one (--warmup_epochs), a lower "
  "--reference_learning_rate or a smaller minibatch, in another work_dir."
)


def log_arithmetic(recipe: Recipe, derived: dict, validation_examples: int, cluster: dict) -> None:
  """Logs what the run will do.

  Args:
    recipe: resolved.
    derived: see `Recipe.derived`.
    validation_examples: size of the validation split.
    cluster: see `strategy.describe`.
  """
  for line in (
    f"{recipe.network} on {recipe.dataset}: {derived['train_examples']} training images, "
    f"{validation_examples} validation images, {recipe.image_size}x{recipe.image_size}, "
    f"{recipe.dtype}",
    f"minibatch kn = {recipe.workers} workers x {recipe.per_worker_batch_size} images = "
    f"{recipe.global_batch_size}",
    f"peak rate = {recipe.reference_learning_rate:g} -> {recipe.peak_learning_rate:g} "
    f"({recipe.learning_rate_scaling} scaling from {recipe.reference_batch_size}); warmup: "
    f"{_warmup(recipe)}; {_decays(recipe)}",
    f"steps = {recipe.epochs} epochs x {derived['steps_per_epoch']} = {derived['total_steps']}",
    f"{derived['workers_per_replica']} workers per replica; "
    + ", ".join(f"{name} {value}" for name, value in cluster.items()),
  ):
    logging.info("%s", line)


def _warmup(recipe: Recipe) -> str:
  if recipe.warms_up:
    return f"{recipe.warmup} for {recipe.warmup_epochs:g} epochs"
  if recipe.warmup != "none":
    return f"none (kn is not above {recipe.reference_batch_size})"
  return "none"


def _decays(recipe: Recipe) -> str:
  if recipe.decay != "steps":
    return f"{recipe.decay} decay to 0 at epoch {recipe.epochs}"
  decays = ", ".join(f"{epoch:g}" for epoch in recipe.decay_epochs) or "none"
  late = sum(epoch >= recipe.epochs for epoch in recipe.decay_epochs)
  text = f"x{recipe.decay_factor:g} at epochs {decays}"
  return f"{text} ({late} of them after the end)" if late else text


def warn_of_guessing(num_classes: int, num_examples: int, error: float, epoch: int) -> None:
  """Logs a warning if an evaluation's error is not better than guessing, within its noise.

  Guessing errs on p = 1 - 1/C of the examples, with σ = √(p (1 - p) / N). A rate that is too high
  for the network can leave it there forever, with finite losses.

  Args:
    num_classes: C.
    num_examples: N, examples evaluated.
    error: share of wrong predictions.
    epoch: that has ended.
  """
  guessing = 1 - 1 / num_classes
  chance = 3 * math.sqrt(guessing * (1 - guessing) / num_examples)
  if error >= guessing - chance:
    logging.warning(
      "Epoch %d ends with a validation error of %.2f%%, no better than guessing one of %d classes "
      "(%.2f%%, by chance up to %.2f points less). If later epochs do so too, the run does not "
      "learn. %s",
      epoch,
      100 * error,
      num_classes,
      100 * guessing,
      100 * chance,
      REMEDIES,
    )
