r"""Runs small Keras programs with stock `fit` and with ours, on three clusters, and compares them.

  python -m tools.stock_keras
  python -m tools.stock_keras --programs=mlp_bn,vit --json=table.json

Each program (see `tools/side_by_side/programs.py`) trains on one CPU, on two logical CPUs with
MirroredStrategy, and on two tasks on 127.0.0.1 with MultiWorkerMirroredStrategy: with Keras'
`model.fit` in batches of 16, and with `tf_largebatch.fit` in 4 workers of 4. The table shows what
was measured:

  fit, evaluate  whether the call returned; the errors stand below the table
  weights        ‖w − w₁‖ / ‖w₁‖, w₁ from the same `fit` on one CPU
  copies         how many variables (of model and optimizer) differ between the replicas
  BN drift       largest difference of moving statistics between two replicas, as a share of their
                 norm
  counted        validation examples that the metrics of `evaluate` saw
  loss off       relative error of the loss of `evaluate`, against all examples in one NumPy mean at
                 the weights of the first copy

To try a patched Keras, name the folder that holds it in PYTHONPATH.
"""

import itertools
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from absl import flags

from tf_largebatch.errors import UserError
from tools import hardware, launch_local, output, program

_ROOT = pathlib.Path(__file__).parents[1]
_NAMES = ("resnet", "mlp_bn", "vit", "clipping", "partial")
# Cluster → (tasks, replicas of each).
_CLUSTERS = {"1 CPU": (1, 1), "2 CPUs": (1, 2), "2 tasks": (2, 1)}
_COLUMNS = ("fit", "weights", "copies", "BN drift", "evaluate", "counted", "loss off")
_POLL_SECONDS = 0.1


def define_flags():
  flags.DEFINE_list("programs", list(_NAMES), f"Programs to run, of {', '.join(_NAMES)}.")
  flags.DEFINE_string("json", "", "File for the results, as JSON; empty: none.")
  flags.DEFINE_float(
    "timeout_seconds", 300.0, "After how long processes that have not finished are ended.", 1.0
  )


def _start(cluster: str, names: list[str], folder: pathlib.Path) -> list:
  """Starts the tasks of a cluster, which leave their files and logs in the folder."""
  tasks, devices = _CLUSTERS[cluster]
  folder.mkdir()
  command = [sys.executable, "-m", "tools.side_by_side.measure", f"--programs={','.join(names)}"]
  command += [f"--devices={devices}", f"--folder={folder}"]
  addresses = launch_local.free_addresses(tasks)
  started = []
  for index in range(tasks):
    environment = launch_local.task_environment(addresses, index)
    environment |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if tasks == 1:
      environment.pop("TF_CONFIG")
    with open(folder / f"{index}.log", "w") as log:
      started.append(launch_local.start_process(command, environment, log, _ROOT))
  return started


def _wait(processes: list, folders: list[pathlib.Path], seconds: float):
  """Waits for all processes to succeed.

  Raises:
    UserError: one failed, or is still running at the end.
  """
  deadline = time.monotonic() + seconds
  while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
    if any(process.poll() for process in processes):
      break
    time.sleep(_POLL_SECONDS)
  for process, log in zip(processes, folders, strict=True):
    status = process.poll()
    if status:
      lines = log.read_text(errors="replace").strip().splitlines()
      raise UserError(f"A task ended with status {status}: {lines[-1] if lines else 'no output'}")
  if any(process.poll() is None for process in processes):
    raise UserError(
      f"Not all tasks finished within {seconds:g} s; raise --timeout_seconds on a slow machine."
    )


def _measure(names: list[str], seconds: float) -> dict[str, list[tuple[dict, dict]]]:
  """Runs all clusters at once; returns for each what its tasks left."""
  with tempfile.TemporaryDirectory() as scratch:
    folders = {cluster: pathlib.Path(scratch, cluster.replace(" ", "_")) for cluster in _CLUSTERS}
    processes, logs = [], []
    try:
      for cluster, folder in folders.items():
        started = _start(cluster, names, folder)
        processes += started
        logs += [folder / f"{index}.log" for index in range(len(started))]
      _wait(processes, logs, seconds)
    finally:
      for process in processes:
        process.kill()
        process.wait()
    return {
      cluster: [
        (json.loads((folder / f"{i}.json").read_text()), dict(np.load(folder / f"{i}.npz")))
        for i in range(_CLUSTERS[cluster][0])
      ]
      for cluster, folder in folders.items()
    }


