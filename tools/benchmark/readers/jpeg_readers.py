"""Readers of the JPEG files: from a task to an endless iterator of batches (images, labels)."""

import math
import mmap
import multiprocessing
import random
from collections.abc import Iterator

import numpy as np

from tools.benchmark.readers.task import (
  AREA,
  ASPECT,
  BATCH,
  CROP_ATTEMPTS,
  SIDE,
  Task,
  draw_crop,
  jpegs_and_crops,
  label_of,
)

# Images that bare libjpeg-turbo decodes: far more than a CPU's caches hold.
_IN_MEMORY = 1024


def read_pillow(task: Task) -> Iterator:
  """Like PyTorch's DataLoader: a process per core, batches in shared memory, two per process ahead.

  The next batch may overwrite the array of the previous one. Unlike DataLoader's, the batches come
  in the order in which they are ready.
  """
  files = task.jpegs()
  shape = (BATCH, SIDE, SIDE, 3)
  slots = [  # Anonymous shared mappings, which forked processes inherit.
    np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
    for _ in range(2 * task.cores + 1)
  ]
  context = multiprocessing.get_context("fork")
  todo, done = context.SimpleQueue(), context.SimpleQueue()
  load = _pillow_loader()

  def work(seed):
    rng = random.Random(seed)
    while True:
      slot, chosen = todo.get()
      try:
        np.stack([load(files[index], rng) for index in chosen], out=slots[slot])
        done.put((slot, [label_of(files[index]) for index in chosen], None))
      except Exception as error:
        done.put((slot, [], repr(error)))

  processes = [context.Process(target=work, args=(i,), daemon=True) for i in range(task.cores)]
  for process in processes:
    process.start()
  try:
    batches = _shuffled_batches(len(files))
    for slot in range(len(slots)):
      todo.put((slot, next(batches)))
    while True:
      slot, labels, error = done.get()
      if error:
        raise RuntimeError(error)
      yield slots[slot], labels
      todo.put((slot, next(batches)))
  finally:
    for process in processes:
      process.terminate()
      process.join()


def _pillow_loader():
  """A function from (path, rng) to the augmented image, uint8 `[224, 224, 3]`."""
  from PIL import Image

  def load(path, rng):
    image = Image.open(path).convert("RGB")
    top, left, height, width = draw_crop(image.height, image.width, rng)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)

  return load


def _shuffled_batches(count: int) -> Iterator[list[int]]:
  """Batches of indices, endless, shuffled anew each epoch; an incomplete last batch is dropped."""
  rng = np.random.default_rng(0)
  while True:
    order = rng.permutation(count).tolist()
    for end in range(BATCH, count + 1, BATCH):
      yield order[end - BATCH : end]


def read_dali(task: Task) -> Iterator:
  """After DALI's ImageNet example for the CPU; a batch is valid until the next one is taken."""
  from nvidia.dali import fn, pipeline_def, types

  files = task.jpegs()

  @pipeline_def(batch_size=BATCH, num_threads=task.cores, device_id=None, seed=0)
  def define():
    jpegs, labels = fn.readers.file(
      files=[str(path) for path in files],
      labels=[label_of(path) for path in files],
      random_shuffle=True,
    )
    images = fn.decoders.image_random_crop(
      jpegs,
      device="cpu",
      adjust_orientation=False,  # No other reader looks at EXIF.
      num_attempts=CROP_ATTEMPTS,
      random_area=list(AREA),
      random_aspect_ratio=list(ASPECT),
    )
    images = fn.resize(images, size=[SIDE, SIDE], antialias=False)
    images = fn.crop_mirror_normalize(
      images,
      dtype=types.UINT8,
      output_layout="HWC",
      mirror=fn.random.coin_flip(),
      mean=[0.0],
      std=[1.0],
    )
    return images, labels

  pipeline = define()
  pipeline.build()
  while True:
    images, labels = pipeline.run()
    yield np.asarray(images.as_tensor()), np.asarray(labels.as_tensor())[:, 0]


def read_bare(task: Task) -> Iterator:
  """TensorFlow's JPEG decoder and resize alone, in a tf.data map: the fastest form that we found.

  Computes whole images but delivers one pixel of each, which costs nothing to hand over.
  """
  import tensorflow as tf

  files = task.jpegs()[:_IN_MEMORY]
  jpegs, crops = jpegs_and_crops(files)
  labels = [label_of(path) for path in files]

  def load(jpeg, crop, label):
    image = tf.raw_ops.DecodeAndCropJpeg(
      contents=jpeg, crop_window=crop, channels=3, **task.decoder
    )
    image = tf.raw_ops.ResizeBilinear(
      images=tf.expand_dims(image, 0), size=[SIDE, SIDE], half_pixel_centers=True
    )
    return image[0, 0, 0], label

  dataset = tf.data.Dataset.from_tensor_slices((jpegs, crops, labels)).repeat()
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
  return iter(dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE))
