"""One task of `tools.stock_keras`: trains the programs with stock Keras and with ours.

Leaves TASK.json, what was observed, and TASK.npz, the variables of each of the task's replicas.
"""

import json
import os
import pathlib
import re

import numpy as np
from absl import flags

from tf_largebatch.distributed.cluster import read_cluster
from tools import program


def define_flags():
  flags.DEFINE_list("programs", [], "Names of the programs.")
  flags.DEFINE_integer("devices", 1, "Number of logical CPUs, each a replica.", lower_bound=1)
  flags.DEFINE_string("folder", None, "Where to leave the files.", required=True)


def _attempt(call) -> tuple[object, str | None]:
  """Returns what the call returns and None, or None and its error in one line."""
  try:
    return call(), None
  except Exception as error:  # Any error is an observation.
    line = " ".join(str(error).split())
    line = re.sub(r"\{.*\}", "{…}", line)  # The values of a tensor.
    return None, f"{type(error).__name__}: {line}"


def _stock(model, batches, validation):
  from tools.side_by_side.programs import EPOCHS

  return (
    # Keras would warn that it cannot shuffle a data set.
    lambda: model.fit(batches, epochs=EPOCHS, shuffle=False, verbose=0),
    lambda: model.evaluate(validation, verbose=0, return_dict=True),
  )


def _ours(model, batches, validation):
  from tf_largebatch import evaluate, fit
  from tools.side_by_side.programs import EPOCHS, PER_WORKER_BATCH_SIZE, WORKERS

  sizes = {"workers": WORKERS, "per_worker_batch_size": PER_WORKER_BATCH_SIZE}
  return (
    lambda: fit(model, batches, epochs=EPOCHS, verbose=0, **sizes),
    lambda: evaluate(model, validation, verbose=0, return_dict=True),
  )


def _expected(model, x, y) -> dict[str, float]:
  """The loss and the accuracy over all examples at once, of this task's first copy."""
  logits = np.asarray(model(x, training=False), np.float64)
  shifted = logits - logits.max(axis=1, keepdims=True)
  losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]
  right = logits.argmax(axis=1) == y
  return {"loss": float(losses.mean()), "accuracy": float(right.mean()), "examples": len(y)}


def _run(name: str, side: str, strategy) -> tuple[dict, dict]:
  """Runs a program with "stock" Keras or "ours"; returns what was observed, and the variables."""
  import tensorflow as tf

  from tools.side_by_side.programs import PER_WORKER_BATCH_SIZE, PROGRAMS, WORKERS

  chosen = PROGRAMS[name]
  training, validation = chosen.data()
  batches, validation_batches = (
    tf.data.Dataset.from_tensor_slices(examples).batch(WORKERS * PER_WORKER_BATCH_SIZE)
    for examples in (training, validation)
  )
  with strategy.scope():
    model = chosen.compiled()
  calls = {"stock": _stock, "ours": _ours}[side]
  fit, evaluate = calls(model, batches, validation_batches)
  _, fit_error = _attempt(fit)
  evaluated, evaluate_error = _attempt(evaluate)
  trained = {id(variable) for variable in model.trainable_variables}
  variables = [*model.variables, *model.optimizer.variables]
  observed = {
    "title": chosen.title,
    "fit_error": fit_error,
    "evaluate_error": evaluate_error,
    "evaluated": evaluated,
    "expected": _expected(model, *validation),
    "weights": [i for i, v in enumerate(variables) if id(v) in trained],
    "moving": [i for i, v in enumerate(variables) if v.name.startswith("moving_")],
  }
  copies = {
    f"{name}/{side}/{replica}/{i}": value.numpy()
    for i, variable in enumerate(variables)
    for replica, value in enumerate(strategy.experimental_local_results(variable.value))
  }
  return observed, copies


def main():
  """Runs all programs and leaves the files."""
  import keras
  import tensorflow as tf

  from tf_largebatch.distributed.strategy import make_strategy

  count = flags.FLAGS.devices
  if count > 1:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
      cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
  keras.config.set_floatx("float64")
  cluster = read_cluster()
  strategy = make_strategy(cluster, timeout_minutes=2)
  observed, copies = {}, {}
  for name in flags.FLAGS.programs:
    for side in ("stock", "ours"):
      observed[f"{name}/{side}"], new = _run(name, side, strategy)
      copies |= new
  folder = pathlib.Path(flags.FLAGS.folder)
  np.savez(folder / f"{cluster.task_index}.npz", **copies)
  (folder / f"{cluster.task_index}.json").write_text(json.dumps(observed))


if __name__ == "__main__":
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  program.run(main, define_flags)
