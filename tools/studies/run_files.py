"""The files of a study's run: what the trainer leaves, and the result that is kept.

None of this imports TensorFlow, because a process that has its threads must not fork.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pathlib

from tf_largebatch.errors import UserError, summary
from tf_largebatch.recipe import Recipe
from tools import hardware
from tools.studies import curves, noise
from tools.studies.plan import PlannedRun

_DIGITS = 6  # Of an error in a curve: finer than one image of a million.


def log_path(work_dir: pathlib.Path) -> pathlib.Path:
  return work_dir.with_name(f"{work_dir.name}.log")


def finished_epochs(work_dir: pathlib.Path) -> float:
  """Returns how many epochs a run has trained, by the last complete line of its metrics."""
  with contextlib.suppress(FileNotFoundError), open(work_dir / "metrics.jsonl", "rb") as file:
    file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
    *lines, _ = file.read().split(b"\n")
    if lines:
      return json.loads(lines[-1])["epoch"]
  return 0.0


def _read_metrics(work_dir: pathlib.Path) -> list[dict]:
  """Reads the complete lines of the metrics, as `metrics.read_metrics` does."""
  records = []
  with contextlib.suppress(FileNotFoundError), open(work_dir / "metrics.jsonl") as lines:
    for line in lines:
      if not line.endswith("\n"):
        break  # It is being written.
      records.append(json.loads(line))
  return records


def find_result(run: PlannedRun, results_dir: pathlib.Path) -> dict | None:
  """Returns the result that is kept of a run (see `make_result`), in the folder of any study.

  Raises:
    UserError: it cannot be read, or has another recipe than the study has now.
  """
  for path in sorted(results_dir.glob(f"*/{glob.escape(run.name)}.json")):
    try:
      result = json.loads(path.read_text())
      recipe = Recipe(**result["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise UserError(
        f"{path} is not the result of a run ({summary(error)}); remove it."
      ) from error
    if any(
      value is not None and value != getattr(recipe, name)
      for name, value in vars(run.recipe).items()
    ):
      raise UserError(
        f"{path} has another recipe than {run.group} has now; remove it, or rename one of the two."
      )
    return result
  return None


def group_of(result: dict) -> str:
  """Returns the group of a result; those of older versions have a flagfile's name."""
  return result.get("group") or pathlib.Path(result["flagfile"]).stem


def make_result(run: PlannedRun, work_dir: pathlib.Path, cores: int, divergence: str | None):
  """Returns what is kept of a run that has ended, as a JSON object.

  Args:
    run: as planned.
    work_dir: of the run.
    cores: that it trained on.
    divergence: the trainer's message if the run diverged.
  """
  records = _read_metrics(work_dir)
  result = {"val_error": None, "val_error_median_last_5": None, "weights_sha256": None}
  result |= {"seconds": None, "reason": divergence}
  if divergence is None:
    result |= json.loads((work_dir / "result.json").read_text())
    del result["reason"]
  result["status"] = "complete" if divergence is None else "diverged"
  validation = {each["epoch"]: each["error"] for each in records if each["kind"] == "eval"}
  facts = json.loads((work_dir / "recipe.json").read_text())
  return {
    "study": run.study,
    "group": run.group,
    "flagfile": run.flagfile,
    "seed": run.recipe.seed,
    **result,
    "training_error": _round(curves.training_curve(records)),
    "validation_error": _round(validation),
    "noise": [dataclasses.asdict(epoch) for epoch in noise.epochs_of(records)],
    "curvature": [record for record in records if "largest_eigenvalue" in record],
    **facts,
    "flags": list(run.flags),
    "hardware": {"cpu": hardware.cpu_name(), "cores": cores},
  }


def _round(curve: dict[float, float]) -> dict[str, float]:
  return {f"{epoch:g}": round(error, _DIGITS) for epoch, error in curve.items()}
