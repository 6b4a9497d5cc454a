"""Tests of `tools.datasets.resized`."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, JpegImagePlugin

from tests.launching import run_module
from tf_largebatch.data import sources
from tf_largebatch.errors import UserError
from tools.datasets import image_files, own_images, resized

_SIDE = 24


def picture(width, height, mode="RGB"):
  """Returns a smooth picture, so that resizing and JPEG change little."""
  x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, np.newaxis]
  channels = [255 * (x + y) / 2, 255 * x * (1 - y), 128 + 100 * np.sin(3 * x + y)]
  return Image.fromarray(np.uint8(np.stack(channels, axis=-1))).convert(mode)


def encoded(image, **options):
  file = io.BytesIO()
  image.save(file, **({"format": "JPEG", "quality": 95} | options))
  return file.getvalue()


def opened(content):
  return Image.open(io.BytesIO(content))


@pytest.mark.parametrize(
  "size, expected",
  [((50, 40), (30, 24)), ((40, 50), (24, 30)), ((25, 25), (24, 24)), ((100, 25), (96, 24))],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_shorter_side_shrinks_and_the_picture_stays(size, expected, form):
  before = picture(*size)
  after = opened(resized.shrink(encoded(before, format=form), _SIDE, 3))
  assert (after.format, after.mode, after.size) == (form, "RGB", expected)
  # Pillow's resizing, which is antialiased too.
  reference = np.asarray(before.resize(expected, Image.Resampling.BICUBIC), np.float64)
  difference = np.abs(np.asarray(after, np.float64) - reference)
  if form == "PNG":  # Nothing but the rounding.
    assert difference.max() <= 1
  assert difference.mean() < 1.5


def test_resizing_is_antialiased():
  """Stripes one pixel wide become grey: a resize that picks pixels would keep some of them."""
  stripes = np.zeros((96, 96, 3), np.uint8)
  stripes[:, ::2] = 255
  after = np.asarray(opened(resized.shrink(encoded(Image.fromarray(stripes), format="PNG"), 24, 3)))
  assert np.abs(after[:, 2:-2].astype(int) - 127).max() < 10


@pytest.mark.parametrize("given, expected", [("4:4:4", 0), ("4:2:2", 2), ("4:2:0", 2)])
def test_the_chroma_subsampling_stays(given, expected):
  after = resized.shrink(encoded(picture(60, 50), subsampling=given), _SIDE, 3)
  assert JpegImagePlugin.get_sampling(opened(after)) == expected


def test_a_jpeg_with_further_pictures_stays_a_jpeg():
  first, second = picture(60, 50), picture(50, 60)
  after = opened(
    resized.shrink(encoded(first, format="MPO", save_all=True, append_images=[second]), _SIDE, 3)
  )
  assert (after.format, after.size) == ("JPEG", (29, 24))


def test_grey_and_cmyk_files():
  grey = encoded(picture(60, 50, "L"))
  assert opened(resized.shrink(grey, _SIDE, 1)).mode == "L"
  assert opened(resized.shrink(grey, _SIDE, 3)).mode == "RGB"
  # The decoder of the trainer turns CMYK into RGB.
  assert opened(resized.shrink(encoded(picture(60, 50, "CMYK")), _SIDE, 3)).mode == "RGB"


@pytest.mark.parametrize(
  "content",
  [
    encoded(picture(24, 60)),
    encoded(picture(60, 24), format="PNG"),
    encoded(picture(8, 9)),
    b"no image",
    encoded(picture(60, 50))[:-200] + b"\0" * 150,
    encoded(picture(60, 50), format="PNG")[:300],
  ],
)
def test_small_and_damaged_files_stay_as_they_are(content):
  assert resized.shrink(content, _SIDE, 3) is content


@pytest.fixture
def flowers(tmp_path):
  """A data directory with photographs of several sizes in two splits."""
  folder = tmp_path / "flowers"
  for number in range(12):
    split = "train" if number < 8 else "validation"
    path = folder / split / f"class{number % 2}" / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(20 + 4 * number, 50)))
  data_dir = tmp_path / "data"
  own_images.prepare("flowers", image_files.from_folder(folder), str(data_dir), "tfrecord")
  return data_dir


def read(dataset, split, data_dir):
  source = sources.open_source(dataset, split, str(data_dir))
  examples = [source.parse(source.record(index)) for index in range(source.num_examples)]
  return [(content.numpy(), int(label)) for content, label in examples]


@pytest.mark.parametrize("file_format", [None, "array_record"])
def test_the_examples_and_their_order_stay(flowers, file_format):
  name = resized.prepare("flowers", _SIDE, str(flowers), file_format)
  assert name == "flowers_shorter24"
  for split, count in (("train", 8), ("validation", 4)):
    before, after = (read(dataset, split, flowers) for dataset in ("flowers", name))
    assert len(before) == count
    assert after == [(resized.shrink(content, _SIDE, 3), label) for content, label in before]
    assert any(old != new for (old, _), (new, _) in zip(before, after, strict=True))
  info = tfds.builder(name, data_dir=flowers).info
  assert info.features["label"].names == ["class0", "class1"]
  assert info.file_format.value == (file_format or "tfrecord")


def test_the_program_prepares_it_and_a_run_names_it(flowers, tmp_path):
  arguments = ("flowers", f"--resize_shorter_side={_SIDE}", f"--data_dir={flowers}")
  finished = run_module("tools.prepare_data", *arguments)
  assert finished.returncode == 0, finished.stderr
  assert finished.stdout.startswith("flowers_shorter24/1.0.0: train 8, validation 4 examples, ")
  assert "train: resized 6 of 8 images; " in finished.stderr
  run = ("--dataset=flowers_shorter24", "--image_size=16", "--network=resnet8", "--epochs=1")
  flags = ("--per_worker_batch_size=4", "--warmup_epochs=0", "--decay_epochs=")
  work_dir = tmp_path / "run"
  directories = (f"--data_dir={flowers}", f"--work_dir={work_dir}")
  finished = run_module("tf_largebatch.train", *run, *flags, *directories)
  assert finished.returncode == 0, finished.stderr
  recipe = json.loads((work_dir / "recipe.json").read_text())
  assert recipe["recipe"]["dataset"] == "flowers_shorter24"


def test_refuses_images_of_one_size(tmp_path):
  for number in range(4):
    path = tmp_path / "icons" / f"class{number % 2}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(32, 32), format="PNG"))
  own_images.prepare("icons", image_files.from_folder(tmp_path / "icons"), str(tmp_path), None)
  with pytest.raises(UserError, match="All images of icons are 32×32 pixels"):
    resized.prepare("icons", _SIDE, str(tmp_path), None)
