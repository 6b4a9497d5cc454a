r"""Times how fast training batches are read: by this package, by others, and at the very most.

  python -m tools.benchmark.input_pipeline --data_dir=data --json=input.json
  python -m tools.benchmark.input_pipeline --data_dir=data --readers="ours,dali" --cores=8
  python -m tools.benchmark.input_pipeline --data_dir=data --pixels=500

All readers make the same of the same JPEGs of a prepared data set: random crops of 8-100 % of the
area and aspect 3/4-4/3, resized to 224×224, bilinear, flipped at random, in batches of 32.

  ours               `input_pipeline.train_dataset` as a training run calls it
  ours in order      the same, its permutation replaced by the order of the shards: what the exact
                     shuffle costs
  decode whole       tf.data as first written: shards in order, whole images decoded, then cropped
  model garden       the TensorFlow Model Garden's input of ResNet (official/vision): shards
                     interleaved, a shuffle buffer of 10 000 records; float32, normalised
  model garden uint8 the same without the normalisation
  pillow             PyTorch's classic way: files as in torchvision's ImageFolder, and processes as
                     DataLoader's that decode by Pillow and hand over batches in shared memory
  dali               NVIDIA DALI on the CPU, from the same files, its resampling without
                     antialiasing, as ours is (antialiased it takes longer)
  bare libjpeg-turbo the limit: TensorFlow's decoder as ours calls it and its bilinear resize, of
                     JPEGs in memory and crops drawn beforehand, and nothing else

In each of --turns turns every reader runs once, alone, in a new process on the same --cores logical
CPUs; the order rotates from turn to turn. What comes before the first batch (start, tracing, a full
shuffle buffer) and the --warm_up after it are not timed. The table tells medians over the turns
[least–most], user and system time per image, and the ratio of the medians of ours and each.

The first --examples of the split are read, over and over, so that they come from memory and not
from a disk; they are also written to a temporary folder (TMPDIR), about 1.2 GB.

--pixels=N compares libjpeg's settings instead of readers: how far the pixels of N crops are from
those of the exact DCT with fancy upscaling of the chroma (mean |Δ|, mean Δ and largest, in grey
levels, as decoded and after the resize), and the rate of bare libjpeg-turbo.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import mmap
import multiprocessing
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

# TensorFlow is imported where it is used: not in the parent, whose messages should be its own, nor
# in the processes of readers that need none of it.
import numpy as np
from absl import app, flags

from tf_largebatch.errors import UserError

BATCH = 32
SIDE = 224
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_CROP_TRIES = 10
# ImageNet's, by which the Model Garden normalises.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_SHUFFLE_BUFFER = 10_000  # The Model Garden's, in records.
_INTERLEAVED_SHARDS = 10
# What bare libjpeg-turbo decodes: far more than a CPU's caches hold.
_IN_MEMORY = 1024

# libjpeg's settings, the exact ones first: the others are compared with them.
DECODERS = {
  f"{dct_method}, {'fancy' if fancy else 'plain'} upscaling": {
    "dct_method": dct_method,
    "fancy_upscaling": fancy,
  }
  for dct_method in ("INTEGER_ACCURATE", "INTEGER_FAST")
  for fancy in (True, False)
}

_START_SECONDS = 900  # Until a process that has not begun to measure is given up.
_LOG_LINES = 40  # Of a process that failed; TensorFlow's threads fail in chorus.
_OTHERS = 0.1  # Cores that the rest of the machine may use without a word.


@dataclasses.dataclass(frozen=True)
class Task:
  """What every reader reads.

  dataset, split, data_dir: as `sources.open_source` takes them.
  shards: (file, records to skip, records to take) of the split, in order.
  keys: the features that hold the image and the label.
  files: folder with the same JPEGs as files named INDEX_LABEL.jpg.
  cores: logical CPUs.
  decoder: libjpeg's settings where a reader is to share those of ours.

  What `write_files` finds out is empty before.
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


# Readers: from a task to an endless iterator of batches (images, labels).


