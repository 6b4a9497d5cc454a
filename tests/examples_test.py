"""The examples of docs/examples: each runs unchanged on one device and on two tasks."""

import os
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from matplotlib import image

from tests.launching import ROOT, launch
from tests.run_example import digest, run_example

# Neither is a multiple of a batch: training drops the rest, evaluation counts it.
_TRAIN, _TEST = 1100, 570
_LONGEST = 60  # Lines of an example.
# Compiling these on three processes takes minutes.
slow = pytest.mark.skipif("EXAMPLE_TESTS" not in os.environ, reason="set EXAMPLE_TESTS=1")
_EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def store(data_dir, name):
  """Stores a small data set with the name, version and features of a real one.

  The grey level of an image is that of its class, with noise.
  """
  info = tfds.builder(name, data_dir=data_dir).info
  random = np.random.default_rng(0)

  def examples(count):
    labels = random.integers(10, size=count)
    noise = random.integers(20, size=(count, *info.features["image"].shape))
    images = (25 * labels[:, None, None, None] + noise).astype(np.uint8)
    columns = {"image": images, "label": labels, "id": [str(i) for i in range(count)]}
    return tf.data.Dataset.from_tensor_slices({key: columns[key] for key in info.features})

  tfds.dataset_builders.store_as_tfds_dataset(
    name,
    str(info.version),
    data_dir=data_dir,
    split_datasets={"train": examples(_TRAIN), "test": examples(_TEST)},
    features=info.features,
  )


def metrics(output):
  """Returns the loss and the accuracy that an example prints at its end."""
  (line,) = re.findall(r"test loss and accuracy: ([\d.e-]+) ([\d.]+)", output)
  return [float(number) for number in line]


def check(tmp_path, capfd, name, *arguments):
  """Runs an example on one device and on two tasks, compares them and returns both outputs."""
  pictures = [tmp_path / f"{name}_{tasks}.png" for tasks in (1, 2)]
  arguments = (*arguments, "--epochs=2")
  first = run_example(name, *arguments, f"--picture={pictures[0]}")
  outputs = [capfd.readouterr().out]
  finished = launch(2, "tests.run_example", name, *arguments, f"--picture={pictures[1]}")
  assert finished.returncode == 0, finished.stdout
  outputs += [
    "".join(re.findall(rf"^\[task {task}\] (.*\n)", finished.stdout, re.MULTILINE))
    for task in (0, 1)
  ]
  assert metrics(outputs[1]) == metrics(outputs[2])
  assert metrics(outputs[1]) == pytest.approx(metrics(outputs[0]), rel=1e-3)
  weights = [re.search(r"^weights: (\w{64})$", output, re.MULTILINE)[1] for output in outputs[1:]]
  assert weights[0] == weights[1] and len(digest(first["model"])) == 64
  assert all(image.imread(picture).std() > 0 for picture in pictures)
  assert "Epoch 2/2" in outputs[1] and "Epoch" not in outputs[2]
  return outputs


def test_cnn(tmp_path, capfd):
  store(tmp_path, "cifar10")
  check(tmp_path, capfd, "cnn", f"--data_dir={tmp_path}")


@slow
def test_transfer(tmp_path, capfd):
  store(tmp_path, "fashion_mnist")
  weights = str(tmp_path / "network.weights.h5")
  options = {"input_shape": (32, 32, 3), "include_top": False, "weights": None}
  keras.applications.MobileNetV3Small(**options).save_weights(weights)
  arguments = (f"--data_dir={tmp_path}", f"--weights={weights}")
  for output in check(tmp_path, capfd, "transfer", *arguments):
    assert "network unchanged: True\n" in output


@slow
def test_vision_transformer(tmp_path, capfd):
  store(tmp_path, "fashion_mnist")
  check(tmp_path, capfd, "vision_transformer", f"--data_dir={tmp_path}")


def test_text(tmp_path, capfd):
  check(tmp_path, capfd, "text", "--documents=5000")


def test_examples_are_short_and_each_is_tested_and_described():
  assert [path.stem for path in _EXAMPLES] == ["cnn", "text", "transfer", "vision_transformer"]
  text = (ROOT / "docs" / "examples" / "README.md").read_text()
  for path in _EXAMPLES:
    assert len(path.read_text().splitlines()) <= _LONGEST
    assert f"def test_{path.stem}(" in (ROOT / "tests" / "examples_test.py").read_text()
    picture = path.with_suffix(".png")
    assert picture.stat().st_size < 60_000 and f"]({picture.name})" in text
