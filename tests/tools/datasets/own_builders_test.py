"""Data sets of a user's own builders, by the paths that `tfds build` takes."""

import pytest

from tf_largebatch.data import preparation, sources
from tf_largebatch.errors import UserError
from tools.datasets import own_builders

_BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class {name}(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {{
      "image": tfds.features.Image(shape=(4, 4, 3)),
      "label": tfds.features.ClassLabel(names=["dark", "light"]),
    }}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
    )

  def _split_generators(self, dl_manager):
    return {{"train": self._generate_examples(6), "test": self._generate_examples(4)}}

  def _generate_examples(self, count):
    for number in range(count):
      yield number, {{"image": np.full((4, 4, 3), number, np.uint8), "label": number % 2}}
"""


def _write(path, *names):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(_BUILDER.format(name=name) for name in names))
  return path


def _check_prepared(name, data_dir):
  preparation.prepare(name, str(data_dir))
  sizes = [
    sources.open_source(name, split, str(data_dir)).num_examples for split in ("train", "test")
  ]
  assert sizes == [6, 4]


def test_a_script(tmp_path):
  script = _write(tmp_path / "own_script_set.py", "OwnScriptSet")
  name = own_builders.resolve(str(script))
  assert name == "own_script_set"
  _check_prepared(name, tmp_path / "data")


def test_a_folder_as_tfds_new_makes_it(tmp_path):
  folder = tmp_path / "own_folder_set"
  _write(folder / "own_folder_set_dataset_builder.py", "Builder")
  (folder / "__init__.py").touch()
  name = own_builders.resolve(f"{folder}/")
  assert name == "own_folder_set"
  _check_prepared(name, tmp_path / "data")


def test_a_script_in_a_folder_with_the_name_of_another_package(tmp_path):
  script = _write(tmp_path / "numpy" / "own_numpy_set.py", "OwnNumpySet")
  assert own_builders.resolve(str(script)) == "own_numpy_set"


def test_names_are_left_alone():
  for name in ("cifar10", "imagenet2012:5.1.0", "imagenet_resized/32x32"):
    assert own_builders.resolve(name) == name


def test_mistakes_are_one_line(tmp_path):
  nothing = tmp_path / "nothing"
  nothing.mkdir()
  broken = tmp_path / "own_broken_set.py"
  broken.write_text("import no_such_module\n")
  empty = tmp_path / "own_empty_set.py"
  empty.touch()
  two = _write(tmp_path / "own_two_sets.py", "OwnFirstSet", "OwnSecondSet")
  taken = _write(tmp_path / "own_taken_set.py", "Cifar10")
  for argument, expected in (
    (f"{tmp_path}/none.py", "there is no "),
    (nothing, "nothing_dataset_builder.py or "),
    (broken, ".own_broken_set cannot be imported (ModuleNotFoundError: No module named"),
    (empty, "defines 0 data sets (none); give one builder a script"),
    (two, "defines 2 data sets (own_first_set, own_second_set); give one"),
    (taken, "Dataset with name cifar10 already registered"),
  ):
    with pytest.raises(UserError) as error:
      own_builders.resolve(str(argument))
    assert expected in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(UserError, match="no_such_module cannot be imported"):
    own_builders.import_module("no_such_module")
