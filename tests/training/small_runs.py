"""Runs of a small real network that take seconds."""

import collections

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import trainer
from tf_largebatch.training.metrics import MetricsWriter, read_metrics

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


def read_tensorboard(work_dir):
  """Returns every event in a run's tensorboard/ by tag, as TensorBoard's own loader reads them."""
  events = EventAccumulator(str(work_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
  return {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}


def check_tensorboard(work_dir, trained, evaluated):
  """Checks that tensorboard/ holds what metrics.jsonl holds: so many records, each once."""
  records = read_metrics(str(work_dir))
  counts = collections.Counter(record["kind"] for record in records)
  assert (counts["train"], counts["eval"]) == (trained, evaluated)
  expected = {
    (f"{group}/{name}", record["step"], np.float32(value))
    for record in records
    for group in ("train" if record["kind"] == "train" else "validation",)
    for name, value in record.items()
    if name not in ("kind", "step", "epoch")
  }
  shown = [
    (tag, event.step, np.float32(make_ndarray(event.tensor_proto)))
    for tag, events in read_tensorboard(work_dir).items()
    if tag.startswith(("train/", "validation/"))
    for event in events
  ]
  assert len(shown) == len(expected) and set(shown) == expected
