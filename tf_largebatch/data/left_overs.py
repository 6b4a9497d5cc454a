"""What an interrupted preparation leaves in TFDS's data directory, and its removal.

TFDS writes a data set into `incomplete.<random>_<version>` beside its directory and renames that at
the end. A process that ends meanwhile leaves it: over 100 GB for ImageNet. Preparations under our
lock use a name of our own, so whoever holds the lock knows that nobody uses what has that name.
"""

import contextlib
import functools
import itertools
import pathlib
import re
import shutil
import time
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging

from tf_largebatch.signals import cleaning_up

# TFDS's form of name, with our word in place of six random letters.
_OURS = "incomplete.LARGEB_{}"
# Of TFDS itself, or of versions of this package that did not choose the name; and its downloads.
_TFDS_DIR = re.compile(r"incomplete\.[A-Z0-9]{6}_.+|.+\.tmp\.[0-9a-f]{32}")
# A preparation or download that has written nothing for so long is not running.
_IDLE_SECONDS = 24 * 3600
_RETRIES = 50


@contextlib.contextmanager
def removable(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
  """Has TFDS write into a directory of our name, which is removed if a signal ends the process.

  The caller must hold the lock of the data directory. On `gs://`, without locks, TFDS's own name
  stays.
  """
  if "://" in str(builder.data_dir):
    yield
    return
  original = tfds.core.utils.incomplete_dir
  tfds.core.utils.incomplete_dir = _incomplete_dir
  try:
    yield
  finally:
    tfds.core.utils.incomplete_dir = original


@contextlib.contextmanager
def _incomplete_dir(dirname: str, permissions=None, overwrite: bool = False) -> Iterator[str]:
  """Replaces TFDS's function of the same name and arguments."""
  del permissions, overwrite  # TFDS passes them on only when it replaces prepared data.
  final = pathlib.Path(dirname)
  directory = final.with_name(_OURS.format(final.name))
  directory.mkdir(parents=True)
  with cleaning_up(functools.partial(remove_tree, directory)):
    try:
      yield f"{directory}/"
      directory.rename(final)
    finally:
      shutil.rmtree(directory, ignore_errors=True)


def remove_tree(directory: pathlib.Path) -> None:
  """Removes a directory into which this process's main thread may still be writing."""
  for _ in range(_RETRIES):
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
      return
    time.sleep(0.1)


def remove(data_dir: str) -> None:
  """Removes what interrupted preparations left in `data_dir`, whose lock the caller must hold.

  What TFDS made under its own names may belong to a program that does not take the lock. It is
  removed only if nothing was written to it for a day, and else named in a warning.
  """
  parents = [pathlib.Path(data_dir).glob(pattern) for pattern in ("*", "*/*")]
  directories = [path for parent in itertools.chain(*parents) for path in _directories(parent)]
  for directory in directories:
    if re.fullmatch(_OURS.format(".+"), directory.name):
      logging.info("Removing %s, left over from an interrupted preparation.", directory)
      shutil.rmtree(directory, ignore_errors=True)
    elif _TFDS_DIR.fullmatch(directory.name):
      _remove_if_idle(directory)


def _directories(parent: pathlib.Path) -> list[pathlib.Path]:
  with contextlib.suppress(OSError):  # Not a directory, or not ours to read.
    return [path for path in parent.iterdir() if path.is_dir()]
  return []


def _remove_if_idle(directory: pathlib.Path) -> None:
  stats = []
  with contextlib.suppress(OSError):
    stats = [path.stat() for path in directory.rglob("*") if path.is_file()]
  if not stats:  # It takes no space, and TFDS may still be downloading what it will write there.
    return
  size = tfds.core.utils.Size(sum(stat.st_size for stat in stats))
  if time.time() - max(stat.st_mtime for stat in stats) > _IDLE_SECONDS:
    logging.info("Removing %s (%s), to which nothing was written for a day.", directory, size)
    shutil.rmtree(directory, ignore_errors=True)
  else:
    logging.warning(
      "%s (%s) belongs to a preparation that is running or was interrupted; remove it if none is "
      "running.",
      *(directory, size),
    )
