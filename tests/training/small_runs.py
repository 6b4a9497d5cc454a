"""Runs of a small real network that take seconds."""

from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import trainer
from tf_largebatch.training.metrics import MetricsWriter

RECIPE = Recipe(
  dataset="synthetic",
  train_split="train[:70]",
  validation_split="validation[:50]",
  image_size=8,
  augmentation="pad_crop",
  network="resnet8",
  dtype="bfloat16",
  workers=2,
  per_worker_batch_size=10,
  reference_batch_size=10,
  epochs=3,
  warmup_epochs=1.5,
  decay_epochs=(2,),
)
STEPS = 9  # 70 // 20 = 3 per epoch.


def train(work_dir, recipe=RECIPE, stop=None, **options):
  """Trains in a directory and returns the result."""
  options = RunOptions(work_dir=str(work_dir), log_every_steps=2, **options)
  return trainer.train_and_evaluate(recipe, options, stop=stop)


def interrupting(method, number):
  """A method of MetricsWriter that also interrupts the run after step `number`."""
  original = getattr(MetricsWriter, method)

  def replacement(self, step, epoch, scalars):
    original(self, step, epoch, scalars)
    if step == number:
      raise KeyboardInterrupt

  return replacement
