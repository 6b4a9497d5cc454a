"""The status that a run sends to Kubeflow, against a local server."""

import contextlib
import datetime
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import types

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1UpdateTrainJobStatusRequest as Request

from tests.training.small_runs import STEPS, train
from tf_largebatch.training import trainjob_status
from tf_largebatch.training.metrics import read_metrics

_PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/kn8192/status"


class _Server(http.server.ThreadingHTTPServer):
  """Answers each request with `status` and keeps it.

  Attributes:
    requests: (path, headers, body) of each.
  """

  def __init__(self, status=200, location=None, certificate=None):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.status, self.location, self.requests = status, location, []
    if certificate is not None:
      context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
      context.load_cert_chain(*certificate)
      self.socket = context.wrap_socket(self.socket, server_side=True)
    scheme = "http" if certificate is None else "https"
    self.url = f"{scheme}://127.0.0.1:{self.server_address[1]}{_PATH}"

  @property
  def statuses(self):
    """What each request reported, after Kubeflow's own model has read it."""
    bodies = [json.loads(body) for _, _, body in self.requests]
    for body in bodies:
      understood = Request.from_dict(body).to_dict()
      updated = datetime.datetime.fromisoformat(body["trainerStatus"]["lastUpdatedTime"])
      assert understood["trainerStatus"].pop("lastUpdatedTime") == updated
      expected = {name: x for name, x in body["trainerStatus"].items() if name != "lastUpdatedTime"}
      assert understood == {"trainerStatus": expected}  # No field is unknown.
    return [body["trainerStatus"] for body in bodies]

  def handle_error(self, request, client_address):
    """A client that does not trust the certificate leaves; that needs no traceback."""


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    self.server.requests.append((self.path, dict(self.headers), body))
    self.send_response(self.server.status)
    if self.server.location:
      self.send_header("Location", self.server.location)
    self.end_headers()

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serving(**arguments):
  with _Server(**arguments) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


