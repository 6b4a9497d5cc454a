"""Tests of `preparation`, which never use the network."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from tests import locks_test
from tests.launching import ROOT
from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError

_LOG = "TINY_SHAPES_LOG"  # Path of a file that counts the preparations of TinyShapes.
_FAULT = "TINY_SHAPES_FAULT"


class TinyShapes(tfds.core.GeneratorBasedBuilder):
  """A data set of three images that needs no download."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(shape=(2, 2, 3)), "label": np.int64}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    with open(os.environ[_LOG], "a") as log:
      log.write("prepared\n")
    for index in range(3):
      if index == 2 and _FAULT in os.environ:
        raise OSError("the disk\nis full")
      yield index, {"image": np.full((2, 2, 3), index, np.uint8), "label": index}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  def get(url, **_):
    raise requests.ConnectionError(f"{url} in a test")

  monkeypatch.setattr(requests, "get", get)


@pytest.fixture
def log(tmp_path, monkeypatch):
  path = tmp_path / "log"
  monkeypatch.setenv(_LOG, str(path))
  return path


def _message(dataset, data_dir, file_format=None, mirrors=None):
  with pytest.raises(UserError) as error:
    preparation.prepare(dataset, str(data_dir), file_format, mirrors)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("name", ["cifar1", "CIFAR10", "cifar10x/config:1.0.0"])
def test_unknown_name_is_answered_with_close_names(name, tmp_path):
  message = _message(name, tmp_path)
  assert repr(name) in message
  assert "did you mean cifar10 " in message
  assert "synthetic" in message


@pytest.mark.parametrize("name", ["", "no such thing", "kaggle:cifar10", "huggingface:cifar10"])
def test_unknown_names_never_reach_the_network(name, tmp_path):
  assert f"has no dataset {name!r}" in _message(name, tmp_path)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10/no_config", "cifar10:9.9.9", "cifar10/:"])
def test_unknown_config_or_version_is_a_users_mistake(name, tmp_path):
  assert repr(name) in _message(name, tmp_path)


def test_prepares_once_and_then_touches_nothing(tmp_path, log, monkeypatch):
  data_dir = tmp_path / "data"
  preparation.prepare("tiny_shapes", str(data_dir))
  dataset = tfds.load("tiny_shapes", split="train", data_dir=data_dir, download=False)
  assert sorted(int(example["label"]) for example in dataset) == [0, 1, 2]
  assert not (data_dir / ".preparation").exists()
  lock = data_dir / ".preparation.lock"
  lock.unlink()

  monkeypatch.setattr(preparation, "_prepare_from_any_origin", None)
  preparation.prepare("tiny_shapes", str(data_dir))
  assert log.read_text() == "prepared\n"
  assert not lock.exists()  # So the directory need not be writable.


def test_a_data_set_has_one_file_format(tmp_path, log):
  assert "'tiny_shapes': " in _message("tiny_shapes", tmp_path, "parchment")
  preparation.prepare("tiny_shapes", str(tmp_path), "array_record")
  directory = tmp_path / "tiny_shapes" / "1.0.0"
  assert (directory / "tiny_shapes-train.array_record-00000-of-00001").exists()
  assert not [*directory.glob("*tfrecord*")]
  source = tfds.builder("tiny_shapes", data_dir=tmp_path).as_data_source("train")
  assert sorted(int(example["label"]) for example in source) == [0, 1, 2]

  # Also for a given version, for which TFDS reads the files and not the code.
  for name in ("tiny_shapes", "tiny_shapes:1.0.0"):
    preparation.prepare(name, str(tmp_path))
    preparation.prepare(name, str(tmp_path), "array_record")
    message = _message(name, tmp_path, "tfrecord")
    assert message.startswith(f"{name} is prepared as array_record in {directory}; for tfrecord ")
  assert log.read_text() == "prepared\n"


def test_failed_preparation_leaves_nothing_that_looks_finished(tmp_path, log, monkeypatch):
  data_dir = tmp_path / "data"
  monkeypatch.setenv(_FAULT, "1")
  assert "the disk is full" in _message("tiny_shapes", data_dir)
  assert not tfds.builder("tiny_shapes", data_dir=data_dir).is_prepared()
  left = [path.name for path in data_dir.rglob("*") if path.is_file()]
  assert left == [".preparation.lock"]

  monkeypatch.delenv(_FAULT)
  preparation.prepare("tiny_shapes", str(data_dir))
  assert tfds.builder("tiny_shapes", data_dir=data_dir).info.splits["train"].num_examples == 3


def test_leftovers_of_a_killed_process_are_removed(tmp_path, log):
  remains = tmp_path / ".preparation" / "manual"
  remains.mkdir(parents=True)
  preparation.prepare("tiny_shapes", str(tmp_path))
  assert not remains.parent.exists()


def test_of_two_processes_one_prepares_and_one_waits(tmp_path, log):
  data_dir = tmp_path / "data"
  code = (
    "import sys; from absl import logging; logging.set_verbosity(logging.INFO);"
    "from tests.data.preparation_test import preparation; "
    "preparation.prepare('tiny_shapes', sys.argv[1])"
  )
  outputs = [tmp_path / "output0", tmp_path / "output1"]

  def waiting():
    return sum("Waiting for another process" in path.read_text() for path in outputs)

  with preparation._exclusive_scratch_dir(str(data_dir)):
    processes = []
    for path in outputs:
      with open(path, "w") as output:
        command = [sys.executable, "-c", code, str(data_dir)]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output))
    deadline = time.monotonic() + 60
    while waiting() < 2 and all(process.poll() is None for process in processes):
      assert time.monotonic() < deadline
      time.sleep(0.05)
    assert waiting() == 2
    assert not log.exists()
  assert [process.wait(timeout=60) for process in processes] == [0, 0]
  assert log.read_text() == "prepared\n"
  assert tfds.builder("tiny_shapes", data_dir=data_dir).is_prepared()


