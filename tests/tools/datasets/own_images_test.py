"""Data sets of a user's own images: from files to a trained network, and what is refused."""

import dataclasses
import io
import itertools
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from tests.training.small_runs import RECIPE, train
from tf_largebatch.data import sources
from tf_largebatch.errors import UserError
from tools.datasets import image_files, own_images

CLASSES = ("daisy", "rose", "tulip")
_FLOWERS = dataclasses.replace(RECIPE, dataset="my_flowers", augmentation=None, decay_epochs=())


def image_bytes(number, size=(9, 7), form="PNG", mode="RGB"):
  """An image file of random pixels, different for each number."""
  rng = np.random.default_rng(number)
  pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(buffer, form)
  return buffer.getvalue()


def write_images(root, per_class, first=0, **options):
  """Writes a folder for each class."""
  for label, name in enumerate(CLASSES):
    (root / name).mkdir(parents=True)
    for number in range(per_class):
      content = image_bytes(first + label * per_class + number, **options)
      (root / name / f"{number}.png").write_bytes(content)


@pytest.fixture
def folder(tmp_path):
  """Two images of each class, without splits."""
  write_images(tmp_path / "flowers", 2)
  return tmp_path / "flowers"


def prepare(folder, data_dir, name="my_flowers", file_format=None):
  own_images.prepare(name, image_files.from_folder(folder), str(data_dir), file_format)


def prepare_csv(path, data_dir):
  own_images.prepare("my_flowers", image_files.from_csv(path), str(data_dir), None)


def check_examples(data_dir, split, root, count):
  """Checks that the examples that the trainer reads are the files: bytes, pixels and labels."""
  names = tfds.builder("my_flowers", data_dir=data_dir).info.features["label"].names
  files = {path.read_bytes(): path for path in root.glob("*/*")}
  source = sources.open_source("my_flowers", split, str(data_dir))
  assert (source.num_examples, source.num_classes) == (count, len(names))
  records = source.read(tf.range(count, dtype=tf.int64)).numpy()
  for content, label in (source.parse(record) for record in records):
    path = files.pop(content.numpy())
    assert names[label] == path.parent.name
    if path.suffix in (".png", ".bmp"):
      pixels = tf.io.decode_image(content, 3)
      np.testing.assert_array_equal(pixels, Image.open(path).convert("RGB"))
  assert not any(path.suffix == ".png" and not path.name.startswith(".") for path in files.values())


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_folder_with_splits_trains_without_further_code(file_format, tmp_path):
  """Photographs of several sizes, formats and modes, hidden files and symbolic links."""
  folder, data_dir = tmp_path / "flowers", tmp_path / "data"
  write_images(folder / "train", 8, size=(20, 14))
  write_images(folder / "val", 4, first=100, size=(12, 18))
  others = {
    "a.JPG": {"form": "JPEG"},
    "grey.jpeg": {"form": "JPEG", "mode": "L"},
    "cmyk.jpg": {"form": "JPEG", "mode": "CMYK"},
    "palette.png": {"mode": "P"},
    "alpha.png": {"mode": "RGBA"},
    "b.bmp": {"form": "BMP"},
    "c.gif": {"form": "GIF"},
    "no_ending": {"form": "JPEG"},
    "größe.png": {},
  }
  for number, (name, options) in enumerate(others.items()):
    path = folder / "train" / "rose" / name
    path.write_bytes(image_bytes(200 + number, size=(16, 15), **options))
  for hidden in (".DS_Store", "Thumbs.db", "rose/.hidden.jpg", "rose/desktop.ini"):
    (folder / "train" / hidden).write_text("not an image")
  (folder / ".git" / "train").mkdir(parents=True)
  shutil.move(folder / "train" / "tulip", tmp_path / "elsewhere")
  (folder / "train" / "tulip").symlink_to(tmp_path / "elsewhere")

  prepare(folder, data_dir, file_format=file_format)
  assert tfds.builder("my_flowers", data_dir=data_dir).info.file_format.value == file_format
  check_examples(data_dir, "train", folder / "train", 24 + len(others))
  check_examples(data_dir, "validation", folder / "val", 12)
  recipe = dataclasses.replace(
    _FLOWERS,
    train_split="train",
    validation_split=None,
    image_size=16,
    per_worker_batch_size=8,
    epochs=2,
    warmup_epochs=1,
  )
  result = train(tmp_path / "run", recipe, data_dir=str(data_dir))
  assert (result["status"], result["steps"]) == ("complete", 4)


