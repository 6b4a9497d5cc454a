"""The status of a Kubeflow TrainJob: progress, time left and metrics, sent while the run trains.

Kubeflow Trainer (version 2.2 and later, with its feature gate TrainJobStatus) sets in each pod

  KUBEFLOW_TRAINER_SERVER_URL      where to POST the status
  KUBEFLOW_TRAINER_SERVER_CA_CERT  a file with the certificate of the server's authority
  KUBEFLOW_TRAINER_SERVER_TOKEN    a file with the pod's token, which Kubernetes renews

and shows the status in `kubectl get trainjob`. A thread sends the newest status, so that the run
does not wait. If the server does not take it, the trainer logs why and trains on.

Source: Kubeflow Trainer 2.3, KEP-2779 and `UpdateTrainJobStatusRequest`.
"""

import contextlib
import datetime
import http.client
import json
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping

from absl import logging

from tf_largebatch import threads
from tf_largebatch.errors import summary

_URL = "KUBEFLOW_TRAINER_SERVER_URL"
_CA_CERT = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"
_SECONDS_BETWEEN = 5.0  # As Kubeflow's own SDK; the server limits the rate.
_TIMEOUT = 5.0  # Seconds, for the connection and for the answer.
_FAILURES = (OSError, http.client.HTTPException, ValueError)  # ValueError: a bad URL or token.


@contextlib.contextmanager
def reporting(
  environ: Mapping[str, str], total_steps: int
) -> Iterator[Callable[[str, dict], None]]:
  """Sends a run's status while the context is open, and once more at its end.

  Args:
    environ: without KUBEFLOW_TRAINER_SERVER_URL, nothing is sent.
    total_steps: steps of the whole run.

  Yields:
    A function of a group of scalars, such as "train", and a record with "step", which makes the
    status that is sent next.
  """
  if not environ.get(_URL):
    yield lambda group, record: None
    return
  status = _Status(total_steps)
  with threads.running(_send_in_turns, status, environ):
    yield status.update


class _Status:
  """The newest status of a run.

  Attributes:
    content: as Kubeflow's TrainerStatus; None before the first record.
  """

  def __init__(self, total_steps: int):
    self._total_steps = total_steps
    self._metrics: dict[str, dict] = {}  # By group.
    self._began: tuple[float, int] | None = None  # The time and step of the first record.
    self.content: dict | None = None

  def update(self, group: str, record: dict) -> None:
    """Takes a record in; its metrics are named as in TensorBoard, such as "train/loss"."""
    now, step = time.monotonic(), record["step"]
    self._began = self._began or (now, step)
    self._metrics[group] = {
      f"{group}/{name}": value for name, value in record.items() if name not in ("kind", "step")
    }
    content = {
      "progressPercentage": 100 * step // self._total_steps,
      "metrics": [
        {"name": name, "value": str(value)}
        for metrics in self._metrics.values()
        for name, value in metrics.items()
      ],
      "lastUpdatedTime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    left, steps = self._total_steps - step, step - self._began[1]
    if steps or not left:  # The speed takes two records to know.
      seconds = left * (now - self._began[0]) / max(1, steps)
      content["estimatedRemainingSeconds"] = round(seconds)
    self.content = content


def _send_in_turns(status: _Status, environ: Mapping[str, str], ended) -> None:
  sent, failing, last = None, False, False
  while not last:
    last = ended.wait(_SECONDS_BETWEEN)
    content = status.content
    if content is sent:
      continue
    sent = content
    try:
      _post(content, environ)
      failing = False
    except _FAILURES as error:
      if not failing:
        logging.warning(
          "Kubeflow did not take the status of this run (%s=%s: %s); training continues.",
          _URL,
          environ[_URL],
          summary(error),
        )
      failing = True


def _post(content: dict, environ: Mapping[str, str]) -> None:
  """Sends a status. Uses no proxy and follows no redirect, which would get the token too.

  Raises:
    OSError, HTTPException, ValueError: it could not be sent, or was refused.
  """
  url = urllib.parse.urlsplit(environ[_URL])
  headers = {"Content-Type": "application/json"}
  if environ.get(_TOKEN):
    with open(environ[_TOKEN], encoding="utf-8") as file:
      headers["Authorization"] = f"Bearer {file.read().strip()}"
  if url.scheme == "https":
    context = ssl.create_default_context(cafile=environ.get(_CA_CERT) or None)
    connection = http.client.HTTPSConnection(
      url.hostname or "", url.port, timeout=_TIMEOUT, context=context
    )
  elif url.scheme == "http":
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_TIMEOUT)
  else:
    raise ValueError("not an http or https URL")
  with contextlib.closing(connection):
    connection.request("POST", url.path or "/", json.dumps({"trainerStatus": content}), headers)
    response = connection.getresponse()
    if response.status != http.HTTPStatus.OK:
      raise OSError(f"HTTP status {response.status} {response.reason}")
