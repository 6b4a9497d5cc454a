"""Keras' `fit`, `evaluate` and `predict` on two tasks of MultiWorkerMirroredStrategy (keras#20585).

  python -m tools.side_by_side.keras_issue_20585
  python -m tools.side_by_side.keras_issue_20585 --patched

`--patched` patches Keras in the process. Both tasks run on 127.0.0.1, for 100 seconds at most; task
0 prints what it sees. Needs TensorFlow and Keras only.
"""

import inspect
import json
import os
import re
import socket
import subprocess
import sys

_MEAN_OF_BATCH = r'self\.distribute_strategy\.reduce\(\s*"MEAN",\s*(\w+),\s*axis=None,\s*\)'
_FIRST = "lambda x: self.distribute_strategy.experimental_local_results(x)[0]"


def _task():
  import keras
  import tensorflow as tf
  from keras.src.backend.tensorflow import trainer

  if "--patched" in sys.argv:
    first = rf"tree.map_structure({_FIRST}, \1)"
    source = re.sub(_MEAN_OF_BATCH, first, inspect.getsource(trainer))
    exec(source.replace('"MEAN", v, axis=0', '"MEAN", v, axis=None'), vars(trainer))
    keras.Model._maybe_symbolic_build = trainer.TensorFlowTrainer._maybe_symbolic_build
  with tf.distribute.MultiWorkerMirroredStrategy().scope():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile("sgd", "mse")
  x, y = tf.ones((4, 3)), tf.zeros((4, 1))
  for method, data in ((model.fit, (x, y)), (model.evaluate, (x, y)), (model.predict, (x,))):
    try:
      result = method(*data, batch_size=2, verbose=0)
      print(f"{method.__name__}:", getattr(result, "history", result))
    except Exception as error:
      print(f"{method.__name__}: {type(error).__name__}: {error}")


if __name__ == "__main__":
  if "TF_CONFIG" in os.environ:
    sys.exit(_task())
  sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
  cluster = {"worker": [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]}
  env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
  tasks = []
  for index, port in enumerate(sockets):
    port.close()
    env["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
    output = subprocess.DEVNULL if index else None
    tasks.append(subprocess.Popen([sys.executable, *sys.argv], env=env, stdout=output))
  try:
    tasks[0].wait(100)
  finally:
    for task in tasks:
      task.kill()
