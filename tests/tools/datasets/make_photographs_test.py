"""Tests of `tools.datasets.make_photographs` with computed photographs, offline."""

import collections
import io
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from tests.launching import ROOT
from tf_largebatch.errors import UserError
from tools.datasets import make_photographs, mirrors

# One process runs all of them, because what they share takes long to make.
pytestmark = pytest.mark.xdist_group("make_photographs")

_COLOURS = [(200, 60, 40), (40, 160, 80), (60, 80, 200)]
_TRAIN, _VALIDATION = 30, 28  # Just enough to contain every kind of image.


def _picture(colour, width, height):
  """Returns a picture of one hue, twice as bright at the top and a little brighter at one side."""
  light = np.outer(np.linspace(1.2, 0.6, height), np.linspace(1.05, 0.95, width))[..., np.newaxis]
  return Image.fromarray(np.uint8(np.full((height, width, 3), colour) * light))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """A folder with three photographs, one rotated and one small, and with other things."""
  folder = tmp_path_factory.mktemp("photographs")
  _picture(_COLOURS[0], 1300, 1000).save(folder / "a.jpg")
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  turned = _picture(_COLOURS[1], 1000, 1300).transpose(Image.Transpose.ROTATE_90)
  turned.save(folder / "b.jpg", exif=exif)
  _picture(_COLOURS[2], 101, 67).save(folder / "c.png")
  (folder / "README.txt").write_text("No photograph.")
  (folder / "more").mkdir()
  return folder


def _run(data_dir, photographs, *options):
  command = [sys.executable, "-m", "tools.datasets.make_photographs", f"--data_dir={data_dir}"]
  command += [f"--photographs={photographs}", *options]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory, photographs):
  """The data directory and the result of the program."""
  data_dir = tmp_path_factory.mktemp("data")
  counts = (f"--train_images={_TRAIN}", f"--validation_images={_VALIDATION}")
  return data_dir, _run(data_dir, photographs, *counts)


def _read_tar(file):
  with tarfile.open(fileobj=file) as tar:
    return {member.name: tar.extractfile(member).read() for member in tar}


def _read_files(data_dir):
  """Returns (contents of the synsets' tars, training images by name, validation images by name)."""
  manual_dir = data_dir / "downloads" / "manual"
  with open(manual_dir / "ILSVRC2012_img_train.tar", "rb") as file:
    synsets = {name: _read_tar(io.BytesIO(tar)) for name, tar in _read_tar(file).items()}
  with open(manual_dir / "ILSVRC2012_img_val.tar", "rb") as file:
    validation = _read_tar(file)
  train = {name: file for files in synsets.values() for name, file in files.items()}
  return synsets, train, validation


def _open(content):
  return Image.open(io.BytesIO(content))


def _is_lit_from_above(image):
  pixels = np.asarray(image.convert("L"), np.float64)
  (top, bottom), (left, right) = (
    [half.mean() for half in np.array_split(pixels, 2, axis)] for axis in (0, 1)
  )
  return top - bottom > abs(left - right)


def test_tars_contain_what_imagenets_do_and_nothing_else_remains(made):
  data_dir, result = made
  assert (result.returncode, result.stderr) == (0, "")
  synsets, train, validation = _read_files(data_dir)
  assert len(train) == sum(map(len, synsets.values())) == _TRAIN
  for tar, files in synsets.items():
    for name in files:
      assert re.fullmatch(rf"{tar.removesuffix('.tar')}_\d+\.JPEG", name)
  assert sorted(validation) == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, _VALIDATION + 1)]

  manual_dir = data_dir / "downloads" / "manual"
  tars = ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]
  assert sorted(os.listdir(manual_dir)) == tars
  mean = np.mean([len(file) for file in [*train.values(), *validation.values()]]) / 1000
  assert result.stdout == (
    f"{manual_dir}: {_TRAIN} training and {_VALIDATION} validation images, crops of 3 photographs, "
    f"{mean:.1f} kB each on average\n"
  )


def test_images_are_those_of_imagenet_odd_ones_included(made):
  _, train, validation = _read_files(made[0])
  repaired = make_photographs.imagenet2012_dataset_builder
  for name in repaired.PNG_IMAGES:
    assert _open(train[name]).format == "PNG"
  for name in repaired.CMYK_IMAGES:
    image = _open(train[name])
    assert (image.format, image.mode) == ("JPEG", "CMYK")
  others = train.keys() - {*repaired.PNG_IMAGES, *repaired.CMYK_IMAGES}
  for split in ([train[name] for name in others], validation.values()):
    kinds = collections.Counter()
    for content in split:
      image = _open(content)
      assert image.format == "JPEG"
      turned = ExifTags.Base.Orientation in image.getexif()
      kinds[image.mode, max(image.size), turned] += 1
      width, height = sorted(image.size)
      assert 4 * width == 3 * height
      if image.mode == "RGB":
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4.
    plain = len(split) - 4
    odd = {("L", 500, False): 1, ("RGB", 80, False): 1, ("RGB", 1600, False): 1}
    assert kinds == {("RGB", 500, False): plain, ("RGB", 500, True): 1, **odd}
  assert len({_open(content).size for content in validation.values()}) > 3  # Portraits too.


