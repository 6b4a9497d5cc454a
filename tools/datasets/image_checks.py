"""Decodes each image once, as the trainer will, and names what is wrong with a set of images."""

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator

import tensorflow as tf
import tqdm
from absl import logging

from tf_largebatch.errors import UserError, summary
from tf_largebatch.machine import usable_cores
from tools.datasets.image_files import ImageFile, ImageSet, listing, sort_classes

# First bytes of the formats that TensorFlow decodes, and of others: (offset, bytes, name).
_DECODABLE = (
  *((0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG", "PNG"), (0, b"GIF8", "GIF"), (0, b"BM", "BMP")),
)
_FOREIGN = (
  *((0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (8, b"WEBP", "WebP"), (4, b"ftypavif", "AVIF")),
  *((4, b"ftyphe", "HEIC"), (4, b"ftypmif1", "HEIC"), (4, b"jP  ", "JPEG 2000")),
)
# Files with these endings are meant as images; what is neither that nor looks like one is ignored.
_ENDINGS = (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".heic")
_UNREADABLE, _FOREIGN_FORMAT, _DEEP, _IGNORED = "unreadable", "foreign", "deep", "ignored"
# Kind of fault → (what is wrong with the files, what to do).
_FAULTS = {
  _UNREADABLE: ("cannot be decoded", "replace or remove them"),
  _FOREIGN_FORMAT: ("in formats that TensorFlow does not decode", "convert them to JPEG or PNG"),
  _DEEP: ("16-bit PNGs, whose lower 8 bits would be lost", "scale them to 8 bits"),
}


@dataclasses.dataclass(frozen=True)
class _Facts:
  """What a file contains: a fault and its reason, or a digest of its bytes and a shape (HWC)."""

  fault: str | None = None
  reason: str = ""
  digest: bytes = b""
  shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckedImages:
  """Images without faults, and the shape that all have in common (None: none)."""

  images: ImageSet
  shape: tuple[int, ...] | None


def check(images: ImageSet) -> CheckedImages:
  """Returns the files that are images, after warnings about those that may be a mistake.

  Raises:
    UserError: files cannot be decoded, or not as the trainer needs them; a class has no image for
      training, or only one class has.
  """
  splits, facts = {}, {}
  faults = collections.defaultdict(list)
  for split, files in images.splits.items():
    splits[split] = []
    bar = tqdm.tqdm(in_order(_examine, files), f"Checking {split}", len(files), disable=None)
    for file, found in zip(files, bar, strict=True):
      if found.fault is None:
        splits[split].append(file)
        facts[split, file] = found
      else:
        reason = f" ({found.reason})" if found.reason else ""
        faults[found.fault].append(f"{file.path}{reason}")
  if ignored := faults.pop(_IGNORED, []):
    logging.warning("Ignored, not images: %d files (%s).", len(ignored), listing(ignored))
  if faults:
    total = sum(map(len, images.splits.values()))
    parts = [
      f"{what}: {len(faults[fault])} of {total} files ({listing(faults[fault])}); {advice}."
      for fault, (what, advice) in _FAULTS.items()
      if fault in faults
    ]
    raise UserError(f"{images.origin}: {' '.join(parts)}")
  checked = dataclasses.replace(images, splits=splits)
  _check_classes(checked)
  _warn_of_duplicates({key: found.digest for key, found in facts.items()})
  shapes = {found.shape for found in facts.values()}
  return CheckedImages(checked, shapes.pop() if len(shapes) == 1 else None)


def in_order(function: Callable, items: Iterable) -> Iterator:
  """Yields function(item) of each item in order, computed on all cores and not far ahead."""
  workers = usable_cores()
  pending = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > 4 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def _examine(file: ImageFile) -> _Facts:
  try:
    content = file.path.read_bytes()
  except OSError as error:
    return _Facts(_UNREADABLE, error.strerror)
  if foreign := _format(content, _FOREIGN):
    return _Facts(_FOREIGN_FORMAT, foreign)
  found = _format(content, _DECODABLE)
  if found is None:
    is_meant = file.path.suffix.lower() in _ENDINGS
    reason = "not an image" if content else "empty"
    return _Facts(_UNREADABLE, reason) if is_meant else _Facts(_IGNORED)
  if found == "PNG" and content[24:25] == b"\x10":  # The bit depth in the header, IHDR.
    return _Facts(_DEEP)
  try:
    image = tf.io.decode_image(content, channels=3, expand_animations=False)
  except tf.errors.OpError as error:
    return _Facts(_UNREADABLE, summary(error)[:80])
  digest = hashlib.blake2b(content, digest_size=16).digest()
  return _Facts(digest=digest, shape=tuple(image.shape))


def _format(content: bytes, formats: Iterable[tuple[int, bytes, str]]) -> str | None:
  return next((name for at, magic, name in formats if content.startswith(magic, at)), None)


def _check_classes(images: ImageSet) -> None:
  """Raises a UserError if training on the classes cannot be right; warns if it may not be."""
  labels = {split: {file.label for file in files} for split, files in images.splits.items()}
  for split, found in labels.items():
    if unseen := sort_classes(found - labels["train"]):
      raise UserError(
        f"{images.origin}: {split} has classes that train lacks: {listing(unseen)}; add images of "
        "them to train, or remove them."
      )
  for split, found in labels.items():
    absent = sort_classes(set(images.classes) - found)
    if absent and split == "train":
      raise UserError(
        f"{images.origin}: classes without images: {listing(absent)}; add images, or remove them."
      )
    if absent:
      logging.warning("%s has no images of %s.", split, listing(absent))
  if len(images.classes) < 2:
    raise UserError(
      f"{images.origin} has one class, {images.classes[0]}; classification needs two or more."
    )
  unusable = [name for name in images.classes if name != name.strip() or not name.isprintable()]
  if unusable:
    raise UserError(
      f"{images.origin}: names of classes with unprintable characters, or spaces at an end: "
      f"{listing([repr(name) for name in unusable])}; rename them."
    )


def _warn_of_duplicates(digests: dict[tuple[str, ImageFile], bytes]) -> None:
  """Warns of files with the same bytes: in one split, of two classes, in two splits."""
  first: dict[bytes, tuple[str, ImageFile]] = {}
  pairs = collections.defaultdict(list)
  for (split, file), digest in digests.items():
    first_split, original = first.setdefault(digest, (split, file))
    if original is not file:
      kind = (split, first_split, original.label == file.label)
      pairs[kind].append(f"{file.name} = {original.name}")
  for (split, first_split, same_class), names in pairs.items():
    logging.warning(
      "Images of %s with the same bytes as others of %s%s: %d (%s).%s",
      *(split, first_split, "" if same_class else ", but of another class", len(names)),
      listing(names),
      "" if split == first_split else f" The error on {split} will be too low.",
    )
