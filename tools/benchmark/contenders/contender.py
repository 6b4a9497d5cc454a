"""The contenders of the step benchmark: their description, and what runs in their processes."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.forecasting.layers import usual_classes

KINDS = ("ours", "loop", "evaluate", "keras", "fit", "our_fit", "torch", "torch_compiled")
OURS = ("ours", "loop", "evaluate")
# Run options that decide how a step is computed.
STEP_OPTIONS = ("workers_per_pass", "jit_compile", "allreduce_dtype", "bytes_per_pack")
_MOST_TASKS = 1000


@dataclasses.dataclass(frozen=True)
class Contender:
  """What is timed.

  Attributes:
    name: as given in --contenders.
    kind: one of KINDS, or "product" (see `ceiling`).
    recipe: its fields, by name.
    step_options: run options, by name.
    environment: variables that its process gets.
    tasks: processes that train together.
    cores: logical CPUs that all its tasks share; None: all.
    layers: "stock" or "ours": whose model and optimizer `fit` and `our_fit` train.
  """

  name: str
  kind: str
  recipe: dict
  step_options: dict
  environment: dict
  tasks: int = 1
  cores: int | None = None
  layers: str = "stock"

  @property
  def is_ours(self) -> bool:
    """Whether it trains this package's model, and so in its environment."""
    return self.kind in OURS or self.layers == "ours"

  @property
  def compute_dtype(self) -> str:
    """The dtype of most of its FLOPs."""
    dtype = self.recipe["dtype"]
    if self.kind == "evaluate" and self.recipe["evaluation_dtype"] == "weights":
      return "float64" if dtype == "float64" else "float32"
    return dtype


@dataclasses.dataclass(frozen=True)
class Runner:
  """A contender that is built, in its process.

  Attributes:
    run: takes so many steps and returns the last one's loss.
    passes: in which a task takes its workers through the network.
    run_bare: only of "loop": takes steps without the loop.
    seconds_in_steps: only of "loop": seconds that the last `run` spent within its steps.
  """

  run: Callable[[int], float]
  passes: int
  run_bare: Callable[[int], float] | None = None
  seconds_in_steps: Callable[[], float] | None = None


def parse_contender(text: str, recipe: dict, step_options: dict) -> Contender:
  """Parses `KIND:name=value:…`.

  Args:
    text: of the flag.
    recipe, step_options: defaults for what the text leaves out.

  Raises:
    UserError: the kind, a name or a value is unknown.
  """
  kind, *settings = text.split(":")
  if kind not in KINDS:
    raise UserError(f"--contenders={text}: unknown kind {kind!r}; use one of {', '.join(KINDS)}.")
  recipe, step_options, environment = dict(recipe), dict(step_options), {}
  available = len(os.sched_getaffinity(0))
  own = {"tasks": 1, "cores": available, "layers": "stock"}
  for setting in settings:
    name, _, value = setting.partition("=")
    if name.isupper():
      environment[name] = value
      continue
    with contextlib.suppress(ValueError):
      value = json.loads(value)
    if name == "layers" and kind in ("fit", "our_fit") and value in ("stock", "ours"):
      own[name] = value
    elif name in ("tasks", "cores"):
      own[name] = value
      most = available if name == "cores" else _MOST_TASKS
      if type(value) is not int or not 1 <= value <= most:
        raise UserError(
          f"--contenders={text}: {setting!r} is out of range; give a whole number from 1 to {most}."
        )
    elif name in STEP_OPTIONS:
      step_options[name] = value
    elif name in recipe:
      recipe[name] = value
    else:
      raise UserError(f"--contenders={text}: {setting!r} is not an option of a contender.")
  recipe = Recipe(**recipe).to_dict()  # Raises UserError if a value is out of range.
  _check_support(text, kind, recipe, own["tasks"])
  return Contender(text, kind, recipe, step_options, environment, **own)


def _check_support(text: str, kind: str, recipe: dict, tasks: int):
  """Refuses what the kind cannot do."""
  if (recipe["workers"] or 1) % tasks:
    raise UserError(f"--contenders={text}: tasks={tasks} must divide the workers.")
  if kind.startswith("torch") and recipe["network"] != "resnet50":
    raise UserError(f"--contenders={text}: in PyTorch only network=resnet50 is implemented.")
  if recipe["dtype"] == "float64" and kind not in OURS:
    raise UserError(f"--contenders={text}: only {', '.join(OURS)} support dtype=float64.")
  if tasks > 1 and kind != "ours":
    raise UserError(f"--contenders={text}: only ours supports several tasks.")


def random_batch(recipe: Recipe, size: int):
  """Random images, uint8 `[size, H, W, C]`, and labels, int32 `[size]`; always the same."""
  import numpy as np

  rng = np.random.default_rng(0)
  side, channels = recipe.image_size, len(recipe.channel_mean)
  images = rng.integers(0, 256, (size, side, side, channels), dtype=np.uint8)
  return images, rng.integers(0, usual_classes(recipe.network), size, dtype=np.int32)
