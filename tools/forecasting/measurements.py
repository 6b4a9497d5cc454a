"""Reads what `tools.benchmark.step` and `tools.benchmark.allreduce` have measured."""

import dataclasses
import json
import math
import statistics

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import NETWORKS


def positive(name: str, value, kinds: tuple[type, ...] = (int, float), zero: bool = False):
  """Returns a number if it is between limits that keep all results finite.

  Args:
    name: for the error.
    value: of any type.
    kinds: the types allowed.
    zero: whether 0 is allowed.

  Raises:
    UserError: it is not such a number.
  """
  if type(value) not in kinds or not (1e-30 <= value <= 1e30 or (zero and value == 0)):
    kind = "number" if float in kinds else "whole number"
    least = "0 or from 1e-30" if zero else "from 1e-30"
    raise UserError(f"{name}={value!r} is refused; it must be a {kind}, {least} to 1e30.")
  return value


def _read_json(path: str, whole: tuple[str, ...], numbers: tuple[str, ...], items: str) -> dict:
  """Reads a JSON object with these whole numbers, these numbers and this list.

  If it has several "contenders" (`tools.benchmark.step`), this is the first of them.
  """
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read as JSON ({error}).") from error
  if isinstance(found, dict) and isinstance(found.get("contenders"), dict):
    found = next(iter(found["contenders"].values()), None)
  if not isinstance(found, dict) or not isinstance(found.get(items), list):
    raise UserError(f"{path} must hold a JSON object with a list {items!r}.")
  for name in (*whole, *numbers):
    positive(f"{path}: {name}", found.get(name), (int, float) if name in numbers else (int,))
  return found


def read_points(path: str) -> list[tuple[float, float, int]]:
  """Reads (bytes, seconds, peers) of each all-reduce in a file of tools.benchmark.allreduce.

  Raises:
    UserError: the file is invalid, or was measured on several replicas per task: their ring also
      runs within a machine, so it does not show the network between machines alone.
  """
  found = _read_json(path, ("replicas", "tasks"), (), "points")
  points = [point if isinstance(point, dict) else {} for point in found["points"]]
  numbers = [[positive(f"{path}: {n}", p.get(n)) for n in ("bytes", "seconds")] for p in points]
  if found["replicas"] == 1:
    raise UserError(f"{path} was measured with one replica, which sends nothing; use two or more.")
  if found["replicas"] != found["tasks"]:
    raise UserError(
      f"{path} was measured with {found['replicas']} replicas in {found['tasks']} tasks, so its "
      "ring also ran within machines; measure with one replica per task (CUDA_VISIBLE_DEVICES=0) "
      "and one task per server."
    )
  return [(size, seconds, found["replicas"]) for size, seconds in numbers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredStep:
  """A replica's step.

  Attributes:
    seconds: of the step.
    passes: that took the workers through the network.
    workers: of the replica.
    images: of the step.
    network, image_size: of the recipe.
    gradient_bytes: of all gradients; None if it was not measured.
    jitter: coefficient of variation of the steps.
  """

  seconds: float
  passes: int
  workers: int
  images: int
  network: str
  image_size: int
  gradient_bytes: float | None
  jitter: float


def read_step(path: str) -> MeasuredStep:
  """Reads a replica's step from a file of tools.benchmark.step.

  Raises:
    UserError: the file is invalid, or holds the step of several tasks.
  """
  whole = ("image_size", "per_worker_batch_size", "workers", "passes", "tasks", "steps")
  found = _read_json(path, whole, ("gradient_bytes", "step_seconds"), "step_seconds_each")
  network = found.get("network")
  if network not in NETWORKS:
    raise UserError(f"{path}: network={network!r} is unknown.")
  if found["tasks"] > 1:
    raise UserError(
      f"{path} holds the step of {found['tasks']} tasks, including their all-reduce; measure the "
      "step of one task, as the first contender."
    )
  each = [positive(f"{path}: step_seconds_each", x) for x in found["step_seconds_each"]]
  return MeasuredStep(
    seconds=found["step_seconds"],
    passes=found["passes"],
    workers=found["workers"],
    images=found["workers"] * found["per_worker_batch_size"],
    network=network,
    image_size=found["image_size"],
    gradient_bytes=found["gradient_bytes"],
    jitter=coefficient_of_variation(each, found["steps"]),
  )


def coefficient_of_variation(each: list[float], steps: int = 1) -> float:
  """Returns the coefficient of variation of a step from times that are means over `steps` steps."""
  if len(each) < 2:
    return 0.0
  # From the interquartile range, as of a normal distribution, so that a slow first step is ignored.
  low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
  jitter = (high - low) / (2 * statistics.NormalDist().inv_cdf(0.75)) / middle
  return jitter * math.sqrt(steps)  # The steps are taken to be independent.
