"""What the tasks of a run see in its work directory, and what they agree to resume from.

The caches of network file systems show a new file to some machines later than to others.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch import files
from tf_largebatch.distributed.collectives import DifferentViewsError, retry_until_views_agree
from tf_largebatch.training.checkpoint import Checkpoints, Manifest

_NONE = -1.0  # Stands for an unused row, and for a checkpoint that was not evaluated.
_REMEDY = "give all tasks the same shared work_dir."


def require_same_files(gather: Callable, work_dir: str, names: tuple[str, ...]) -> None:
  """Waits until each file exists for all tasks or for none.

  Args:
    gather: see `collectives.make_task_gather`.
    work_dir: the run's directory.
    names: of the files.

  Raises:
    DifferentViewsError: after a minute some tasks still do not see a file that others see.
  """

  def look():
    views = gather([_exists(os.path.join(work_dir, name)) for name in names])
    for name, seen in zip(names, views.T, strict=True):
      if len(set(seen)) > 1:
        raise DifferentViewsError(
          f"Task {np.argmin(seen)} does not see the {name} in work_dir={work_dir} that task "
          f"{np.argmax(seen)} sees; {_REMEDY}"
        )

  retry_until_views_agree(look)


def _exists(path: str) -> bool:
  try:
    return tf.io.gfile.exists(path)
  except files.FAILURES:
    return False


def restore_newest_of_all(checkpoints: Checkpoints, gather: Callable) -> Manifest | None:
  """Restores the newest checkpoint that all tasks see whole.

  The chief removes newer ones, because the metrics after the restored step are dropped.

  Args:
    checkpoints: this task's view.
    gather: see `collectives.make_task_gather`.

  Returns:
    The manifest, the same on all tasks; None if no task sees a checkpoint.

  Raises:
    DifferentViewsError: after a minute some tasks still see checkpoints, but all together none.
    UserError: see `Checkpoints.manifests` and `Checkpoints.restore`.
  """
  return retry_until_views_agree(lambda: _restore(checkpoints, gather))


def _restore(checkpoints: Checkpoints, gather: Callable) -> Manifest | None:
  mine = {(manifest.step, _digest(manifest)): manifest for manifest in checkpoints.manifests()}
  views = _gather_views(mine, gather)
  newest = max(itertools.chain(*views), default=None)
  for key in sorted(set.intersection(*map(set, views)), reverse=True):
    arrays = checkpoints.read(mine[key])
    whole = gather(arrays is not None)
    if whole.all():
      # Where tasks see different errors, the epoch is evaluated again.
      errors = {view[key] for view in views}
      error = errors.pop() if len(errors) == 1 and _NONE not in errors else None
      manifest = dataclasses.replace(mine[key], validation_error=error)
      checkpoints.restore(manifest, arrays)
      if key != newest:
        lacking = next(task for task, view in enumerate(views) if newest not in view)
        _drop_newer(checkpoints, manifest.step, newest[0], lacking)
      return manifest
    del arrays  # Memory holds one checkpoint at a time.
    for view, is_whole in zip(views, whole, strict=True):
      if not is_whole:
        del view[key]
  if not any(views):
    return None
  steps = [max((step for step, _ in view), default=None) for view in views]
  raise DifferentViewsError(
    f"The tasks see no common whole checkpoint in {checkpoints.directory}: {_newest(steps, max)}, "
    f"but {_newest(steps, min)}; {_REMEDY}"
  )


def _digest(manifest: Manifest) -> int:
  """Returns 48 bits of the state's digest, which a float64 holds exactly."""
  return int.from_bytes(hashlib.sha256(manifest.sha256.encode()).digest()[:6], "big")


def _gather_views(
  mine: dict[tuple[int, int], Manifest], gather: Callable
) -> list[dict[tuple[int, int], float]]:
  """Returns (step, digest) → validation error of the checkpoints that each task sees."""
  rows = np.full((int(gather(len(mine)).max()), 3), _NONE)
  for row, (key, manifest) in zip(rows, mine.items(), strict=False):
    error = manifest.validation_error
    row[:] = (*key, _NONE if error is None else error)
  return [
    {(int(step), int(digest)): float(error) for step, digest, error in view if step != _NONE}
    for view in gather(rows)
  ]


def _drop_newer(checkpoints: Checkpoints, step: int, newest: int, lacking: int) -> None:
  logging.info(
    "Step %d is the newest checkpoint that all tasks see whole; task %d does not see that of "
    "step %d.",
    step,
    lacking,
    newest,
  )
  with contextlib.suppress(*files.FAILURES):  # The next save removes them, too.
    checkpoints.discard_from(step + 1)


def _newest(steps: list[int | None], choose: Callable) -> str:
  """Describes the newest or oldest (`choose`: max or min) of the tasks' newest checkpoints."""
  task = choose(range(len(steps)), key=lambda task: -1 if steps[task] is None else steps[task])
  return f"task {task} sees {'none' if steps[task] is None else f'step {steps[task]}'}"
