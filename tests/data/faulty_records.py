"""TFRecord files with examples that cannot be read, and the pipelines that read them."""

import io
import os
import types

import numpy as np
import tensorflow as tf
from PIL import Image

from tf_largebatch.data import input_pipeline, sources
from tf_largebatch.recipe import Recipe

SHARDS, SHARD_EXAMPLES, CLASSES = 3, 8, 24
EXAMPLES = SHARDS * SHARD_EXAMPLES
RECIPE = Recipe(
  dataset="test",
  validation_split="validation",
  image_size=8,
  augmentation="none",
  channel_mean=(10.0, 20.0, 30.0),
  channel_std=(1.0, 1.0, 1.0),
  network="resnet8",
  workers=2,
  per_worker_batch_size=6,
  epochs=3,
  warmup_epochs=1,
  decay_epochs=(2,),
)


def encode(value, kind="JPEG", size=(40, 30), mode="RGB", **options):
  """Encodes an image of one grey level."""
  content = io.BytesIO()
  image = Image.new("RGB", size, (value,) * 3).convert(mode, palette=Image.Palette.ADAPTIVE)
  image.save(content, kind, **options)
  return content.getvalue()


def make_record(image, label):
  feature = {
    "picture": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
    "kind": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
  }
  return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


class Shards:
  """Three TFRecord files: example i has the label i and an image of grey level 10 · i."""

  def __init__(self, directory, replaced=None):
    """`replaced`: records that replace those of the examples with these ids."""
    self.paths, self.offsets = [], []
    for shard in range(SHARDS):
      self.paths.append(os.path.join(directory, f"shard{shard}"))
      offset = 0
      with tf.io.TFRecordWriter(self.paths[-1]) as writer:
        for index in range(shard * SHARD_EXAMPLES, (shard + 1) * SHARD_EXAMPLES):
          record = (replaced or {}).get(index, make_record(encode(10 * index), index))
          writer.write(record)
          self.offsets.append(offset)
          offset += 16 + len(record)

  def open(self, index_dir=None):
    instructions = [
      types.SimpleNamespace(filename=path, skip=0, take=8, examples_in_shard=8)
      for path in self.paths
    ]
    return sources.TFRecordSource(instructions, "picture", "kind", CLASSES, index_dir)

  def change(self, index, position):
    """Changes one byte of an example's record; `position` counts from its offset."""
    with open(self.paths[index // SHARD_EXAMPLES], "r+b") as file:
      file.seek(self.offsets[index] + position)
      old = file.read(1)[0]
      file.seek(-1, os.SEEK_CUR)
      file.write(bytes([old ^ 0x20]))


# Example → (its record, part of the error's text). Two of them are neighbours.
FAULTS = {
  2: (make_record(encode(20)[:-200], 2), "JPEG"),  # Truncated.
  5: (make_record(b"no image at all", 5), "Unknown image"),
  7: (make_record(b"", 7), "empty"),
  8: (make_record(encode(80)[:20], 8), "JPEG"),  # Only the header.
  10: (b"", "is required"),
  12: (b"\xff" * 50, "not a tf.train.Example"),
  14: (make_record(encode(140), CLASSES), "label is 24, but there are 24 classes"),
  17: (make_record(encode(170), -1), "label is -1"),
  23: (make_record(encode(230), 23), "corrupted"),  # `faulty_shards` breaks its CRC.
}


def faulty_shards(directory):
  """Shards with all of `FAULTS`."""
  shards = Shards(directory, {index: record for index, (record, _) in FAULTS.items()})
  shards.change(23, 100)
  return shards


def read_train_batches(recipe, source, on_bad_example=None, steps=2):
  """Reads the batches of the first steps; two steps are an epoch."""
  dataset = input_pipeline.train_dataset(
    recipe,
    source,
    first_worker=0,
    num_workers=2,
    workers_per_replica=2,
    on_bad_example=on_bad_example,
  )
  return [next(iterator) for iterator in [iter(dataset)] for _ in range(steps)]


def read_evaluation(source, on_bad_example=None):
  """Reads (images, labels, weights) of an evaluation of all examples."""
  dataset = input_pipeline.evaluation_dataset(
    RECIPE,
    source,
    batch_size=7,
    first_replica=0,
    num_replicas=1,
    replicas=1,
    on_bad_example=on_bad_example,
  )
  return [np.concatenate(parts) for parts in zip(*dataset.take(4), strict=True)]