def read_ours(task: Task, in_order: bool = False) -> Iterator:
  from tf_largebatch.data import input_pipeline, sources
  from tf_largebatch.recipe import Recipe

  recipe = Recipe(
    dataset=task.dataset,
    train_split=task.split,
    image_size=SIDE,
    augmentation="area_crop",
    channel_mean=_MEAN,
    channel_std=_STD,
    workers=1,
    per_worker_batch_size=BATCH,
  )
  source = sources.open_source(task.dataset, task.split, task.data_dir)

  def same_position(recipe, train_examples, epoch, position):
    return position

  example_id = same_position if in_order else input_pipeline._example_id
  with mock.patch.object(input_pipeline, "_example_id", example_id):
    dataset = input_pipeline.train_dataset(
      recipe, source, first_worker=0, num_workers=1, workers_per_replica=1
    )
  return iter(dataset)


def read_decode_whole(task: Task) -> Iterator:
  import tensorflow as tf

  def load(record):
    jpeg, label = _parse(task, record)
    image = tf.io.decode_jpeg(jpeg, channels=3, **task.decoder)
    top, left, height, width = tf.unstack(_sample_crop(tf.shape(image)))
    image = image[top : top + height, left : left + width]
    image = tf.image.resize(tf.image.random_flip_left_right(image), [SIDE, SIDE])
    return tf.cast(tf.round(image), tf.uint8), label

  dataset = _shards(task).repeat().flat_map(_open_shard)
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return iter(dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def read_model_garden(task: Task, normalized: bool = True) -> Iterator:
  """Written after official/core/input_reader.py and official/vision/dataloaders."""
  import tensorflow as tf

  def parse(jpeg, label):
    shape = tf.io.extract_jpeg_shape(jpeg)
    crop = tf.io.decode_and_crop_jpeg(jpeg, _sample_crop(shape), channels=3)
    # Where no crop could be drawn, the whole image comes; it takes the centre instead.
    image = tf.cond(
      tf.reduce_all(tf.equal(tf.shape(crop), shape)),
      lambda: tf.io.decode_and_crop_jpeg(jpeg, center_crop(shape), channels=3),
      lambda: crop,
    )
    image = tf.image.resize(tf.image.random_flip_left_right(image), [SIDE, SIDE])
    image = tf.ensure_shape(image, [SIDE, SIDE, 3])
    if normalized:
      return (image - tf.constant(_MEAN)) / tf.constant(_STD), tf.cast(label, tf.int32)
    return tf.cast(tf.round(image), tf.uint8), tf.cast(label, tf.int32)

  def center_crop(shape):
    size = tf.cast(shape[:2], tf.float32)
    side = tf.reduce_min(size) * 0.875
    return tf.cast(tf.concat([(size - side) / 2, [side, side]], axis=0), tf.int32)

  dataset = _shards(task).shuffle(len(task.shards)).repeat()
  dataset = dataset.interleave(
    _open_shard, cycle_length=_INTERLEAVED_SHARDS, num_parallel_calls=_INTERLEAVED_SHARDS
  )
  dataset = dataset.shuffle(_SHUFFLE_BUFFER)
  dataset = dataset.map(functools.partial(_parse, task), num_parallel_calls=tf.data.AUTOTUNE)
  dataset = dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
  return iter(dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE))


def read_pillow(task: Task) -> Iterator:
  """As DataLoader: a process a core, batches in shared memory, two a process ahead.

  A batch's array is written anew once the next one is asked for, as nobody holds it then. Unlike
  DataLoader's the batches come in the order in which they are ready.
  """
  from PIL import Image

  files = task.jpegs()
  shape = (BATCH, SIDE, SIDE, 3)
  slots = [  # Anonymous shared mappings, which forked processes inherit.
    np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
    for _ in range(2 * task.cores + 1)
  ]
  context = multiprocessing.get_context("fork")
  todo, done = context.SimpleQueue(), context.SimpleQueue()

  def load(path, rng):
    image = Image.open(path).convert("RGB")
    top, left, height, width = draw_crop(image.height, image.width, rng)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)

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


