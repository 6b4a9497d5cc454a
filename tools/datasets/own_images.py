"""Prepares a user's images as a TensorFlow Datasets (TFDS) set, with the files' bytes unchanged."""

import hashlib
import json
import re

import tensorflow_datasets as tfds

from tf_largebatch.data import preparation
from tf_largebatch.data.sources import GENERATED
from tf_largebatch.errors import UserError
from tf_largebatch.training.resolution import SMALL
from tools.datasets import image_checks
from tools.datasets.image_files import ImageSet

_VERSION = "1.0.0"
_FINGERPRINT = "fingerprint"  # In TFDS's metadata.
_RESERVED = {"downloads", *GENERATED}


def prepare(name: str, images: ImageSet, data_dir: str, file_format: str | None) -> None:
  """Makes sure that the images are prepared as `name` under `data_dir`.

  Raises:
    UserError: the name is not possible or belongs to other data, or something is wrong with the
      images (see `image_checks.check`).
  """
  _check_name(name)
  fingerprint = _fingerprint(images)
  if not _is_prepared(name, fingerprint, data_dir):
    builder_class = _make_builder_class(name, image_checks.check(images), fingerprint)
    preparation.prepare_with(builder_class, data_dir, file_format)
    _is_prepared(name, fingerprint, data_dir)  # By this process, or by another meanwhile.
  preparation.prepare(name, data_dir, file_format)  # Checks the format.


def _check_name(name: str) -> None:
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f"{name!r} cannot be the name of a data set: use lower-case letters, digits and underscores, "
      "such as my_flowers."
    )
  if name in _RESERVED or name in tfds.list_builders(with_community_datasets=False):
    raise UserError(f"{name} is the name of another data set; choose another, such as my_{name}.")


def _fingerprint(images: ImageSet) -> str:
  """Returns a digest of the names, classes and sizes of all files."""
  digest = hashlib.sha256()
  for split, files in images.splits.items():
    for file in files:
      size = file.path.stat().st_size if file.path.exists() else -1
      digest.update(repr((split, file.name, file.label, size)).encode())
  return digest.hexdigest()


def _is_prepared(name: str, fingerprint: str, data_dir: str) -> bool:
  """Returns whether these images are prepared.

  Raises:
    UserError: others are, under the same name.
  """
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return False
  stored = builder.data_path / "metadata.json"
  if stored.exists() and json.loads(stored.read_text()).get(_FINGERPRINT) == fingerprint:
    return True
  raise UserError(
    f"{name} is prepared already in {builder.data_dir}, from other files; choose another name, or "
    "move that directory away to prepare it again."
  )


def _make_builder_class(
  dataset: str, checked: image_checks.CheckedImages, fingerprint: str
) -> type[tfds.core.DatasetBuilder]:
  images, shape = checked.images, checked.shape
  # Small square images are stored with their size, so that the trainer pads and crops them, as it
  # does with CIFAR, by default.
  if shape is None or shape[0] != shape[1] or shape[0] > SMALL:
    shape = (None, None, 3)

  class ImageFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images and labels, in the order of TFDS's hash of their names."""

    name = dataset
    VERSION = tfds.core.Version(_VERSION)

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=shape),
          "label": tfds.features.ClassLabel(names=images.classes),
          "file_name": tfds.features.Text(),
        }
      )
      return tfds.core.DatasetInfo(
        builder=self,
        description=f"Images of {images.origin}.",
        features=features,
        supervised_keys=("image", "label"),
        metadata=tfds.core.MetadataDict({_FINGERPRINT: fingerprint}),
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(files) for split, files in images.splits.items()}

    def _generate_examples(self, files):
      for file in files:
        name = file.name.encode(errors="surrogateescape")
        text = name.decode(errors="backslashreplace")
        yield name, {"image": file.path.read_bytes(), "label": file.label, "file_name": text}

  return ImageFiles
