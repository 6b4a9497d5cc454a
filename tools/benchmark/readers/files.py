"""Finds a prepared data set's examples and writes their JPEGs as files."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

from tf_largebatch.errors import UserError, summary
from tools.benchmark.readers import tfrecord_readers
from tools.benchmark.readers.task import BATCH, Task


def write_files(task: Task, examples: int) -> dict:
  """Writes the first `examples` of a whole split, or all of a slice, to `task.files`.

  Returns:
    The fields of the task that are known now, by name.

  Raises:
    UserError: the data set is not prepared as TFRecords of JPEGs, or has too few examples.
  """
  found, describe = _find(task, examples)
  task = dataclasses.replace(task, **found)
  dataset = tfrecord_readers.shards(task).flat_map(tfrecord_readers.open_shard)
  dataset = dataset.map(functools.partial(tfrecord_readers.parse, task))
  try:
    for index, (image, label) in enumerate(dataset.as_numpy_iterator()):
      if not image.startswith(b"\xff\xd8"):
        raise UserError(f"{describe(index)} is not a JPEG; name a data set of JPEGs.")
      (pathlib.Path(task.files) / f"{index:07d}_{label}.jpg").write_bytes(image)
  except OSError as error:
    raise UserError(
      f"{task.files} cannot be written ({error.strerror}); name another directory in TMPDIR, or "
      "fewer --examples."
    ) from error
  return found


def _find(task: Task, examples: int) -> tuple[dict, Callable[[int], str]]:
  """Checks the data set; what `write_files` returns, and a function that describes an example."""
  import tensorflow_datasets as tfds

  from tf_largebatch.data import image_loading, sources

  try:
    builder = tfds.builder(task.dataset, data_dir=task.data_dir)
    prepared = builder.data_path.exists() and builder.is_prepared()
  except Exception as error:  # TFDS raises a different type for each part that is wrong.
    raise UserError(f"TensorFlow Datasets has no {task.dataset!r}: {summary(error)}") from error
  if not prepared:
    raise UserError(
      f"{task.dataset} is not prepared in {task.data_dir}; name another --data_dir, or prepare it: "
      f"python -m tools.prepare_data {task.dataset} --data_dir={task.data_dir}"
    )
  info, split = builder.info, task.split
  if info.file_format != tfds.core.FileFormat.TFRECORD:
    raise UserError(
      f"{task.dataset} is prepared as {info.file_format.value}, which not all readers support; "
      "prepare it as tfrecord."
    )
  if split in info.splits and info.splits[split].num_examples > examples:
    split = f"{split}[:{examples}]"
  source = sources.open_source(task.dataset, split, task.data_dir)
  if source.num_examples < BATCH:
    raise UserError(
      f"{split} has {source.num_examples} examples, fewer than a batch; name a split of at least "
      f"{BATCH}."
    )
  if source.image_shape is not None:
    raise UserError(f"{task.dataset} has images of one fixed size; name a data set of photographs.")
  shards = info.splits[split].file_instructions
  found = {
    "split": split,
    "shards": [(os.fspath(shard.filename), shard.skip, shard.take) for shard in shards],
    "keys": info.supervised_keys,
    "decoder": image_loading.JPEG_DECODING,
  }
  return found, source.describe