def _copies(tasks: list[tuple[dict, dict]], key: str) -> list[list[np.ndarray]]:
  """Returns the variables of every replica of a cluster."""
  found = []
  for _, arrays in tasks:
    for replica in itertools.count():
      prefix = f"{key}/{replica}/"
      names = [name for name in arrays if name.startswith(prefix)]
      if not names:
        break
      found.append([arrays[prefix + str(i)] for i in range(len(names))])
  return found


def _joined(variables: list[np.ndarray], indices: list[int]) -> np.ndarray:
  return np.concatenate([np.ravel(variables[i]) for i in indices])


def _distance(some: list[np.ndarray], others: list[np.ndarray], indices: list[int]) -> float:
  """‖a − b‖ / ‖b‖ over the chosen variables."""
  a, b = _joined(some, indices), _joined(others, indices)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _compare(tasks: list[tuple[dict, dict]], alone: list[tuple[dict, dict]], key: str) -> dict:
  """Compares one program's run on a cluster with its run on one CPU."""
  observed = tasks[0][0][key]
  evaluated, expected = observed["evaluated"], observed["expected"]
  copies, (reference,) = _copies(tasks, key), _copies(alone, key)
  first, moving = copies[0], observed["moving"]
  result = {
    "title": observed["title"],
    "fit_error": observed["fit_error"],
    "evaluate_error": observed["evaluate_error"],
    "weights_off": None,
    "variables": len(first),
    "differing_copies": None,
    "bn_drift": None,
    "counted": int(evaluated["examples"]) if evaluated else None,
    "validation_examples": expected["examples"],
    "loss_off": abs(evaluated["loss"] / expected["loss"] - 1) if evaluated else None,
  }
  if result["fit_error"] is None and len(copies) > 1:
    result["weights_off"] = _distance(first, reference, observed["weights"])
    result["differing_copies"] = sum(
      any(other[i].tobytes() != first[i].tobytes() for other in copies) for i in range(len(first))
    )
    if moving:
      pairs = itertools.combinations(copies, 2)
      result["bn_drift"] = max(_distance(a, b, moving) for a, b in pairs)
  return result


def _table(results: list[dict]) -> str:
  """Formats the results, and the errors below them."""
  errors = []

  def state(error: str | None) -> str:
    if error is None:
      return "runs"
    if error not in errors:
      errors.append(error)
    return f"error {errors.index(error) + 1}"

  def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"

  label = max(len(r["title"]) for r in results) + 2
  lines = [output.table_line("program", label, ["cluster", "by", *_COLUMNS], 10)]
  for r in results:
    copies = "-" if r["differing_copies"] is None else f"{r['differing_copies']}/{r['variables']}"
    counted = "-" if r["counted"] is None else f"{r['counted']}/{r['validation_examples']}"
    cells = [r["cluster"], r["by"], state(r["fit_error"]), number(r["weights_off"]), copies]
    cells += [number(r["bn_drift"]), state(r["evaluate_error"]), counted, number(r["loss_off"])]
    lines.append(output.table_line(r["title"], label, cells, 10))
  return "\n".join([*lines, *(f"error {i}: {error}" for i, error in enumerate(errors, 1))])


def main():
  """Runs the programs and prints the table.

  Raises:
    UserError: a program is unknown, the JSON file cannot be written, or a task failed.
  """
  names = flags.FLAGS.programs
  unknown = [name for name in names if name not in _NAMES]
  if unknown or not names:
    raise UserError(f"--programs={','.join(names)}: expected any of {', '.join(_NAMES)}.")
  path = output.output_path("--json", flags.FLAGS.json)
  measured = _measure(names, flags.FLAGS.timeout_seconds)
  results = [
    {
      "program": name,
      "title": tasks[0][0][f"{name}/{side}"]["title"],
      "cluster": cluster,
      "by": side,
    }
    | _compare(tasks, measured["1 CPU"], f"{name}/{side}")
    for name in names
    for cluster, tasks in measured.items()
    for side in ("stock", "ours")
  ]
  versions, machine = hardware.versions("tensorflow", "keras"), hardware.describe()
  print(", ".join(f"{name} {value}" for name, value in (machine | versions).items()))
  print(_table(results))
  if path:
    output.write_json(
      "--json", path, {"results": results, "versions": versions, "hardware": machine}
    )


if __name__ == "__main__":
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  program.run(main, define_flags)