def read_dali(task: Task) -> Iterator:
  """After DALI's ImageNet example for the CPU; batches are views that the next one ends."""
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
      num_attempts=_CROP_TRIES,
      random_area=list(_AREA),
      random_aspect_ratio=list(_ASPECT),
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
  """In the fastest form found: a map of tf.data. Of each image comes one pixel, as it costs nothing
  to hand over, yet all are computed."""
  import tensorflow as tf

  files = task.jpegs()[:_IN_MEMORY]
  jpegs, crops = _jpegs_and_crops(files)
  labels = [label_of(path) for path in files]

  def work(jpeg, crop, label):
    image = tf.raw_ops.DecodeAndCropJpeg(
      contents=jpeg, crop_window=crop, channels=3, **task.decoder
    )
    image = tf.raw_ops.ResizeBilinear(
      images=tf.expand_dims(image, 0), size=[SIDE, SIDE], half_pixel_centers=True
    )
    return image[0, 0, 0], label

  dataset = tf.data.Dataset.from_tensor_slices((jpegs, crops, labels)).repeat()
  dataset = dataset.map(work, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
  return iter(dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE))


@dataclasses.dataclass(frozen=True)
class Reader:
  """batches: from a task to its batches; package: what pip installs if its import fails."""

  batches: Callable[[Task], Iterator]
  package: str | None = None


READERS = {
  "ours": Reader(read_ours),
  "ours in order": Reader(functools.partial(read_ours, in_order=True)),
  "decode whole": Reader(read_decode_whole),
  "model garden": Reader(read_model_garden),
  "model garden uint8": Reader(functools.partial(read_model_garden, normalized=False)),
  "pillow": Reader(read_pillow, "pillow"),
  "dali": Reader(read_dali, "nvidia-dali-cuda120"),
  "bare libjpeg-turbo": Reader(read_bare),
}


