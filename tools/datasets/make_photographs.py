"""Makes a small stand-in for ImageNet from real photographs, in the form of the two official tars.

  python -m tools.datasets.make_photographs --data_dir=data
  python -m tools.prepare_data imagenet2012 --data_dir=data

TensorFlow Datasets (TFDS) prepares `imagenet2012` from them as from the real ones, so everything
that follows the registration at image-net.org can be tried, tested and timed without it. The
photographs come from two Debian packages (25 photographs, a download of about 62 MB, nothing is
installed) or from your own folder (`--photographs=DIR`).

Every image is a random crop of a photograph. Class c shows photograph c mod (number of
photographs), so a network can learn which photograph it sees, but not which of the photograph's
classes. Most images are 500×375 or 375×500 JPEGs of ImageNet's mean size, about 115 kB. As in
ImageNet, a few are not: a PNG named .JPEG and 22 CMYK JPEGs (under the names that TFDS knows and
repairs). Of all images, 1 % each are grey, very small (80×60), or rotated with an EXIF orientation
that records the rotation, and 0.1 % are large (1600×1200).

The same photographs, flags and versions of Pillow and NumPy make the same tars, byte for byte.
Existing tars are never overwritten.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import flags
from PIL import ExifTags, Image, ImageOps
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

from tf_largebatch.errors import UserError, summary
from tools import program
from tools.datasets import mirrors

_TRAIN_TAR, _VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

_DEBIAN_PACKAGES = ("lomiri-wallpapers-16.04", "mate-backgrounds")
_DEBIAN_FOLDERS = ("usr/share/backgrounds", "usr/share/backgrounds/mate/nature")
_NO_PHOTOGRAPHS = ("analogpattern", "umang")  # A pattern and a drawing.

# Images that TFDS repairs: synset → (name, kind).
_REPAIRED = {
  name.partition("_")[0]: (name, kind)
  for kind, names in (
    ("cmyk", imagenet2012_dataset_builder.CMYK_IMAGES),
    ("png", imagenet2012_dataset_builder.PNG_IMAGES),
  )
  for name in names
}
# The other odd images: kind → (period, remainder) of their numbers. The periods and the number of
# classes have no common factor, or else all odd images would belong to the same classes. The
# remainders follow the repaired images, so that a small number of images contains every kind.
_ODD = {"grey": (97, 23), "small": (97, 24), "large": (997, 25), "turned": (97, 26)}
_LONG_SIDE = {"small": 80, "large": 1600}
# The weights give ImageNet's mean size without chroma subsampling.
_QUALITIES = {95: 0.05, 96: 0.05, 97: 0.2, 98: 0.25, 99: 0.45}
# EXIF orientations that cameras write, and what the camera did to the upright picture.
_TURNS = {
  3: Image.Transpose.ROTATE_180,
  6: Image.Transpose.ROTATE_90,
  8: Image.Transpose.ROTATE_270,
}


@dataclasses.dataclass(frozen=True)
class _Image:
  """Everything that determines an image."""

  name: str
  synset: str
  photograph: pathlib.Path
  kind: str
  seed: tuple[int, int, int]  # The run's, the split's and the image's number.


def _lines(name: str) -> list[str]:
  """Returns the lines of a file that the builder `imagenet2012` reads."""
  return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()


def _kind(number: int) -> str:
  """Returns what is odd about an image that TFDS does not repair."""
  odd = (kind for kind, (period, rest) in _ODD.items() if number % period == rest)
  return next(odd, "plain")


def _train_images(count: int, photographs: list[pathlib.Path], seed: int) -> list[_Image]:
  """Returns images of all classes in rotation; those that TFDS repairs come first."""
  labels = {synset: label for label, synset in enumerate(_lines("labels.txt"))}
  synsets = [*_REPAIRED, *(synset for synset in labels if synset not in _REPAIRED)]
  images = []
  for number, synset in enumerate(itertools.islice(itertools.cycle(synsets), count)):
    name, kind = f"{synset}_{number}.JPEG", _kind(number)
    if number < len(_REPAIRED):
      name, kind = _REPAIRED[synset]
    photograph = photographs[labels[synset] % len(photographs)]
    images.append(_Image(name, synset, photograph, kind, (seed, 0, number)))
  return images


def _validation_images(count: int, photographs: list[pathlib.Path], seed: int) -> list[_Image]:
  """Returns images of the classes that TFDS's file of labels assigns to them."""
  labels = {synset: label for label, synset in enumerate(_lines("labels.txt"))}
  images = []
  for number, synset in enumerate(_lines("validation_labels.txt")[:count], start=1):
    name = f"ILSVRC2012_val_{number:08d}.JPEG"
    photograph = photographs[labels[synset] % len(photographs)]
    images.append(_Image(name, synset, photograph, _kind(number), (seed, 1, number)))
  return images


