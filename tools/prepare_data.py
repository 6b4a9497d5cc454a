"""Prepares data sets for training and prints a line about each.

  python -m tools.prepare_data cifar10 fashion_mnist --data_dir=data

takes any data set of TensorFlow Datasets (TFDS), as `name`, `name/config` or `name/config:version`.
CIFAR-10 and Fashion-MNIST can also be prepared where only package registries can be reached.
ImageNet (`imagenet2012`) is prepared from its two official tars, or those that
`tools.datasets.make_photographs` makes, in DATA_DIR/downloads/manual.

The trainer itself prepares what TFDS can download. Use this program to prepare the data first, for
instance on the one machine of a cluster that reaches the internet, or in another file format.
"""

import logging as stdlib_logging

import tensorflow_datasets as tfds
from absl import flags, logging

from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError
from tf_largebatch.options import expand_home
from tools import program
from tools.datasets.mirrors import MIRRORS


def _describe(dataset: str, data_dir: str) -> str:
  """Returns a line about a prepared data set."""
  builder = tfds.builder(dataset, data_dir=data_dir)
  splits = [f"{name} {split.num_examples}" for name, split in builder.info.splits.items()]
  size = sum(path.stat().length for path in builder.data_path.iterdir())
  return (
    f"{builder.info.full_name}: {', '.join(splits)} examples, {tfds.core.utils.Size(size)} of "
    f"{builder.info.file_format.value} in {builder.data_dir}"
  )


def main(datasets: list[str]) -> None:
  logging.set_verbosity(logging.INFO)
  # TFDS logs every file that it opens.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno >= stdlib_logging.WARNING or "tensorflow_datasets" not in record.pathname
    )
  )
  data_dir = expand_home(flags.FLAGS.data_dir)
  if not datasets:
    raise UserError("No data set was named; name one or more, such as cifar10.")
  if "synthetic" in datasets:
    raise UserError("synthetic needs no data and cannot be prepared; train with it directly.")
  for dataset in datasets:
    preparation.prepare(dataset, data_dir, flags.FLAGS.file_format, MIRRORS)
  for dataset in datasets:
    print(_describe(dataset, data_dir))


def define_flags() -> None:
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  )
  flags.DEFINE_enum(
    "file_format",
    None,
    ["tfrecord", "array_record"],
    "Format of the files. Default: the format the data set is prepared in, or else TFDS's default.",
  )


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
