"""Stage 1 of a run: chooses what the recipe leaves open, and finds the run if it exists."""

import dataclasses

from tf_largebatch.data import preparation, sources
from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.distributed.collectives import make_task_gather, require_agreement
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import work_directory
from tf_largebatch.training.agreement import require_same_files

SMALL = 64  # Pixels: up to this side, square images are trained at their own size.
# Options that must be equal on all tasks: they decide what a task sends, or when it reports.
_SHARED = (
  *("evaluation_batch_size", "log_every_steps", "bad_examples"),
  *("allreduce_dtype", "bytes_per_pack"),
)


def resolve_run(
  recipe: Recipe, options: RunOptions, cluster: Cluster, strategy
) -> tuple[Recipe, dict, dict | None]:
  """Prepares the data, resolves the recipe and looks for a run of it in the work directory.

  Returns:
    (resolved recipe, identity of the data, result of the run if it is complete).

  Raises:
    UserError: recipe, data and work directory do not fit, or tasks differ in them.
  """
  if recipe.dataset not in sources.GENERATED:
    preparation.prepare(recipe.dataset, options.data_dir)
  if cluster.num_tasks > 1:
    gather = make_task_gather(strategy, cluster.num_tasks)
    require_same_files(gather, options.work_dir, ("recipe.json", "result.json"))
  recipe = work_directory.with_stored_workers(recipe, options.work_dir)
  recipe = resolve(recipe, strategy.num_replicas_in_sync, options.data_dir)
  splits = (recipe.train_split, recipe.validation_split)
  data = sources.identify(recipe.dataset, *splits, options.data_dir)
  result = work_directory.find_run(options.work_dir, recipe, data)
  if cluster.num_tasks > 1:
    shared = tuple(getattr(options, name) for name in _SHARED)
    require_agreement(
      strategy,
      (recipe, data, shared, result is None),
      "their flags or their data differ, or they do not share one work_dir",
    )
  return recipe, data, result


def resolve(recipe: Recipe, replicas: int, data_dir: str) -> Recipe:
  """Chooses the fields that are None, and checks that the replicas divide the workers.

  Raises:
    UserError: they do not, or the channel statistics do not fit the images.
  """
  chosen = {}
  workers = recipe.workers
  if workers is None:
    workers = chosen["workers"] = replicas
  if workers % replicas:
    below = workers // replicas * replicas
    values = [str(value) for value in (below, below + replicas) if value]
    raise UserError(
      f"workers={workers} cannot be divided among {replicas} replicas; use a multiple of "
      f"{replicas}, such as {' or '.join(values)}."
    )
  known = sources.defaults(recipe.dataset, data_dir, recipe.validation_split)
  shape = known.image_shape
  small = shape is not None and shape[0] == shape[1] <= SMALL
  if recipe.image_size is None:
    chosen["image_size"] = shape[0] if small else 224
  if recipe.augmentation is None:
    chosen["augmentation"] = "pad_crop" if small else "area_crop"
  for name in ("validation_split", "channel_mean", "channel_std"):
    if getattr(recipe, name) is None:
      chosen[name] = getattr(known, name)
  for name in ("channel_mean", "channel_std"):
    given = chosen.get(name) or getattr(recipe, name)
    if len(given) != len(known.channel_mean):
      raise UserError(
        f"{name}={','.join(map(str, given))} has {len(given)} values, but the images of "
        f"{recipe.dataset} have {len(known.channel_mean)} channels."
      )
  return dataclasses.replace(recipe, **chosen)
