"""Moves a run from one number of tasks to another; a part of `chaos`."""

import pathlib

import numpy as np

from tf_largebatch.errors import UserError
from tools.resilience import harness
from tools.resilience.harness import LaunchedRun


def elastic(directory: pathlib.Path, arguments: list[str], task_counts: list[int]) -> dict:
  """Moves one run from one number of tasks to the next and compares it with an undisturbed run.

  Returns:
    {"moves": [(tasks, first step)], "steps": of the run, "weights": largest deviation of a
    variable, relative to its largest magnitude, "loss": largest relative deviation of a step's
    loss, "first_loss": the same of the first five steps, "errors_equal": of all records}.
  """
  undisturbed = harness.train_undisturbed(directory / "undisturbed", task_counts[0], arguments)
  moved = LaunchedRun(directory / "moved", arguments)
  steps = undisturbed.step()
  moves = _move(moved, task_counts, steps)
  records = [harness.read_records(run.work_dir) for run in (undisturbed, moved)]
  losses = [{r["step"]: r["loss"] for r in own if r["kind"] == "train"} for own in records]
  if losses[0].keys() != losses[1].keys():
    raise AssertionError("The moved run did not record each step once.")
  deviations = [abs(losses[1][s] - losses[0][s]) / losses[0][s] for s in sorted(losses[0])]
  return {
    "moves": moves,
    "steps": steps,
    "weights": _largest_deviation(undisturbed, moved),
    "loss": max(deviations),
    "first_loss": max(deviations[:5]),
    "errors_equal": [r["error"] for r in records[0]] == [r["error"] for r in records[1]],
  }


def _move(run: LaunchedRun, task_counts: list[int], steps: int) -> list[tuple[int, int]]:
  """Trains an equal share of the steps on each number of tasks; returns (tasks, first step)."""
  moves = []
  try:
    for place, tasks in enumerate(task_counts, start=1):
      moves.append((tasks, run.step()))
      run.launch(tasks)
      last = place == len(task_counts)
      if not last:
        target = steps * place // len(task_counts)
        run.wait_for(lambda target=target: run.step() >= target, f"Step {target} on {tasks} tasks")
        run.terminate()
      status = run.wait()
      if status != (0 if last else 143):
        raise UserError(f"The run on {tasks} tasks ended with status {status}; see {run.log}")
  finally:
    run.kill()
  return moves


def _largest_deviation(undisturbed: LaunchedRun, moved: LaunchedRun) -> float:
  """Compares the model's variables in the newest checkpoints."""
  states = []
  for run in (undisturbed, moved):
    newest = sorted((run.work_dir / "checkpoints").glob("step-*.npz"))[-1]
    with np.load(newest) as arrays:
      states.append({name: arrays[name].astype(np.float64) for name in arrays.files})
  expected, found = states
  return max(
    float(np.max(np.abs(expected[name] - found[name])) / max(np.max(np.abs(expected[name])), 1e-30))
    for name in expected
    if name.startswith("model/")
  )