def test_the_unmodified_builder_takes_the_tars(made):
  """Checks names, labels and colours, which show the photograph and that CMYK is repaired."""
  builder = tfds.builder("imagenet2012", data_dir=made[0])
  tfds.disable_progress_bar()
  builder.download_and_prepare()
  synsets = builder.info.features["label"].names
  fixed = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
  for split, count in (("train", _TRAIN), ("validation", _VALIDATION)):
    examples = list(tfds.as_numpy(builder.as_dataset(split)))
    assert len(examples) == count
    for example in examples:
      name, label = example["file_name"].decode(), example["label"]
      synset = fixed[int(name[-13:-5]) - 1] if split == "validation" else name.split("_")[0]
      assert synsets[label] == synset
      mean = example["image"].mean(axis=(0, 1))
      colour = np.array(_COLOURS[label % 3])
      if np.ptp(mean) < 3:  # The grey ones.
        colour = colour @ [0.299, 0.587, 0.114]
      # The crop has the photograph's hue, and at most its range of light.
      light = mean / colour
      assert np.ptp(light) < 0.06 * light.mean(), name
      assert 0.56 < light.mean() < 1.27


def test_the_same_flags_make_the_same_bytes_and_another_seed_does_not(made, photographs, tmp_path):
  counts = (f"--train_images={_TRAIN}", f"--validation_images={_VALIDATION}")
  assert _run(tmp_path / "same", photographs, *counts).returncode == 0
  for path in (made[0] / "downloads" / "manual").iterdir():
    assert (tmp_path / "same" / "downloads" / "manual" / path.name).read_bytes() == (
      path.read_bytes()
    )
  assert _run(tmp_path / "other", photographs, "--seed=1", *counts).returncode == 0
  _, train, validation = _read_files(made[0])
  _, other_train, other_validation = _read_files(tmp_path / "other")
  assert train.keys() == other_train.keys()
  assert not any(train[name] == other_train[name] for name in train)
  assert not any(validation[name] == other_validation[name] for name in validation)


def test_more_images_do_not_change_the_others():
  photographs = [pathlib.Path("a"), pathlib.Path("b")]
  for plan in (make_photographs._train_images, make_photographs._validation_images):
    images = plan(3000, photographs, 5)
    assert plan(100, photographs, 5) == images[:100]
    assert len({image.seed for image in images}) == 3000
  train = make_photographs._train_images(100, photographs, 5)
  validation = make_photographs._validation_images(100, photographs, 5)
  assert not {image.seed for image in train} & {image.seed for image in validation}


def test_classes_are_balanced_and_none_is_odd():
  images = make_photographs._train_images(30_000, [pathlib.Path("a")], 0)
  names = {image.name for image in images}
  # No image has the same name as one that TFDS repairs.
  assert len(names) == 30_000
  assert collections.Counter(image.synset for image in images[:5000]).most_common(1)[0][1] == 5
  for kind in ("grey", "small", "turned"):
    classes = collections.Counter(image.synset for image in images if image.kind == kind)
    assert sum(classes.values()) in (309, 310)
    assert max(classes.values()) == 1
  assert sum(image.kind == "large" for image in images) == 31


@pytest.mark.parametrize("name", ["a.jpg", "b.jpg", "c.png"])
def test_turned_images_are_upright_by_their_tag_alone(name, photographs):
  orientations = collections.Counter()
  for number in range(20):
    image = make_photographs._Image("x", "n0", photographs / name, "turned", (0, 0, number))
    picture = _open(make_photographs._encode(image))
    orientations[picture.getexif()[ExifTags.Base.Orientation]] += 1
    assert not _is_lit_from_above(picture)
    assert _is_lit_from_above(ImageOps.exif_transpose(picture))
  assert orientations.keys() == {3, 6, 8}