def draw_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
  """(top, left, height, width) as torchvision's RandomResizedCrop draws it, and so as ours does."""
  for _ in range(_CROP_TRIES):
    area = height * width * rng.uniform(*_AREA)
    aspect = math.exp(rng.uniform(*map(math.log, _ASPECT)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return rng.randint(0, height - h), rng.randint(0, width - w), h, w
  w = min(width, max(1, round(height * _ASPECT[1])))
  h = min(height, max(1, round(width / _ASPECT[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def _jpegs_and_crops(files: list[pathlib.Path]) -> tuple[list[bytes], list[tuple]]:
  import tensorflow as tf

  rng = random.Random(0)
  jpegs = [path.read_bytes() for path in files]
  shapes = (tf.io.extract_jpeg_shape(jpeg).numpy().tolist() for jpeg in jpegs)
  return jpegs, [draw_crop(*shape[:2], rng) for shape in shapes]


def _shuffled_batches(count: int) -> Iterator[list[int]]:
  """Indices, in another order each epoch, for ever; an epoch's last few are left out."""
  rng = np.random.default_rng(0)
  while True:
    order = rng.permutation(count).tolist()
    for end in range(BATCH, count + 1, BATCH):
      yield order[end - BATCH : end]


def _shards(task: Task):
  import tensorflow as tf

  names, skips, takes = zip(*task.shards, strict=True)
  return tf.data.Dataset.from_tensor_slices(
    (list(names), np.array(skips, np.int64), np.array(takes, np.int64))
  )


def _open_shard(name, skip, take):
  import tensorflow as tf

  return tf.data.TFRecordDataset(name).skip(skip).take(take)


def _parse(task: Task, record):
  """(JPEG, label) of a record."""
  import tensorflow as tf

  image_key, label_key = task.keys
  types = {image_key: tf.string, label_key: tf.int64}
  features = {key: tf.io.FixedLenFeature([], dtype) for key, dtype in types.items()}
  example = tf.io.parse_single_example(record, features)
  return example[image_key], example[label_key]


def _sample_crop(shape):
  """(top, left, height, width), the way that TensorFlow offers."""
  import tensorflow as tf

  begin, size, _ = tf.image.sample_distorted_bounding_box(
    shape,
    bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    min_object_covered=_AREA[0],
    aspect_ratio_range=_ASPECT,
    area_range=_AREA,
    max_attempts=_CROP_TRIES,
  )
  return tf.concat([begin[:2], size[:2]], axis=0)


# What runs in a process of its own.


def write_files(task: Task, examples: int) -> dict:
  """Writes the first examples of a whole split, or all of a slice, to `task.files`.

  Returns:
    What was found out of the task, by name.

  Raises:
    UserError: the data set is not prepared as TFRecords of JPEGs, or has too few of them.
  """
  import tensorflow_datasets as tfds

  from tf_largebatch.data import input_pipeline, sources

  try:
    builder = tfds.builder(task.dataset, data_dir=task.data_dir)
    prepared = builder.data_path.exists() and builder.is_prepared()
  except Exception as error:  # TFDS raises a different type for each part that is wrong.
    first_line = str(error).strip().partition("\n")[0]
    raise UserError(f"TensorFlow Datasets has no {task.dataset!r}: {first_line}") from error
  if not prepared:
    raise UserError(
      f"{task.dataset} is not prepared in {task.data_dir}; name another --data_dir, or prepare it: "
      f"python -m tools.prepare_data {task.dataset} --data_dir={task.data_dir}"
    )
  info, split = builder.info, task.split
  if info.file_format != tfds.core.FileFormat.TFRECORD:
    raise UserError(
      f"{task.dataset} is prepared as {info.file_format.value}, which not all readers know; "
      "tfrecord would do."
    )
  if split in info.splits and info.splits[split].num_examples > examples:
    split = f"{split}[:{examples}]"
  source = sources.open_source(task.dataset, split, task.data_dir)
  if source.num_examples < BATCH:
    raise UserError(f"{split} has {source.num_examples} examples, less than a batch of {BATCH}.")
  if source.image_shape is not None:
    raise UserError(f"{task.dataset} has images of one size; name a data set of photographs.")
  shards = info.splits[split].file_instructions
  found = {
    "split": split,
    "shards": [(os.fspath(shard.filename), shard.skip, shard.take) for shard in shards],
    "keys": info.supervised_keys,
    "decoder": input_pipeline.JPEG_DECODING,
  }
  task = dataclasses.replace(task, **found)
  dataset = _shards(task).flat_map(_open_shard).map(functools.partial(_parse, task))
  try:
    for index, (image, label) in enumerate(dataset.as_numpy_iterator()):
      if not image.startswith(b"\xff\xd8"):
        raise UserError(f"{source.describe(index)} is no JPEG; name a data set of JPEGs.")
      (pathlib.Path(task.files) / f"{index:07d}_{label}.jpg").write_bytes(image)
  except OSError as error:
    raise UserError(
      f"{task.files} cannot be written ({error.strerror}); name another place by TMPDIR, or fewer "
      "--examples."
    ) from error
  return found


def time_reader(task: Task, reader: str, warm_up: float, seconds: float) -> dict:
  """Images, seconds and seconds of CPU time of a reader and of all others on this machine
  meanwhile; or {"missing": why it cannot run}."""
  chosen = READERS[reader]
  try:
    batches = chosen.batches(task)
    next(batches)
  except ImportError as error:
    if chosen.package is None:
      raise
    return {"missing": f"{error}; pip install {chosen.package} would do"}
  _take_for(batches, warm_up)
  before = cpu_seconds(), machine_seconds()
  images, elapsed = _take_for(batches, seconds)
  own, everybodys = cpu_seconds() - before[0], machine_seconds() - before[1]
  others = max(0.0, everybodys - own)
  return {"images": images, "seconds": elapsed, "cpu_seconds": own, "others_seconds": others}


def _take_for(batches: Iterator, seconds: float) -> tuple[int, float]:
  """Takes batches until so much time is over; (images taken, time it took)."""
  began, images, elapsed = time.perf_counter(), 0, 0.0
  while elapsed < seconds:
    next(batches)
    images += BATCH
    elapsed = time.perf_counter() - began
  return images, elapsed


def cpu_seconds() -> float:
  """User and system time of this process and of those that it started by `multiprocessing`."""
  processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  ticks = 0
  for process in processes:
    # What follows the name, which stands in parentheses: utime and stime are fields 14 and 15.
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
  """CPU time of all processes on all cores, with what a hypervisor took."""
  fields = pathlib.Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
  user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def compare_pixels(task: Task, count: int) -> dict:
  """How far each of DECODERS is from the first on `count` crops, in grey levels.

  Returns:
    For each decoder {"decoded", "resized": {"mean": mean absolute difference, "mean_per_channel":
    [red, green, blue], "bias": mean difference, with its sign, "max": largest}}; resized as ours
    resizes, and in uint8 as it delivers.
  """
  import tensorflow as tf

  totals = {name: {"decoded": _Differences(), "resized": _Differences()} for name in DECODERS}
  for jpeg, crop in zip(*_jpegs_and_crops(task.jpegs()[:count]), strict=True):
    exact = None
    for name, decoder in DECODERS.items():
      decoded = tf.io.decode_and_crop_jpeg(jpeg, crop, channels=3, **decoder)
      resized = tf.cast(tf.image.resize(decoded, [SIDE, SIDE]) + 0.5, tf.uint8)
      images = {"decoded": decoded.numpy().astype(int), "resized": resized.numpy().astype(int)}
      exact = exact or images
      for stage, image in images.items():
        totals[name][stage].add(image - exact[stage])
  return {
    name: {stage: total.to_dict() for stage, total in stages.items()}
    for name, stages in totals.items()
  }


class _Differences:
  """Of the images so far: sums and maximum of differences, a number a channel."""

  def __init__(self):
    self._absolute, self._signed, self._max = (np.zeros(3, int) for _ in range(3))
    self._pixels = 0

  def add(self, differences: np.ndarray):
    """`differences`: int `[H, W, 3]`."""
    self._absolute += np.abs(differences).sum((0, 1))
    self._signed += differences.sum((0, 1))
    self._max = np.maximum(self._max, np.abs(differences).max((0, 1)))
    self._pixels += differences.shape[0] * differences.shape[1]

  def to_dict(self) -> dict:
    means = self._absolute / self._pixels
    return {
      "mean": float(means.mean()),
      "mean_per_channel": means.tolist(),
      "bias": float((self._signed / self._pixels).mean()),
      "max": int(self._max.max()),
    }


_JOBS = {job.__name__: job for job in (write_files, time_reader, compare_pixels)}


def work():
  """The program of such a process: a job comes on stdin, its result leaves on stdout, as JSON."""
  job = json.loads(sys.stdin.readline())
  task = Task(**job["task"])
  # Before any library counts the cores or starts a thread.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.cores])
  threading.Thread(target=_end_with_parent, daemon=True).start()
  try:
    result = _JOBS[job["job"]](task, **job["arguments"])
  except UserError as error:
    result = {"error": str(error)}
  print(f"\n{json.dumps(result)}", flush=True)
  # Without the destructors of the libraries' threads, some of which wait.
  os._exit(0)


def _end_with_parent():
  """Ends this process and those that it started as soon as its parent is gone, however it went."""
  os.read(0, 1)  # Of a pipe that only the parent holds open, and never writes to again.
  os.killpg(0, signal.SIGKILL)


# What the parent does.


def run_alone(job: str, task: Task, arguments: dict) -> dict:
  """Runs a job in a process group of its own, of which nothing is left afterwards.

  Raises:
    UserError: it failed; what it printed is on stderr already, but for a user's mistake.
  """
  message = {"job": job, "task": dataclasses.asdict(task), "arguments": arguments}
  name = arguments.get("reader", job)
  seconds = _START_SECONDS + arguments.get("warm_up", 0) + arguments.get("seconds", 0)
  limit = time.monotonic() + seconds
  with tempfile.TemporaryDirectory() as scratch:
    output, log = pathlib.Path(scratch) / "output", pathlib.Path(scratch) / "log"
    with open(output, "wb") as stdout, open(log, "wb") as stderr:
      process = subprocess.Popen(
        [sys.executable, "-c", "from tools.benchmark import input_pipeline; input_pipeline.work()"],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        # Nothing here is for a GPU; what TensorFlow leaves behind goes with the directory.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TMPDIR": scratch},
        start_new_session=True,
      )
    try:
      with contextlib.suppress(BrokenPipeError):  # It failed at once.
        process.stdin.write(f"{json.dumps(message)}\n".encode())
        process.stdin.flush()
      # Until it is killed it stays a zombie, so that its group's number is not given away.
      while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > limit:
          raise UserError(f"{name} did not end within {seconds:.0f} s.")
        time.sleep(0.1)
    finally:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    lines = output.read_text().splitlines()
    if process.returncode != 0 or not lines:
      lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
      print("\n".join(lines), file=sys.stderr)
      raise UserError(f"{name} failed with status {process.returncode}.")
  result = json.loads(lines[-1])
  if "error" in result:
    raise UserError(result["error"])
  return result


def run_in_turns(
  tasks: dict[str, tuple[str, Task]], turns: int, warm_up: float, seconds: float
) -> dict[str, list[dict]]:
  """Times each (reader, task) once a turn, each turn beginning with another; results by name."""
  results = {name: [] for name in tasks}
  names = list(tasks)
  for turn in range(turns):
    first = turn % len(names)
    for name in names[first:] + names[:first]:
      if results[name] and "missing" in results[name][0]:
        continue
      reader, task = tasks[name]
      arguments = {"reader": reader, "warm_up": warm_up, "seconds": seconds}
      found = run_alone("time_reader", task, arguments)
      results[name].append(found)
      rate = (
        "missing" if "missing" in found else f"{found['images'] / found['seconds']:.0f} images/s"
      )
      print(f"turn {turn + 1} of {turns}: {name}: {rate}", file=sys.stderr, flush=True)
  return results


def summarize(results: dict[str, list[dict]], cores: int, baseline: str) -> dict[str, dict]:
  """Medians over the turns, by name; `ratio`: baseline's images a second over this one's."""
  rows = {}
  for name, turns in results.items():
    if "missing" in turns[0]:
      rows[name] = {"missing": turns[0]["missing"]}
      continue
    rates = [turn["images"] / turn["seconds"] for turn in turns]
    rows[name] = {
      "images_per_second": statistics.median(rates),
      "min": min(rates),
      "max": max(rates),
      "turns": rates,
      "images_per_second_per_core": statistics.median(rates) / cores,
      "cpu_ms_per_image": statistics.median(
        1000 * turn["cpu_seconds"] / turn["images"] for turn in turns
      ),
      "cores_used_by_others": max(turn["others_seconds"] / turn["seconds"] for turn in turns),
    }
  ours = rows.get(baseline, {}).get("images_per_second")
  for row in rows.values():
    if "missing" not in row:
      row["ratio"] = ours / row["images_per_second"] if ours else None
  return rows


def to_table(rows: dict[str, dict], heading: str) -> list[str]:
  """Lines of `summarize`'s rows: with the ratio, or with "pixels" where rows have them."""
  width = max(map(len, [heading, *rows]))
  pixels = any("pixels" in row for row in rows.values())
  last = ("decoded |Δ|", "Δ", "max", "resized |Δ|", "Δ", "max") if pixels else ("ours/this",)
  lines = [_line(heading, width, ("images/s", "[min–max]", "a core", "CPU ms/image", *last))]
  for name, row in rows.items():
    if "missing" in row:
      lines.append(f"{name:<{width}}  not measured: {row['missing']}")
      continue
    if pixels:
      found = [row["pixels"][stage] for stage in ("decoded", "resized")]
      last = [
        text
        for each in found
        for text in (f"{each['mean']:.3f}", f"{each['bias']:+.3f}", str(each["max"]))
      ]
    else:
      last = ["–" if row["ratio"] is None else f"{row['ratio']:.2f}"]
    cells = (
      f"{row['images_per_second']:.0f}",
      f"[{row['min']:.0f}–{row['max']:.0f}]",
      f"{row['images_per_second_per_core']:.0f}",
      f"{row['cpu_ms_per_image']:.2f}",
      *last,
    )
    lines.append(_line(name, width, cells))
  return lines


def _line(name: str, width: int, cells) -> str:
  return f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells)


def hardware() -> dict:
  """The CPU and the logical ones that this process may use."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return {"cpu": line.partition(":")[2].strip(), "cores": len(os.sched_getaffinity(0))}
  return {"cpu": platform.processor(), "cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str]:
  """Of what was measured, by package; what is not installed is left out."""
  found = {"python": platform.python_version()}
  for package in ("tensorflow", "numpy", "pillow", "nvidia-dali-cuda120"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def benchmark_readers(
  task: Task, readers: list[str], turns: int, warm_up: float, seconds: float
) -> dict[str, dict]:
  """The rows of the readers' table."""
  tasks = {reader: (reader, task) for reader in readers}
  return summarize(run_in_turns(tasks, turns, warm_up, seconds), task.cores, "ours")


def benchmark_decoders(
  task: Task, count: int, turns: int, warm_up: float, seconds: float
) -> dict[str, dict]:
  """The rows of the decoders' table: those of bare libjpeg-turbo, with "pixels"."""
  pixels = run_alone("compare_pixels", task, {"count": count})
  tasks = {
    name: ("bare libjpeg-turbo", dataclasses.replace(task, decoder=decoder))
    for name, decoder in DECODERS.items()
  }
  results = run_in_turns(tasks, turns, warm_up, seconds)
  rows = summarize(results, task.cores, next(iter(DECODERS)))
  return {name: {**row, "pixels": pixels[name]} for name, row in rows.items()}


def _checked_output(path: str) -> pathlib.Path | None:
  if not path:
    return None
  output = pathlib.Path(path).expanduser()
  if output.is_dir() or not os.access(output.parent, os.W_OK):
    raise UserError(f"--json={path} cannot be written; name a file in a directory that can.")
  return output


def _run():
  values = flags.FLAGS
  unknown = [reader for reader in values.readers if reader not in READERS]
  if unknown or not values.readers:
    raise UserError(
      f"--readers={','.join(unknown)}: no such reader; there are {', '.join(READERS)}."
    )
  output = _checked_output(values.json)
  available = len(os.sched_getaffinity(0))
  cores = values.cores or available
  if cores > available:
    raise UserError(f"--cores={cores}: there are {available}.")
  with tempfile.TemporaryDirectory(prefix="benchmark_input_") as files:
    data_dir = os.path.expanduser(values.data_dir)
    task = Task(values.dataset, values.split, data_dir, files, cores)
    found = run_alone("write_files", task, {"examples": values.examples})
    task = dataclasses.replace(task, **found)
    timing = (values.turns, values.warm_up, values.seconds)
    if values.pixels:
      rows, heading = benchmark_decoders(task, values.pixels, *timing), "decoder"
    else:
      rows, heading = benchmark_readers(task, values.readers, *timing), "reader"
    size = sum(path.stat().st_size for path in task.jpegs())
    count = len(task.jpegs())
  report = {
    "task": {
      "dataset": task.dataset,
      "split": task.split,
      "examples": count,
      "mean_jpeg_bytes": size / count,
      "batch": BATCH,
      "image_size": SIDE,
      "decoder": task.decoder,
      "cores": cores,
      "turns": values.turns,
      "warm_up": values.warm_up,
      "seconds": values.seconds,
    },
    "hardware": hardware(),
    "versions": versions(),
    f"{heading}s": rows,
  }
  print("\n".join(to_table(rows, heading)))
  print(
    f"{values.turns} turns of {values.seconds:g} s on {cores} of {available} cores of "
    f"{report['hardware']['cpu']}; {task.dataset} {task.split}, {count} JPEGs of "
    f"{size / count / 1000:.0f} kB; "
    + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  )
  measured = [row for row in rows.values() if "missing" not in row]
  others = max((row["cores_used_by_others"] for row in measured), default=0.0)
  if others > _OTHERS:
    print(f"Note: others used up to {others:.1f} cores meanwhile; measure on an idle machine.")
  if output:
    try:
      partial = output.with_name(f"{output.name}.partial")
      partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
      partial.replace(output)
    except OSError as error:
      raise UserError(f"--json={output} cannot be written ({error.strerror}).") from error


def main(argv: list[str]) -> int:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # `finally` is heeded.
  try:
    if len(argv) > 1:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
    _run()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  return 0


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  )
  flags.DEFINE_string("dataset", "imagenet2012", "A data set of JPEGs, prepared as TFRecords.")
  flags.DEFINE_string("split", "train", "Split to read, or a slice of one such as train[:2000].")
  flags.DEFINE_integer(
    "examples", 10_000, "How many examples of a whole split to read, at most.", lower_bound=BATCH
  )
  flags.DEFINE_list("readers", list(READERS), "Readers to measure, by name.")
  flags.DEFINE_integer("turns", 5, "How often each is measured.", lower_bound=1)
  flags.DEFINE_float("seconds", 10.0, "How long each is measured in a turn.", lower_bound=0.1)
  flags.DEFINE_float("warm_up", 3.0, "Seconds of reading before that.", lower_bound=0.0)
  flags.DEFINE_integer("cores", None, "Logical CPUs to use; left out: all.", lower_bound=1)
  flags.DEFINE_integer(
    "pixels", 0, "Compare decoders on so many images instead of readers.", lower_bound=0
  )
  flags.DEFINE_string("json", "", "File for what was measured, as JSON.")


if __name__ == "__main__":
  define_flags()
  app.run(main)