def test_a_csv_of_small_images_without_validation_trains_on_slices(tmp_path, caplog):
  """As CIFAR: with the size of the images and the augmentation for small ones; integer labels."""
  data_dir, root = tmp_path / "data", tmp_path / "digits"
  (root / "files").mkdir(parents=True)
  rows = ["\ufeffFile;Label"]
  for number in range(60):
    (root / "files" / f"{number}.png").write_bytes(image_bytes(number, size=(16, 16)))
    rows.append(f"./files/{number}.png;{number % 3 * 9}")
  (root / "labels.csv").write_text("\r\n".join([*rows, "", ""]))
  prepare_csv(root / "labels.csv", data_dir)
  builder = tfds.builder("my_flowers", data_dir=data_dir)
  assert builder.info.features["label"].names == ["0", "9", "18"]  # By value, not "0", "18", "9".
  for example in builder.as_dataset(split="train").as_numpy_iterator():
    number = int(pathlib.Path(example["file_name"].decode()).stem)
    assert example["label"] == number % 3
    path = root / "files" / f"{number}.png"
    np.testing.assert_array_equal(example["image"], np.asarray(Image.open(path)))
  recipe = dataclasses.replace(
    _FLOWERS,
    train_split="train[:70%]",
    validation_split="train[70%:]",
    image_size=None,
    epochs=1,
    warmup_epochs=0,
  )
  with caplog.at_level("INFO", logger="absl"):
    result = train(tmp_path / "run", recipe, data_dir=str(data_dir))
  assert (result["status"], result["steps"]) == ("complete", 2)


def test_the_same_files_are_prepared_once_and_others_are_refused(folder, tmp_path):
  data_dir = tmp_path / "data"
  prepare(folder, data_dir)
  before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
  prepare(folder, data_dir)
  assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before
  with pytest.raises(UserError, match="is prepared as tfrecord"):
    prepare(folder, data_dir, file_format="array_record")
  (folder / "rose" / "more.png").write_bytes(image_bytes(50))
  with pytest.raises(UserError, match=r"is prepared already in .* from other files"):
    prepare(folder, data_dir)
  prepare(folder, data_dir, "more_flowers")


@pytest.mark.parametrize("name", ["cifar10", "synthetic", "downloads"])
def test_names_of_other_data_sets_are_refused(name, folder, tmp_path):
  with pytest.raises(UserError, match=f"^{name} is the name of another data set; choose another"):
    prepare(folder, tmp_path / "data", name)


@pytest.mark.parametrize("name", ["MyFlowers", "my-flowers", "my/flowers", "", "2flowers", "größe"])
def test_impossible_names_are_refused(name, folder, tmp_path):
  with pytest.raises(UserError, match="cannot be the name of a data set: use lower-case"):
    prepare(folder, tmp_path / "data", name)


def _add(name, content):
  def change(folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)

  return change


def _deep_png():
  buffer = io.BytesIO()
  Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(buffer, "PNG")
  return buffer.getvalue()


def _splits(train=CLASSES, validation=CLASSES, others=()):
  def change(folder):
    numbers = itertools.count(1000)
    for split, names in (("train", train), ("validation", validation), *others):
      for name in names:
        _add(f"{split}/{name}/{split}_{name}.png", image_bytes(next(numbers)))(folder)
    _remove_classes(folder)

  return change


def _remove_classes(folder):
  for name in CLASSES:
    shutil.rmtree(folder / name)


