"""Which features of a data set are the image and the class; all else is refused in one line."""

import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tf_largebatch.data.features import image_and_label
from tf_largebatch.errors import UserError

_F = tfds.features
_IMAGE, _LABEL = _F.Image(), _F.ClassLabel(num_classes=3)


def _info(features, supervised_keys=None):
  return types.SimpleNamespace(
    name="flowers", features=_F.FeaturesDict(features), supervised_keys=supervised_keys
  )


@pytest.mark.parametrize(
  "features, supervised_keys, expected",
  [
    ({"image": _IMAGE, "label": _LABEL}, ("image", "label"), ("image", "label")),
    ({"picture": _IMAGE, "kind": _LABEL}, None, ("picture", "kind")),
    ({"picture": _IMAGE, "kind": _LABEL, "id": _F.Text()}, ("picture", "id"), ("picture", "kind")),
    ({"a": _IMAGE, "b": _IMAGE, "x": _LABEL, "y": _LABEL}, ("b", "y"), ("b", "y")),
    ({"image": _IMAGE, "label": _LABEL, "box": _F.BBoxFeature()}, None, ("image", "label")),
  ],
)
def test_finds_the_image_and_the_class(features, supervised_keys, expected):
  assert image_and_label(_info(features, supervised_keys)) == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_pixels_that_are_not_uint8_are_refused(dtype):
  channels = 1 if dtype == np.float32 else 3
  image = _F.Image(shape=(8, 8, channels), dtype=dtype)
  expected = rf"flowers has pixels of dtype {np.dtype(dtype).name} \(feature 'scan'\), but .* uint8"
  with pytest.raises(UserError, match=expected):
    image_and_label(_info({"scan": image, "label": _LABEL}))


@pytest.mark.parametrize(
  "features, expected",
  [
    ({"text": _F.Text(), "label": _LABEL}, r"none of its features .* is an image"),
    (
      {"image": _IMAGE, "label": _F.Text()},
      r"no.* class label: .*label \(text\).*--csv=FILE",
    ),
    ({"image": _IMAGE, "label": np.int64}, r"no.* class label: .*label \(int64\).*--csv=FILE"),
    ({"image": _IMAGE, "label": _F.Sequence(_LABEL)}, "'label' holds several classes per image"),
    ({"a": _IMAGE, "b": _IMAGE, "label": _LABEL}, r"several images \(a, b\); .*supervised_keys"),
    ({"image": _IMAGE, "x": _LABEL, "y": _LABEL}, r"several class labels \(x, y\)"),
  ],
)
def test_anything_else_is_refused_with_a_remedy(features, expected):
  with pytest.raises(UserError, match=f"flowers is not an image classification .*{expected}"):
    image_and_label(_info(features))
