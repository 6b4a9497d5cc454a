"""What every reader of the input benchmark reads, and the crops that it takes."""

import dataclasses
import math
import pathlib
import random

BATCH = 32
SIDE = 224
# The random crops: fraction of the image's area, width / height, attempts before taking the centre.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# ImageNet's channels, for readers that normalise.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Task:
  """The examples, as TFRecords and as JPEG files. `write_files` sets the last three fields.

  Attributes:
    dataset, split, data_dir: as for `sources.open_source`.
    files: folder with the same JPEGs as files named INDEX_LABEL.jpg.
    cores: logical CPUs that a reader may use.
    shards: (file, records to skip, records to take) of the split, in order.
    keys: names of the features that hold the image and the label.
    decoder: libjpeg's settings, for the readers that decode as ours does.
  """

  dataset: str
  split: str
  data_dir: str
  files: str
  cores: int
  shards: list[tuple[str, int, int]] = ()
  keys: list[str] = ()
  decoder: dict = dataclasses.field(default_factory=dict)

  def jpegs(self) -> list[pathlib.Path]:
    """The files in the order of their indices."""
    return sorted(pathlib.Path(self.files).iterdir())


def label_of(path: pathlib.Path) -> int:
  return int(path.stem.partition("_")[2])


def draw_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) as torchvision's RandomResizedCrop does, and so does ours."""
  for _ in range(CROP_ATTEMPTS):
    area = height * width * rng.uniform(*AREA)
    aspect = math.exp(rng.uniform(*map(math.log, ASPECT)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return rng.randint(0, height - h), rng.randint(0, width - w), h, w
  w = min(width, max(1, round(height * ASPECT[1])))
  h = min(height, max(1, round(width / ASPECT[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def jpegs_and_crops(files: list[pathlib.Path]) -> tuple[list[bytes], list[tuple]]:
  """Each file's contents, and a random crop of its image; always the same."""
  import tensorflow as tf

  rng = random.Random(0)
  jpegs = [path.read_bytes() for path in files]
  shapes = (tf.io.extract_jpeg_shape(jpeg).numpy().tolist() for jpeg in jpegs)
  return jpegs, [draw_crop(*shape[:2], rng) for shape in shapes]
