"""Which features of a TensorFlow Datasets data set are the image and the class."""

import numpy as np
import tensorflow_datasets as tfds

from tf_largebatch.errors import UserError


def image_and_label(info) -> tuple[str, str]:
  """Returns the names of the features that hold the image and its class.

  A data set may have any other features. If it has several images or classes, its
  `supervised_keys` decide.

  Args:
    info: a `tfds.core.DatasetInfo`.

  Raises:
    UserError: the examples are not an image and a class, or the pixels are not uint8.
  """
  # Only a FeaturesDict has named features.
  features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
  images = [name for name, feature in features.items() if _is_image(feature)]
  labels = [
    name
    for name, feature in features.items()
    if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes
  ]
  supervised = info.supervised_keys or ()
  if len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
    images, labels = [supervised[0]], [supervised[1]]
  if len(images) != 1 or len(labels) != 1:
    raise UserError(
      f"{info.name} is not an image classification data set: {_misfit(features, images, labels)}."
    )
  dtype = np.dtype(features[images[0]].np_dtype)
  if dtype != np.uint8:
    raise UserError(
      f"{info.name} has pixels of dtype {dtype.name} (feature {images[0]!r}), but a run reads only "
      "uint8. Scale them from their range to 0-255 and save them as 8-bit PNG files, then prepare "
      "those with python -m tools.prepare_data."
    )
  return images[0], labels[0]


def _is_image(feature) -> bool:
  """Returns whether a feature is an image, but not one whose pixels are labels."""
  return isinstance(feature, tfds.features.Image) and not isinstance(
    feature, tfds.features.LabeledImage
  )


def _misfit(features: dict, images: list[str], labels: list[str]) -> str:
  """Returns which image or class is missing or ambiguous, and what to do."""
  if not images:
    return f"none of its features ({', '.join(features)}) is an image; use another data set"
  for kind, names in (("images", images), ("class labels", labels)):
    if len(names) > 1:
      return (
        f"it has several {kind} ({', '.join(names)}); name the image and the label to use as "
        "supervised_keys in its builder"
      )
  csv = "list the images and their labels in a CSV file for python -m tools.prepare_data NAME "
  csv += "--csv=FILE, which makes classes of them"
  for name, feature in features.items():
    if isinstance(feature, tfds.features.Sequence) and isinstance(
      feature.feature, tfds.features.ClassLabel
    ):
      return f"its feature {name!r} holds several classes per image; choose one for each and {csv}"
  others = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
  return f"none of its features is a class label: {others}; {csv}"


def _kind(feature) -> str:
  """Returns a feature's type in a word, with the dtype of a plain value."""
  if isinstance(feature, tfds.features.Text):
    return "text"
  if type(feature) in (tfds.features.Tensor, tfds.features.Scalar):
    return np.dtype(feature.np_dtype).name
  return type(feature).__name__