@pytest.mark.parametrize("subsampling, expected", [("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)])
def test_the_chroma_subsampling_is_chosen(subsampling, expected, tmp_path, photographs):
  images = ("--train_images=1", "--validation_images=2")
  result = _run(tmp_path, photographs, *images, f"--chroma_subsampling={subsampling}")
  assert result.returncode == 0
  _, _, validation = _read_files(tmp_path)
  found = {JpegImagePlugin.get_sampling(_open(content)) for content in validation.values()}
  assert found == {expected}


def test_the_size_is_chosen(tmp_path, photographs):
  images = ("--train_images=1", "--validation_images=6")
  assert _run(tmp_path, photographs, *images, "--long_side=120").returncode == 0
  _, _, validation = _read_files(tmp_path)
  assert {max(_open(content).size) for content in validation.values()} == {120}


def test_crops_are_600_to_1600_pixels_long_and_lie_anywhere(tmp_path):
  """The colour of each pixel of the photograph encodes its position."""
  width, height, steps = 2400, 1800, np.arange(256)
  pixels = np.zeros((256, 256, 3), np.uint8)
  pixels[:, :, 0], pixels[:, :, 1] = steps, steps[:, np.newaxis]
  path = tmp_path / "photograph.png"
  Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(path)
  lengths, lefts, tops = collections.defaultdict(list), [], []
  for number in range(100):
    image = make_photographs._Image("x", "n0", path, "plain", (0, 0, number))
    picture = np.asarray(_open(make_photographs._encode(image)), np.float64)
    left, right = picture[:, [0, -1], 0].mean(axis=0) * width / 255
    top, bottom = picture[[0, -1], :, 1].mean(axis=1) * height / 255
    crop = right - left, bottom - top
    portrait = crop[1] > crop[0]
    assert max(crop) == pytest.approx(4 / 3 * min(crop), abs=25)
    assert picture.shape == ((500, 375, 3) if portrait else (375, 500, 3))
    lengths[portrait].append(max(crop))
    lefts.append(left / (width - crop[0]))
    tops.append(top / (height - crop[1]))
  assert 10 < len(lengths[True]) < 40
  for found in lengths.values():
    assert 580 < min(found) < 750
    assert 1450 < max(found) < 1620
  for found in (lefts, tops):
    np.testing.assert_allclose(np.quantile(found, [0.02, 0.5, 0.98]), [0, 0.5, 1], atol=0.15)


def _refusal(result):
  assert (result.returncode, result.stdout) == (1, "")
  assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
  return result.stderr


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_a_tar_that_exists_is_never_overwritten(name, photographs, tmp_path):
  tar = tmp_path / "downloads" / "manual" / name
  tar.parent.mkdir(parents=True)
  tar.write_text("the true one")
  assert f"{tar} exists" in _refusal(_run(tmp_path, photographs))
  assert tar.read_text() == "the true one"
  assert os.listdir(tar.parent) == [name]


def test_a_photograph_that_cannot_be_read_leaves_no_tar(photographs, tmp_path):
  folder = tmp_path / "photographs"
  folder.mkdir()
  content = (photographs / "a.jpg").read_bytes()
  (folder / "broken.jpg").write_bytes(content[: len(content) // 2])
  message = _refusal(_run(tmp_path, folder, "--train_images=100"))
  assert f"Cannot read the photograph '{folder / 'broken.jpg'}'" in message
  assert not os.listdir(tmp_path / "downloads" / "manual")


def test_a_picture_of_too_many_pixels_is_skipped(photographs, tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Twice as many are an error to Pillow.
  with pytest.raises(UserError, match="There is no image in the folder"):
    make_photographs._find_photographs(photographs)
  with pytest.raises(UserError, match="Cannot read the photograph"):
    make_photographs._read(photographs / "a.jpg")


def test_mistakes_are_reported_on_one_line(photographs, tmp_path):
  missing = tmp_path / "missing"
  assert f"Cannot read the folder '{missing}'" in _refusal(_run(tmp_path, missing))
  empty = photographs / "more"
  assert f"no image in the folder '{empty}'" in _refusal(_run(tmp_path, empty))
  file = photographs / "a.jpg"
  assert f"Cannot write to '{file}/downloads/manual'" in _refusal(_run(file, photographs))
  assert "Unexpected argument 'ilsvrc'" in _refusal(_run(tmp_path, photographs, "ilsvrc"))


def test_debian_packages_give_the_photographs_among_their_pictures(tmp_path, monkeypatch):
  def unpack(names, directory):
    assert names == ("lomiri-wallpapers-16.04", "mate-backgrounds")
    for name in ("sea.jpg", "umang_by_A.jpg", "analogpattern_by_B.jpg", "mate/nature/Dune.jpg"):
      path = directory / "usr/share/backgrounds" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      _picture(_COLOURS[0], 8, 6).save(path)
    (directory / "usr/share/backgrounds/mate/abstract").mkdir()
    _picture(_COLOURS[0], 8, 6).save(
      directory / "usr/share/backgrounds/mate/abstract/Elephants.jpg"
    )

  monkeypatch.setattr(mirrors, "unpack_debian_packages", unpack)
  found = make_photographs._fetch_photographs(tmp_path)
  assert [path.name for path in found] == ["sea.jpg", "Dune.jpg"]


def test_without_debian_the_message_says_what_to_do(tmp_path, monkeypatch):
  def unpack(names, directory):
    raise UserError("there is no apt-get on this machine")

  monkeypatch.setattr(mirrors, "unpack_debian_packages", unpack)
  with pytest.raises(
    UserError, match=r"\(there is no apt-get on this machine\).*--photographs=DIR"
  ):
    make_photographs._fetch_photographs(tmp_path)
