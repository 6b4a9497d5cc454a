"""A stored run, to damage."""

import json

import keras

from tests.bad_input.checks import SMALL, recipe_of
from tf_largebatch import command_line
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.training import resolution
from tf_largebatch.training.checkpoint import Checkpoints


def tiny(units=3):
  """A model and an optimizer to save and to restore."""
  model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units)])
  optimizer = MomentumCorrectedSGD(0.1)
  optimizer.build(model.trainable_variables)
  return model, optimizer


def store_run(directory):
  """Writes what a run of `SMALL` leaves, but with checkpoints of another network."""
  directory.mkdir()
  recipe = resolution.resolve(recipe_of(*SMALL), 1, "")
  (directory / "recipe.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
  (directory / "flags.txt").write_text(command_line.to_flagfile(recipe))
  records = [
    {"kind": "train", "step": 1, "epoch": 0.5, "loss": 2.0, "error": 0.5},
    {"kind": "train", "step": 2, "epoch": 1.0, "loss": 1.5, "error": 0.25},
    {"kind": "eval", "step": 2, "epoch": 1, "loss": 1.75, "error": 0.5},
  ]
  (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  checkpoints = Checkpoints(str(directory / "checkpoints"), *tiny())
  checkpoints.save(1, 0.5)
  checkpoints.save(2, 1.0)
  checkpoints.evaluated(2, 0.5)
  checkpoints.wait()
  result = {"status": "complete", "steps": 2, "val_error": 0.5}
  (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
