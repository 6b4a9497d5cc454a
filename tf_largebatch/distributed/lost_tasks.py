"""One-line errors that name the tasks a run has lost."""

import contextlib
import re
from collections.abc import Callable

import tensorflow as tf

from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.errors import LOST_TASK, InterruptedRunError

# Matches every error that TensorFlow raises because another task ended or fell silent.
_LOSS = re.compile(
  r"Collective ops is aborted|CoordinationService|/task:\d+|UNAVAILABLE|Unavailable"
)
# Ends the original report; the tasks named after it only passed it on.
_REPORT_END = "The error could be from a previous operation"


@contextlib.contextmanager
def report_lost_tasks(cluster: Cluster, steps_done: Callable[[], int | None]):
  """Turns the error that TensorFlow raises for a lost task into one line that names the task.

  A task is lost if it ends or does not answer within the heartbeat timeout (see `make_strategy`).

  Args:
    cluster: the cluster that the strategy was made for.
    steps_done: returns the number of the last finished step, or None before training.

  Raises:
    InterruptedRunError: a task was lost.
  """
  try:
    yield
  except tf.errors.OpError as error:
    lost = _find_lost_tasks(cluster, str(error))
    if not lost:
      raise
    names = " and ".join(f"task {index} ({cluster.tasks[index]})" for index in lost)
    done = steps_done()
    raise InterruptedRunError(
      f"Lost {names}, which ended or cannot be reached; "
      + ("training had not begun" if done is None else f"the last finished step is {done}")
      + ". Run the same command on all tasks to resume from the newest checkpoint.",
      LOST_TASK,
    ) from error


def _find_lost_tasks(cluster: Cluster, message: str) -> list[int]:
  """Returns the other tasks that an error from a collective or the coordination service names."""
  if cluster.num_tasks == 1 or not _LOSS.search(message):
    return []
  for report in (message.partition(_REPORT_END)[0], message):
    found = {int(index) for index in re.findall(r"/job:worker(?:/replica:0)?/task:(\d+)", report)}
    for index, task in enumerate(cluster.tasks):
      if re.search(rf"(?<![\w.-]){re.escape(task)}(?!\d)", report):  # Not inside a longer address.
        found.add(index)
    # The chief runs the service that receives the heartbeats.
    if "CoordinationService/" in report and not found - {cluster.task_index}:
      found.add(0)
    if found - {cluster.task_index}:
      break
  return sorted(found - {cluster.task_index})
