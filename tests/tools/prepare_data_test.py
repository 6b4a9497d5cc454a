"""Tests of `tools.prepare_data`, which never use the network."""

import io
import os
import re
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data import left_overs_test
from tests.launching import run_module
from tests.tools.datasets import own_images_test


def _run(data_dir, *arguments):
  return run_module("tools.prepare_data", f"--data_dir={data_dir}", *arguments)


def _tar(files):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return buffer.getvalue()


@pytest.fixture
def data_dir(tmp_path):
  """A data directory with an ImageNet of three training images and two validation images."""
  buffer = io.BytesIO()
  Image.new("RGB", (8, 6)).save(buffer, "JPEG")
  jpeg = buffer.getvalue()
  manual_dir = tmp_path / "downloads" / "manual"
  manual_dir.mkdir(parents=True)
  synset = _tar({f"n01440764_{i}.JPEG": jpeg for i in range(3)})
  (manual_dir / "ILSVRC2012_img_train.tar").write_bytes(_tar({"n01440764.tar": synset}))
  validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg for i in (1, 2)}
  (manual_dir / "ILSVRC2012_img_val.tar").write_bytes(_tar(validation))
  return tmp_path


def _refusal(result):
  assert (result.returncode, result.stdout) == (1, "")
  assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
  return result.stderr


def test_prepares_from_the_official_tars_and_describes_the_result(data_dir):
  result = _run(data_dir, "imagenet2012", "--file_format=array_record")
  directory = data_dir / "imagenet2012" / "5.1.0"
  size = sum(path.stat().st_size for path in directory.iterdir()) / 2**10
  expected = (
    f"imagenet2012/5.1.0: train 3, validation 2 examples, {size:.2f} KiB of array_record in "
    f"{directory}\n"
  )
  assert (result.returncode, result.stdout) == (0, expected)
  assert "Preparing imagenet2012 from files in" in result.stderr
  source = tfds.builder("imagenet2012", data_dir=data_dir).as_data_source("train")
  assert [np.shape(source[i]["image"]) for i in range(3)] == 3 * [(6, 8, 3)]

  before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
  again = _run(data_dir, "imagenet2012:5.1.0", "imagenet2012")
  assert (again.returncode, again.stdout, again.stderr) == (0, 2 * expected, "")
  refused = _refusal(_run(data_dir, "imagenet2012", "--file_format=tfrecord"))
  assert f"imagenet2012 is prepared as array_record in {directory}" in refused
  assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_mistakes_are_reported_on_one_line(tmp_path):
  assert "No data set was named" in _refusal(_run(tmp_path))
  assert "did you mean imagenet2012 " in _refusal(_run(tmp_path, "imagenet201"))
  assert "did you mean imagenet2012 " in _refusal(_run(tmp_path, "imagenet"))
  assert "needs no data" in _refusal(_run(tmp_path, "synthetic"))
  assert not os.listdir(tmp_path)
  missing = _refusal(_run(tmp_path, "imagenet2012"))
  manual_dir = tmp_path / "downloads" / "manual"
  tars = "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar"
  assert re.search(rf"put {tars} into {manual_dir} .*and run again", missing)


def test_own_images_and_what_to_train_with(tmp_path):
  own_images_test.write_images(tmp_path / "flowers", 2)
  data_dir = tmp_path / "data"
  result = _run(data_dir, "my_flowers", f"--images={tmp_path}/flowers")
  directory = data_dir / "my_flowers" / "1.0.0"
  first, *lines = result.stdout.splitlines()
  assert result.returncode == 0 and first.startswith("my_flowers/1.0.0: train 6 examples, ")
  assert lines == [
    f"Classes: 0 daisy, 1 rose, 2 tulip (one a line in {directory}/label.labels.txt)",
    f"Train with: --dataset=my_flowers --data_dir={data_dir} --train_split=train[:90%] "
    "--validation_split=train[90%:]",
  ]
  assert (directory / "label.labels.txt").read_text().split() == ["daisy", "rose", "tulip"]
  refused = _refusal(_run(data_dir, "a", "b", f"--images={tmp_path}/flowers"))
  assert "One name, and one of --images and --csv are needed; given: a b." in refused


def test_an_own_builder_that_sigterm_interrupts_leaves_nothing(tmp_path):
  """By its module; tests/tools/datasets/own_builders_test.py has the paths."""
  arguments = ("--imports=tests.data.left_overs_test", "endless_shapes", f"--data_dir={tmp_path}")
  with left_overs_test.preparing(tmp_path, "-m", "tools.prepare_data", *arguments) as process:
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert "Traceback" not in process.stderr.read()
  assert [path.name for path in left_overs_test.files(tmp_path)] == [".preparation.lock"]
