"""Tests of `tools.benchmark.resized_pixels`."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.launching import run_module
from tools.datasets import image_files, own_images


def store(data_dir, name, change, labels="ab"):
  """Prepares two PNG images whose grey levels are `change` of x + y and of 100 + x."""
  y, x = np.mgrid[:40, :50]
  for number, levels in enumerate((x + y, 100 + x)):
    path = data_dir / name / labels[number] / f"{number}.png"
    path.parent.mkdir(parents=True)
    grey = np.uint8(change(levels))
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(path)
  # Pictures of another size, so that the set has no fixed one.
  Image.new("RGB", (8, 9)).save(data_dir / name / labels[0] / "2.png")
  own_images.prepare(name, image_files.from_folder(data_dir / name), str(data_dir), None)


def run(data_dir, *datasets):
  arguments = (f"--data_dir={data_dir}", "--split=train", "--image_size=16")
  return run_module("tools.benchmark.resized_pixels", *datasets, *arguments)


def test_the_differences(tmp_path):
  store(tmp_path, "plain", lambda levels: levels)
  store(tmp_path, "same", lambda levels: levels)
  # One image is darker by 6 in half of its columns, which the crop halves; the black one stays.
  store(tmp_path, "darker", lambda levels: np.maximum(levels - 6 * (np.arange(50) < 25), 0))
  finished = run(tmp_path, "plain", "same", "darker")
  assert finished.returncode == 0, finished.stderr
  rows = {line.split()[0]: line.split()[1:] for line in finished.stdout.splitlines()[1:]}
  assert len(rows["plain"]) == 1
  assert rows["same"][1:] == ["0.000", "+0.000", "0"]
  mean, bias, largest = rows["darker"][1:]
  assert largest == "6" and float(bias) == -float(mean)
  # Two of three images; their centre crops lie evenly on both halves.
  assert float(mean) == pytest.approx(2 / 3 * 6 / 2, abs=0.15)


def test_refuses_what_cannot_be_compared(tmp_path):
  store(tmp_path, "plain", lambda levels: levels)
  store(tmp_path, "turned", lambda levels: levels, labels="ba")
  for datasets, message in (
    (("plain",), "error: Two data sets are needed"),
    (("plain", "plain"), "error: Two data sets are needed"),
    (("plain", "turned"), "error: Example .* of turned has label ., but"),
  ):
    finished = run(tmp_path, *datasets)
    assert finished.returncode == 1
    assert re.search(message, finished.stderr) and "Traceback" not in finished.stderr
