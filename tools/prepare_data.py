"""Prepares data sets for training, and says what is there.

  python -m tools.prepare_data cifar10 fashion_mnist --data_dir=data

takes any data set of TensorFlow Datasets (TFDS), as `name`, `name/config` or `name/config:version`.
CIFAR-10 and Fashion-MNIST come even where only package registries answer. ImageNet (`imagenet2012`)
is prepared from its two official tars, or those of `tools.datasets.make_photographs`, in
DATA_DIR/downloads/manual.

Training prepares by itself what is missing. This program does it before, for instance on the one
machine of a cluster that reaches the internet, or in another file format.
"""

import logging as stdlib_logging
import os
import sys

import tensorflow_datasets as tfds
from absl import app, flags, logging

from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError


def _describe(dataset: str, data_dir: str) -> str:
  """Returns a line about a data set that is prepared."""
  builder = tfds.builder(dataset, data_dir=data_dir)
  splits = [f"{name} {split.num_examples}" for name, split in builder.info.splits.items()]
  size = sum(path.stat().length for path in builder.data_path.iterdir())
  return (
    f"{builder.info.full_name}: {', '.join(splits)} examples, {tfds.core.utils.Size(size)} of "
    f"{builder.info.file_format.value} in {builder.data_dir}"
  )


def main(argv: list[str]) -> int:
  logging.set_verbosity(logging.INFO)
  # TFDS tells each file that it opens.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= stdlib_logging.WARNING or "tensorflow_datasets" not in record.pathname
    )
  )
  data_dir = os.path.expanduser(flags.FLAGS.data_dir)
  try:
    if len(argv) < 2:
      raise UserError("No data set was named; name one or more, such as cifar10.")
    if "synthetic" in argv[1:]:
      raise UserError("synthetic needs no data and cannot be prepared; train with it as it is.")
    for dataset in argv[1:]:
      preparation.prepare(dataset, data_dir, flags.FLAGS.file_format)
    for dataset in argv[1:]:
      print(_describe(dataset, data_dir))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  )
  flags.DEFINE_enum(
    "file_format",
    None,
    ["tfrecord", "array_record"],
    "Format of the files; left out, what is there or else TFDS's own choice.",
  )


if __name__ == "__main__":
  define_flags()
  app.run(main)