@pytest.fixture
def variables(tmp_path):
  token = tmp_path / "token"
  token.write_text("secret\n")
  return {"KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}


def report_once(variables, url, record=None):
  with trainjob_status.reporting(
    variables | {"KUBEFLOW_TRAINER_SERVER_URL": url}, total_steps=200
  ) as report:
    report("train", record or {"kind": "train", "step": 50, "loss": 0.25})


def wait_for(server, requests):
  deadline = time.monotonic() + 30
  while len(server.requests) < requests:
    assert time.monotonic() < deadline
    time.sleep(0.001)


def test_a_run_reports_its_progress(tmp_path, variables, monkeypatch):
  monkeypatch.setattr(trainjob_status, "_SECONDS_BETWEEN", 0.01)
  with serving() as server:
    for name, value in (variables | {"KUBEFLOW_TRAINER_SERVER_URL": server.url}).items():
      monkeypatch.setenv(name, value)
    train(tmp_path / "run")
  for path, headers, _ in server.requests:
    assert path == _PATH
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
  statuses = server.statuses
  progress = [status["progressPercentage"] for status in statuses]
  assert progress == sorted(progress) and progress[0] < 50 and progress[-1] == 100
  assert statuses[-1]["estimatedRemainingSeconds"] == 0
  records = read_metrics(str(tmp_path / "run"))
  last = {record["kind"]: record for record in records}  # The last of each.
  assert last["train"]["step"] == last["eval"]["step"] == STEPS
  assert {each["name"]: each["value"] for each in statuses[-1]["metrics"]} == {
    f"{group}/{name}": str(value)
    for group, kind in (("train", "train"), ("validation", "eval"))
    for name, value in last[kind].items()
    if name not in ("kind", "step")
  }


def test_the_time_left_is_extrapolated_from_this_sessions_steps(variables, monkeypatch):
  now = [1000.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(trainjob_status, "time", clock)
  monkeypatch.setattr(trainjob_status, "_SECONDS_BETWEEN", 0.01)
  left = []
  with serving() as server:
    url = {"KUBEFLOW_TRAINER_SERVER_URL": server.url}
    with trainjob_status.reporting(variables | url, total_steps=200) as report:
      for step, seconds in ((80, 0), (90, 15), (110, 45), (200, 180)):
        now[0] = 1000 + seconds
        report("train", {"kind": "train", "step": step})
        wait_for(server, len(left) + 1)
        left.append(server.statuses[-1].get("estimatedRemainingSeconds"))
  # 1.5 s a step, which takes two records to know.
  assert left == [None, 110 * 1.5, 90 * 1.5, 0]
  assert [status["progressPercentage"] for status in server.statuses] == [40, 45, 55, 100]


def test_a_resumed_run_that_only_evaluates_has_no_time_left(variables):
  with serving() as server:
    report_once(variables, server.url, {"kind": "eval", "step": 200, "error": 0.1})
  (status,) = server.statuses
  assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (100, 0)


def test_nothing_is_sent_without_a_server_or_a_record(variables):
  before = threading.active_count()
  with trainjob_status.reporting(variables, 200) as report:
    report("train", {"kind": "train", "step": 1})
    assert threading.active_count() == before
  with serving() as server:
    url = {"KUBEFLOW_TRAINER_SERVER_URL": server.url}
    with trainjob_status.reporting(variables | url, 200):
      pass
  assert server.requests == []


@pytest.fixture
def certificate(tmp_path):
  """Files of a certificate for 127.0.0.1 that signs itself, and of its key."""
  openssl = shutil.which("openssl")
  if openssl is None:
    pytest.skip("needs openssl")
  paths = [str(tmp_path / name) for name in ("certificate.pem", "key.pem")]
  files = ["-out", paths[0], "-keyout", paths[1]]
  names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
  command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
  subprocess.run([*command, *files, *names], check=True, capture_output=True)
  return paths


def test_the_server_must_have_a_certificate_of_its_authority(variables, certificate, caplog):
  authority = {"KUBEFLOW_TRAINER_SERVER_CA_CERT": certificate[0]}
  with serving(certificate=certificate) as server:
    report_once(variables | authority, server.url)
    assert len(server.requests) == 1
    assert caplog.text == ""
    report_once(variables, server.url)  # Only the system's authorities.
    assert len(server.requests) == 1
  assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


@pytest.mark.parametrize("status", [302, 307, 403, 500])
def test_a_refused_status_is_logged_once(variables, monkeypatch, caplog, status):
  monkeypatch.setattr(trainjob_status, "_SECONDS_BETWEEN", 0.01)
  with serving() as other, serving(status=status, location=other.url) as server:
    url = {"KUBEFLOW_TRAINER_SERVER_URL": server.url}
    with trainjob_status.reporting(variables | url, 200) as report:
      for step in range(3):
        report("train", {"kind": "train", "step": step})
        wait_for(server, step + 1)
    assert other.requests == []  # It would have got the token.
  (record,) = caplog.records
  assert f"HTTP status {status}" in record.getMessage()
  assert record.getMessage().endswith("; training continues.")


@pytest.mark.parametrize(
  "url, message",
  [
    ("ftp://127.0.0.1/", "not an http or https URL"),
    ("127.0.0.1:80", "not an http or https URL"),
    ("http://127.0.0.1:port/", "port"),
    ("http://[::1/", "Invalid IPv6 URL"),
    ("http:///status", ""),
    ("http://127.0.0.1:1/\n", "refused"),
    ("https://name.invalid/", "Name or service|name resolution"),
  ],
)
def test_a_url_that_cannot_be_used_is_logged(variables, caplog, url, message):
  report_once(variables, url)
  (record,) = caplog.records
  assert any(text in record.getMessage() for text in message.split("|"))


def test_a_token_that_cannot_be_used_is_logged(tmp_path, caplog):
  token = tmp_path / "token"
  with serving() as server:
    report_once({"KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}, server.url)
    token.write_bytes(b"\xff")
    report_once({"KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}, server.url)
    token.write_text("a\nb: c")  # Another header.
    report_once({"KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}, server.url)
  assert server.requests == []
  assert len(caplog.records) == 3


def test_a_server_that_does_not_answer_delays_the_end_by_seconds_at_most(
  variables, monkeypatch, caplog
):
  monkeypatch.setattr(trainjob_status, "_TIMEOUT", 0.1)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    report_once(variables, f"http://127.0.0.1:{silent.getsockname()[1]}/")
  assert "timed out" in caplog.text
