"""Stored sets of many kinds of features: from their files to an example, or to one line."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tf_largebatch.data import sources
from tf_largebatch.errors import UserError

_F = tfds.features
_IMAGE, _LABEL = _F.Image(shape=(None, None, 3)), _F.ClassLabel(num_classes=5)
_PIXELS = np.full((7, 9, 3), 77, np.uint8)


def store(data_dir, features, example, supervised_keys=None):
  """Stores three equal examples; they are read without the builder, which is not registered."""

  class OwnPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=_F.FeaturesDict(features), supervised_keys=supervised_keys
      )

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from ((index, example) for index in range(3))

  OwnPictures(data_dir=data_dir).download_and_prepare()


# Further features → (features, their values, supervised_keys).
USABLE = {
  "none, supervised": ({}, {}, ("image", "label")),
  "none, not supervised": ({}, {}, None),
  "many": (
    {
      "id": _F.Text(),
      "bbox": _F.BBoxFeature(),
      "objects": _F.Sequence({"label": _F.ClassLabel(num_classes=2)}),
      "mask": _F.LabeledImage(labels=3, shape=(None, None, 1)),
      "count": np.int64,
    },
    {
      "id": "a",
      "bbox": _F.BBox(0.0, 0.0, 1.0, 1.0),
      "objects": [{"label": 1}],
      "mask": np.zeros((7, 9, 1), np.uint8),
      "count": 4,
    },
    None,
  ),
  "another image and class": (
    {"other": _IMAGE, "coarse": _LABEL},
    {"other": np.zeros((2, 2, 3), np.uint8), "coarse": 0},
    ("image", "label"),
  ),
}


@pytest.mark.parametrize("kind", USABLE)
def test_one_image_and_one_class_are_enough(kind, tmp_path):
  features, values, keys = USABLE[kind]
  store(
    tmp_path,
    {"image": _IMAGE, "label": _LABEL, **features},
    {"image": _PIXELS, "label": 3, **values},
    keys,
  )
  assert sources.defaults("own_pictures", str(tmp_path), "train").image_shape is None
  source = sources.open_source("own_pictures", "train", str(tmp_path))
  assert (source.num_examples, source.num_classes) == (3, 5)
  image, label = source.parse(source.record(0))
  np.testing.assert_array_equal(_F.Image().decode_example(image.numpy()), _PIXELS)
  assert label == 3 and sources.fault(source, 0) is None


# Kind → (features, example, parts of the error).
REFUSED = {
  "float32 pixels": (
    {"image": _F.Image(shape=(7, 9, 1), dtype=np.float32), "label": _LABEL},
    {"image": np.ones((7, 9, 1), np.float32), "label": 3},
    ("dtype float32", "'image'", "0-255", "tools.prepare_data"),
  ),
  "uint16 pixels": (
    {"photo": _F.Image(shape=(None, None, 1), dtype=np.uint16), "label": _LABEL},
    {"photo": np.ones((7, 9, 1), np.uint16), "label": 3},
    ("dtype uint16", "'photo'", "0-255", "tools.prepare_data"),
  ),
  "a text label": (
    {"image": _IMAGE, "label": _F.Text()},
    {"image": _PIXELS, "label": "cat"},
    ("label (text)", "--csv=FILE"),
  ),
  "an integer label": (
    {"image": _IMAGE, "label": np.int64},
    {"image": _PIXELS, "label": 3},
    ("label (int64)", "--csv=FILE"),
  ),
  "several labels per image": (
    {"image": _IMAGE, "labels": _F.Sequence(_LABEL)},
    {"image": _PIXELS, "labels": [1, 2]},
    ("'labels' holds several classes", "--csv=FILE"),
  ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_stored_data_are_refused_with_what_to_do(kind, tmp_path):
  features, example, parts = REFUSED[kind]
  store(tmp_path, features, example)
  for refused in (
    lambda: sources.defaults("own_pictures", str(tmp_path), "train"),
    lambda: sources.open_source("own_pictures", "train", str(tmp_path)),
  ):
    with pytest.raises(UserError, match="own_pictures") as error:
      refused()
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
