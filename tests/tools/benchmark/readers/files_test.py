"""Finds a prepared data set's examples and writes their JPEGs."""

import numpy as np
import pytest
from PIL import Image

from tests.tools.benchmark import photographs
from tf_largebatch.errors import UserError
from tools.benchmark.readers.task import label_of

pytestmark = pytest.mark.xdist_group("benchmark_input")  # One process prepares the data for all.


def test_files_hold_the_examples_in_order():
  task = photographs.task()
  files = task.jpegs()
  assert len(files) == photographs.COUNT
  assert len(task.shards) == 3 and task.keys == ["image", "label"]
  for path in files:
    image = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_allclose(image[0, 0], photographs.COLOURS[label_of(path)], atol=3)


def test_a_large_split_is_cut_and_a_slice_is_not(tmp_path):
  for name in ("cut", "slice"):
    (tmp_path / name).mkdir()
  cut = photographs.write(tmp_path / "cut", examples=40)
  assert cut.split == "train[:40]" and len(cut.jpegs()) == 40
  assert sum(take for _, _, take in cut.shards) == 40
  part = photographs.write(tmp_path / "slice", split="train[2:70]", examples=40)
  assert part.split == "train[2:70]" and len(part.jpegs()) == 68


@pytest.mark.parametrize(
  "values, expected",
  [
    ({"dataset": "tiny_photograph"}, "TensorFlow Datasets has no 'tiny_photograph'"),
    ({"split": "test"}, "tiny_photographs has no split 'test'"),
    ({"split": "few"}, "few has 31 examples"),
    ({"dataset": "tiny_pngs"}, r"example 0 .* is not a JPEG"),
    ({"data_dir": "array_record"}, "prepared as array_record, which not all readers support"),
  ],
)
def test_unsuitable_data_are_refused_in_one_line(tmp_path, values, expected):
  if "data_dir" in values:
    values = {"data_dir": f"{photographs.data_dir()}/{values['data_dir']}"}
  with pytest.raises(UserError, match=expected) as error:
    photographs.write(tmp_path, **values)
  assert "\n" not in str(error.value)