@functools.lru_cache(maxsize=1)  # Images come sorted by photograph, see `_encode_all`.
def _read(photograph: pathlib.Path) -> Image.Image:
  try:
    with Image.open(photograph) as image:
      return ImageOps.exif_transpose(image).convert("RGB")
  except (OSError, Image.DecompressionBombError) as error:
    raise UserError(
      f"Cannot read the photograph {str(photograph)!r} ({summary(error)}); remove or replace it."
    ) from error


def _encode(image: _Image, subsampling: str = "4:4:4", long_side: int = 500) -> bytes:
  """Returns the image file.

  It shows a crop of the photograph that is 1.2 to 3.2 times as long as the image, or less if the
  photograph is too small.
  """
  rng = np.random.default_rng(image.seed)
  photograph = _read(image.photograph)
  shape = (3, 4) if rng.random() < 0.25 else (4, 3)
  unit = min(rng.integers(600, 1601) / 4 * (long_side / 500), *np.divide(photograph.size, shape))
  crop = np.multiply(unit, shape)
  left, top = rng.uniform(0, np.subtract(photograph.size, crop))
  long_side = _LONG_SIDE.get(image.kind, long_side)
  size = tuple(long_side * side // 4 for side in shape)
  box = (left, top, left + crop[0], top + crop[1])
  picture = photograph.resize(size, Image.Resampling.LANCZOS, box)

  quality = int(rng.choice([*_QUALITIES], p=[*_QUALITIES.values()]))
  options = {"format": "JPEG", "quality": quality, "subsampling": subsampling}
  match image.kind:
    case "png":
      options = {"format": "PNG"}
    case "cmyk":
      picture = picture.convert("CMYK")
    case "grey":
      picture = picture.convert("L")
    case "turned":
      orientation = int(rng.choice(list(_TURNS)))
      picture = picture.transpose(_TURNS[orientation])
      options["exif"] = Image.Exif()
      options["exif"][ExifTags.Base.Orientation] = orientation
  file = io.BytesIO()
  picture.save(file, **options)
  return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
  member = tarfile.TarInfo(name)
  member.size = len(content)
  tar.addfile(member, io.BytesIO(content))


def _write_train_tar(path: pathlib.Path, files: Iterable[tuple[_Image, bytes]]) -> None:
  """Writes a tar that contains a tar for each class; the files must be sorted by class."""
  with tarfile.open(path, "w") as outer:
    for synset, members in itertools.groupby(files, lambda file: file[0].synset):
      with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as inner:
          for image, content in members:
            _add(inner, image.name, content)
        _add(outer, f"{synset}.tar", buffer.getvalue())


def _write_validation_tar(path: pathlib.Path, files: Iterable[tuple[_Image, bytes]]) -> None:
  with tarfile.open(path, "w") as tar:
    for image, content in files:
      _add(tar, image.name, content)


@contextlib.contextmanager
def _start_workers() -> Iterator[concurrent.futures.Executor]:
  """Yields one process per core; they all end when the caller fails."""
  workers = concurrent.futures.ProcessPoolExecutor(
    len(os.sched_getaffinity(0)),
    # Ctrl-C also reaches this process, which ends them.
    initializer=signal.signal,
    initargs=(signal.SIGINT, signal.SIG_IGN),
  )
  try:
    yield workers
  finally:
    workers.shutdown(cancel_futures=True)


def _encode_all(
  images: list[_Image],
  encode: Callable[[_Image], bytes],
  workers: concurrent.futures.Executor,
  title: str,
  sizes: list[int],
) -> Iterator[tuple[_Image, bytes]]:
  """Yields the images and their files, sorted by photograph and class; adds to `sizes`."""
  images = sorted(images, key=lambda image: (image.photograph, image.synset, image.seed))
  contents = workers.map(encode, images, chunksize=8)
  bar = tqdm.tqdm(contents, title, len(images), unit="image", disable=None)
  for image, content in zip(images, bar, strict=True):
    sizes.append(len(content))
    yield image, content


def _find_photographs(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the images in a folder, sorted by name.

  Raises:
    UserError: the folder does not exist or contains no image.
  """
  try:
    paths = sorted(folder.iterdir())
  except OSError as error:
    raise UserError(
      f"Cannot read the folder {str(folder)!r} ({error.strerror}); name another."
    ) from error
  found = []
  for path in paths:
    # Skips folders, files that are not images, and images with more pixels than Pillow thinks safe.
    with contextlib.suppress(OSError, Image.DecompressionBombError):
      Image.open(path).close()
      found.append(path)
  if not found:
    raise UserError(f"There is no image in the folder {str(folder)!r}; name another.")
  return found


def _fetch_photographs(directory: pathlib.Path) -> list[pathlib.Path]:
  """Unpacks the Debian packages into `directory` and returns the photographs in them."""
  try:
    mirrors.unpack_debian_packages(_DEBIAN_PACKAGES, directory)
  except UserError as error:
    raise UserError(
      f"Cannot fetch Debian's photographs ({error}); give your own with --photographs=DIR."
    ) from error
  found = [path for name in _DEBIAN_FOLDERS for path in _find_photographs(directory / name)]
  return [path for path in found if not path.name.startswith(_NO_PHOTOGRAPHS)]


def _make(
  manual_dir: pathlib.Path,
  folder: pathlib.Path | None,
  train_images: int,
  validation_images: int,
  seed: int,
  encode: Callable[[_Image], bytes],
) -> str:
  """Makes both tars in `manual_dir`, or neither, and returns a line about them.

  Raises:
    UserError: one of the tars exists, `manual_dir` cannot be written, or the photographs cannot be
      fetched or read.
  """
  for name in (_TRAIN_TAR, _VALIDATION_TAR):
    if (manual_dir / name).exists():
      raise UserError(
        f"{manual_dir / name} exists and is not overwritten; give another --data_dir."
      )
  sizes = []
  try:
    manual_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=manual_dir, prefix=".photographs-") as scratch:
      scratch = pathlib.Path(scratch)
      photographs = _find_photographs(folder) if folder else _fetch_photographs(scratch)
      train = _train_images(train_images, photographs, seed)
      validation = _validation_images(validation_images, photographs, seed)
      with _start_workers() as workers:
        files = _encode_all(train, encode, workers, _TRAIN_TAR, sizes)
        _write_train_tar(scratch / _TRAIN_TAR, files)
        files = _encode_all(validation, encode, workers, _VALIDATION_TAR, sizes)
        _write_validation_tar(scratch / _VALIDATION_TAR, files)
      for name in (_TRAIN_TAR, _VALIDATION_TAR):
        (scratch / name).rename(manual_dir / name)
  except OSError as error:
    raise UserError(
      f"Cannot write to {str(manual_dir)!r} ({error.strerror}); name another --data_dir."
    ) from error
  return (
    f"{manual_dir}: {train_images} training and {validation_images} validation images, crops of "
    f"{len(photographs)} photographs, {np.mean(sizes) / 1000:.1f} kB each on average"
  )


def main() -> None:
  values = flags.FLAGS
  manual_dir = pathlib.Path(values.data_dir).expanduser() / "downloads" / "manual"
  folder = values.photographs
  folder = None if folder is None else pathlib.Path(folder).expanduser()
  counts = (values.train_images, values.validation_images)
  encode = functools.partial(
    _encode, subsampling=values.chroma_subsampling, long_side=values.long_side
  )
  print(_make(manual_dir, folder, *counts, values.seed, encode))


def define_flags() -> None:
  flags.DEFINE_string(
    "data_dir",
    "~/tensorflow_datasets",
    "Directory of the prepared data sets (TFDS); the tars go to downloads/manual in it.",
  )
  flags.DEFINE_string(
    "photographs",
    None,
    "Folder with the photographs to use. Default: the photographs of two Debian packages.",
  )
  flags.DEFINE_integer("train_images", 5000, "Number of training images.", lower_bound=1)
  flags.DEFINE_integer(
    "validation_images",
    500,
    "Number of validation images, at most the 50000 whose labels TFDS knows.",
    lower_bound=1,
    upper_bound=50_000,
  )
  flags.DEFINE_integer(
    "seed", 0, "Seed of the crops, the shapes and the JPEG qualities.", lower_bound=0
  )
  flags.DEFINE_integer(
    "long_side", 500, "Length in pixels of most images; 4000 makes 12 megapixels.", lower_bound=8
  )
  flags.DEFINE_enum(
    "chroma_subsampling",
    "4:4:4",
    ["4:4:4", "4:2:2", "4:2:0"],
    "Of the JPEGs. Cameras write 4:2:2 or 4:2:0: fewer bytes, and faster to decode.",
  )


if __name__ == "__main__":
  program.run(main, define_flags)