REFUSED = {
  "a class without images": (lambda folder: (folder / "lily").mkdir(), "without images: lily; add"),
  "a class of other files": (_add("lily/notes.txt", b"text"), "without images: lily; add"),
  "a class that train lacks": (_splits(train=CLASSES[:2]), "classes that train lacks: tulip; add"),
  "one class": (_splits(CLASSES[:1], CLASSES[:1]), "has one class, daisy; classification needs"),
  "nested folders": (_add("rose/red/1.png", image_bytes(9)), "folders inside its class folders: "),
  "images beside the folders": (_add("1.jpg", b""), "images outside of its class folders: 1.jpg"),
  "a folder beside the splits": (
    _splits(others=(("lily", CLASSES),)),
    "other folders beside train: lily",
  ),
  "validation without train": (_splits(train=()), "has validation but no train folder"),
  "two validation folders": (
    _splits(others=(("val", CLASSES),)),
    "2 folders of the validation split: val",
  ),
  "no folder": (shutil.rmtree, "cannot be read"),
  "no class folders": (_remove_classes, "has no class folders"),
  "WebP": (
    _add("rose/a.webp", image_bytes(9, form="WEBP")),
    "in formats that TensorFlow does not decode: 1 of 7 files",
  ),
  "WebP under another name": (
    _add("rose/a.jpg", image_bytes(9, form="WEBP")),
    "rose/a.jpg (WebP)); convert",
  ),
  "TIFF": (_add("rose/a.tiff", image_bytes(9, form="TIFF")), "rose/a.tiff (TIFF)"),
  "HEIC": (_add("rose/a.HEIC", b"\0\0\0\x18ftypheic" + bytes(50)), "rose/a.HEIC (HEIC)"),
  "an empty file": (_add("rose/a.jpg", b""), "cannot be decoded: 1 of 7 files"),
  "a truncated PNG": (_add("rose/a.png", image_bytes(9, (50, 50))[:-2000]), "rose/a.png ("),
  "a truncated JPEG": (_add("rose/a.jpg", image_bytes(9, (50, 50), "JPEG")[:-900]), "rose/a.jpg ("),
  "an error page": (_add("rose/a.jpg", b"<html>Not found"), "rose/a.jpg (not an image)"),
  "a broken link": (lambda folder: (folder / "rose/a.jpg").symlink_to("gone"), "No such file"),
  "16 bits": (
    _add("rose/a.png", _deep_png()),
    "whose lower 8 bits would be lost: 1 of 7",
  ),
  "a newline in a class": (_add("li\nly/a.png", image_bytes(9)), "unprintable characters"),
  "a space after a class": (_add("lily /a.png", image_bytes(9)), "'lily '; rename"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(case, folder, tmp_path):
  change, expected = REFUSED[case]
  change(folder)
  with pytest.raises(UserError) as error:
    prepare(folder, tmp_path / "data")
  assert expected in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "data").exists()


def test_all_bad_files_are_counted_and_the_first_named(folder, tmp_path):
  for number in range(5):
    (folder / "rose" / f"x{number}.jpg").touch()
  (folder / "tulip" / "x.tif").write_bytes(image_bytes(9, form="TIFF"))
  with pytest.raises(UserError) as error:
    prepare(folder, tmp_path / "data")
  assert "cannot be decoded: 5 of 12 files" in str(error.value)
  assert "x0.jpg (empty)" in str(error.value) and "and 2 more" in str(error.value)
  assert "does not decode: 1 of 12 files" in str(error.value)


WARNED = {
  "the same image twice": (
    _add("rose/z.png", image_bytes(2)),
    "Images of train with the same bytes as others of train: 1 (rose/z.png = rose/0.png).",
  ),
  "in two classes": (
    _add("tulip/z.png", image_bytes(2)),
    "with the same bytes as others of train, but of another class: 1 (tulip/z.png = rose/0.png).",
  ),
  "other files": (_add("rose/notes.txt", b"text"), "Ignored, not images: 1 files ("),
  "a class that validation lacks": (
    _splits(validation=CLASSES[:2]),
    "validation has no images of tulip.",
  ),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_may_be_a_mistake_is_a_warning(case, folder, tmp_path, caplog):
  change, expected = WARNED[case]
  change(folder)
  prepare(folder, tmp_path / "data")
  (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
  assert expected in line
  assert tfds.builder("my_flowers", data_dir=tmp_path / "data").is_prepared()


def test_images_of_both_train_and_validation_are_a_warning(folder, tmp_path, caplog):
  _splits()(folder)
  shutil.copy(folder / "train/rose/train_rose.png", folder / "validation/rose/copy.png")
  prepare(folder, tmp_path / "data")
  assert (
    "Images of validation with the same bytes as others of train: 1 (rose/copy.png = "
    "rose/train_rose.png). The error on validation will be too low."
  ) in caplog.text


CSV = {
  "no label column": ("path,size\na.png,3\n", "has 0 columns for the label in its header"),
  "two path columns": ("path,file,label\na,b,c\n", "has 2 columns for the path"),
  "an empty file": ("", "has 0 columns for the path"),
  "no rows": ("path,label\n", "lists no training image"),
  "a missing label": ("path,label\na.png,x\nb.png\n", "line 3: the label is ''; give one"),
  "an unknown split": ("path,label,split\na.png,x,fold1\n", "line 2: the split is 'fold1'; give"),
  "the same path twice": ("path,label\na.png,x\n./a.png,y\n", "line 3: 'a.png' was already"),
  "missing files": ("path,label\na.png,x\nb.png,y\n", "cannot be decoded: 2 of 2 files"),
  "not UTF-8": ("path,label\na.png,gr\xf6\xdfe\n".encode("latin-1"), "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", CSV)
def test_csv_files_that_are_refused(case, tmp_path):
  text, expected = CSV[case]
  path = tmp_path / "labels.csv"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError) as error:
    prepare_csv(path, tmp_path / "data")
  assert expected in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(UserError, match="cannot be read"):
    image_files.from_csv(tmp_path / "none.csv")


def test_splits_of_a_csv(folder):
  path = folder / "labels.csv"
  path.write_text(
    "Label\tSplit\tPath\nrose\tTrain\trose/0.png\ntulip\ttraining\ttulip/0.png\n"
    f"rose\tval\trose/1.png\ntulip\ttest\t{folder}/tulip/1.png\n"
  )
  images = image_files.from_csv(path)
  assert {split: [file.name for file in files] for split, files in images.splits.items()} == {
    "train": ["rose/0.png", "tulip/0.png"],
    "validation": ["rose/1.png"],
    "test": [f"{folder}/tulip/1.png"],
  }
  assert all(os.path.samefile(file.path, folder / file.name) for file in images.splits["train"])


def test_classes_are_sorted_by_name_or_as_numbers():
  assert image_files.sort_classes(["b", "a10", "a9", "b"]) == ["a10", "a9", "b"]
  assert image_files.sort_classes(["10", "9", "-1", "09"]) == ["-1", "09", "9", "10"]
  assert image_files.sort_classes(["10", "9", "x"]) == ["10", "9", "x"]
