"""`report_lost_tasks` against the errors that TensorFlow raises when a task is gone."""

import pytest
import tensorflow as tf

from tf_largebatch.distributed.cluster import Cluster
from tf_largebatch.distributed.lost_tasks import report_lost_tasks
from tf_largebatch.errors import LOST_TASK, InterruptedRunError

_REMOTE = (
  "\nAdditional GRPC error information from remote target /job:worker/replica:0/task:{} while "
  "calling /tensorflow.WorkerService/RecvBuf:\n:UNKNOWN:Error received from peer  {{…}}"
)
_AGAIN = "\nThe error could be from a previous operation. Restart your program to reset."
_RESET = (
  "Collective ops is aborted by: recvmsg:Connection reset by peer" + _REMOTE.format(1) + _AGAIN
)
_PASSED_ON = "Collective ops is aborted by: " + _RESET + _REMOTE.format(2) + _AGAIN


@pytest.mark.parametrize(
  "message, lost",
  [
    pytest.param(_RESET, "task 1 (b:22)", id="peer of this task"),
    pytest.param(_PASSED_ON, "task 1 (b:22)", id="passed on by a live task"),
    pytest.param(
      "Collective ops is aborted by: Connection refused" + _AGAIN + _REMOTE.format(2) + _AGAIN,
      "task 2 (web:2)",
      id="named only by the task that passed it on",
    ),
    pytest.param(
      "The following tasks are unhealthy: /job:worker/replica:0/task:1, "
      "/job:worker/replica:0/task:2 [type.googleapis.com/tensorflow.CoordinationServiceError='']",
      "task 1 (b:22) and task 2 (web:2)",
      id="no heartbeat",
    ),
    pytest.param(
      "Deadline Exceeded while calling /tensorflow.CoordinationService/Heartbeat",
      "task 0 (a:1)",
      id="the chief's service",
    ),
    pytest.param(
      "UNAVAILABLE: ipv4:web:22: x; b:222; ipv4:web:2: y",
      "task 2 (web:2)",
      id="address inside a longer one",
    ),
  ],
)
def test_names_the_lost_tasks_in_one_line(message, lost):
  index = 0 if "task 0" not in lost else 1
  with (
    pytest.raises(InterruptedRunError) as info,
    report_lost_tasks(Cluster(("a:1", "b:22", "web:2"), index), lambda: 7),
  ):
    raise tf.errors.UnavailableError(None, None, message)
  assert info.value.status == LOST_TASK
  assert str(info.value) == (
    f"Lost {lost}, which ended or cannot be reached; the last finished step is 7. Run the same "
    "command on all tasks to resume from the newest checkpoint."
  )


def test_leaves_other_errors_alone():
  with (
    pytest.raises(tf.errors.InvalidArgumentError),
    report_lost_tasks(Cluster(("a:1", "b:22"), 0), lambda: None),
  ):
    raise tf.errors.InvalidArgumentError(None, None, "shapes differ")