@pytest.mark.parametrize("kind", ["record", "lease"])
def test_it_waits_on_file_systems_without_flock_too(kind, tmp_path, log, monkeypatch, caplog):
  locks_test.leave(kind, monkeypatch.setattr)
  with locks_test.holder(tmp_path / ".preparation.lock", kind) as process:
    timer = threading.Timer(1, process.stdin.close)
    timer.start()
    with caplog.at_level("INFO", logger="absl"):
      preparation.prepare("tiny_shapes", str(tmp_path))
    timer.join()
  assert "Waiting for another process that prepares data in" in caplog.text
  assert log.read_text() == "prepared\n"


def test_what_another_process_prepared_while_we_waited_is_found(tmp_path, log, monkeypatch):
  exclusive_scratch_dir = preparation._exclusive_scratch_dir

  @contextlib.contextmanager
  def wait_for_another_process(data_dir):
    tfds.builder("tiny_shapes", data_dir=data_dir).download_and_prepare()
    with exclusive_scratch_dir(data_dir) as scratch:
      yield scratch

  monkeypatch.setattr(preparation, "_exclusive_scratch_dir", wait_for_another_process)
  monkeypatch.setattr(preparation, "_prepare_from_any_origin", None)
  preparation.prepare("tiny_shapes", str(tmp_path))
  assert log.read_text() == "prepared\n"


def test_data_dir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
    message = _message("cifar10", data_dir)
    assert "Cannot write" in message
    assert repr(str(data_dir)) in message


def test_if_no_origin_works_the_message_says_which_file_goes_where(tmp_path):
  message = _message("cifar10", tmp_path)
  assert f"put cifar-10-binary.tar.gz into {tmp_path}/downloads/manual" in message
  assert f"or run python -m tools.prepare_data cifar10 --data_dir={tmp_path}, " in message
  assert "www.cs.toronto.edu cannot be reached" in message
  message = _message("fashion_mnist", tmp_path)
  assert "t10k-labels-idx1-ubyte.gz" in message
  assert "python -m tools.prepare_data fashion_mnist " in message
  message = _message("cifar100", tmp_path)
  assert "cifar-100-binary.tar.gz" in message
  assert "tools.prepare_data" not in message


def test_the_mirror_of_a_data_set_is_the_last_origin(tmp_path):
  built = []

  def build(builder, scratch):
    built.append(builder.name)
    assert scratch.is_absolute() and not os.listdir(scratch)
    if len(built) == 2:
      raise preparation.OriginError("the mirror is down")

  mirrors = {"cifar10": ("a mirror", build)}
  preparation.prepare("cifar10", str(tmp_path), mirrors=mirrors)
  message = _message("cifar10", tmp_path, mirrors=mirrors)
  assert message.endswith("; a mirror: the mirror is down")
  assert "tools.prepare_data" not in message  # That program would do the same again.
  _message("cifar100", tmp_path, mirrors=mirrors)
  assert built == ["cifar10", "cifar10"]


def test_imagenet_names_the_missing_archive_only(tmp_path):
  manual_dir = tmp_path / "downloads" / "manual"
  manual_dir.mkdir(parents=True)
  (manual_dir / "ILSVRC2012_img_train.tar").touch()
  message = _message("imagenet2012", tmp_path)
  assert f"put ILSVRC2012_img_val.tar into {manual_dir}" in message
  assert "Tried" not in message


def test_a_file_of_the_users_with_a_wrong_digest_is_refused(tmp_path):
  manual_dir = tmp_path / "downloads" / "manual"
  manual_dir.mkdir(parents=True)
  (manual_dir / "cifar-10-binary.tar.gz").write_bytes(b"something else")
  message = _message("cifar10", tmp_path)
  assert f"files in {manual_dir}: " in message
  assert "wrong checksum" in message
  # TFDS's download does not use it, as it would fail in the same way.
  assert "the internet: www.cs.toronto.edu cannot be reached" in message


@pytest.mark.parametrize(("status", "is_up"), [(200, True), (404, True), (503, False)])
def test_probe_of_hosts(status, is_up, monkeypatch):
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(status)
      self.end_headers()

    def log_message(self, *args):
      pass

  monkeypatch.undo()  # The real requests.get.
  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Nothing listens on port 1; one host that answers is enough.
    urls = ["http://127.0.0.1:1/a", f"http://127.0.0.1:{server.server_port}/b"]
    if is_up:
      preparation._check_that_a_host_answers(urls)
    else:
      with pytest.raises(preparation.OriginError, match=r"127.0.0.1:1 cannot .* HTTP status 503"):
        preparation._check_that_a_host_answers(urls)
    server.shutdown()


def test_cached_download_needs_no_host(tmp_path, monkeypatch):
  probed = []
  monkeypatch.setattr(preparation, "_check_that_a_host_answers", probed.append)
  monkeypatch.setattr(preparation, "build", lambda *args: None)
  builder = tfds.builder("cifar10", data_dir=tmp_path)
  preparation._build_from_internet(builder, tmp_path, tmp_path)
  url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
  assert probed.pop() == [url]
  info = tmp_path / "downloads" / "cifar10" / "x.tar.gz.INFO"
  info.parent.mkdir(parents=True)
  info.write_text(json.dumps({"urls": [url]}))
  preparation._build_from_internet(builder, tmp_path, tmp_path)
  assert probed.pop() == []
