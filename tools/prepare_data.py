"""Prepares data sets for training and prints a line about each.

  python -m tools.prepare_data cifar10 fashion_mnist --data_dir=data

takes any data set of TensorFlow Datasets (TFDS), as `name`, `name/config` or `name/config:version`.
CIFAR-10 and Fashion-MNIST can also be prepared where only package registries can be reached.
ImageNet (`imagenet2012`) is prepared from its two official tars, or those that
`tools.datasets.make_photographs` makes, in DATA_DIR/downloads/manual.

  python -m tools.prepare_data my_flowers --images=DIR --data_dir=data
  python -m tools.prepare_data my_flowers --csv=FILE --data_dir=data
  python -m tools.prepare_data my_package/my_set.py --data_dir=data

prepare your own images, or a data set of your own TFDS builder (docs/data.md).

  python -m tools.prepare_data imagenet2012 --resize_shorter_side=480 --data_dir=data

also prepares `imagenet2012_shorter480`, a data set with smaller images.

The trainer itself prepares what TFDS can download. Use this program to prepare the data first, for
instance on the one machine of a cluster that reaches the internet, or in another file format.
"""

import os
import pathlib
import signal
import sys

import tensorflow_datasets as tfds
from absl import flags, logging

from tf_largebatch import standard_streams
from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError
from tf_largebatch.options import expand_home
from tools import program
from tools.datasets import image_files, own_builders
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


def _describe_use(dataset: str, data_dir: str) -> str:
  """Returns the numbers of the user's classes, and how to train on them."""
  info = tfds.builder(dataset, data_dir=data_dir).info
  names = [f"{number} {name}" for number, name in enumerate(info.features["label"].names)]
  path = os.path.join(info.data_dir, "label.labels.txt")
  splits = ""
  if "validation" not in info.splits and "test" not in info.splits:
    splits = " --train_split=train[:90%] --validation_split=train[90%:]"
  return (
    f"Classes: {image_files.listing(names, 20)} (one a line in {path})\n"
    f"Train with: --dataset={dataset} --data_dir={data_dir}{splits}"
  )


def _prepare_images(datasets: list[str], data_dir: str) -> None:
  """Prepares the folder or the CSV file of the flags as the one data set that was named."""
  values = flags.FLAGS
  if len(datasets) != 1 or (values.images and values.csv):
    raise UserError(
      f"One name, and one of --images and --csv are needed; given: {' '.join(datasets)}."
    )
  if values.images:
    images = image_files.from_folder(pathlib.Path(values.images).expanduser())
  else:
    images = image_files.from_csv(pathlib.Path(values.csv).expanduser())
  from tools.datasets import own_images  # TensorFlow takes seconds to import.

  own_images.prepare(datasets[0], images, data_dir, values.file_format)


def _end_on_signals() -> None:
  """Makes signals end the program as an exception does, which removes what is incomplete."""
  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_DFL:
      signal.signal(number, lambda number, _: sys.exit(128 + number))


def main(datasets: list[str]) -> None:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  logging.set_verbosity(logging.INFO)
  standard_streams.drop_library_logs(logging.get_absl_handler())
  values = flags.FLAGS
  data_dir = expand_home(values.data_dir)
  if not datasets:
    raise UserError("No data set was named; name one or more, such as cifar10.")
  if "synthetic" in datasets:
    raise UserError("synthetic needs no data and cannot be prepared; train with it directly.")
  _end_on_signals()
  own = values.images or values.csv
  if own:
    names = datasets
    _prepare_images(datasets, data_dir)
  else:
    for module in values.imports:
      own_builders.import_module(module)
    names = [own_builders.resolve(dataset) for dataset in datasets]
    for name in names:
      preparation.prepare(name, data_dir, values.file_format, MIRRORS)
  if values.resize_shorter_side:
    from tools.datasets import resized  # TensorFlow takes seconds to import.

    arguments = (values.resize_shorter_side, data_dir, values.file_format)
    names = [resized.prepare(name, *arguments) for name in names]
  for name in names:
    print(_describe(name, data_dir))
    if own:
      print(_describe_use(name, data_dir))


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
  flags.DEFINE_string(
    "images",
    None,
    "Prepare a folder of images under the name given: DIR/CLASS/*, or DIR/train/CLASS/* and "
    "likewise validation and test.",
  )
  flags.DEFINE_string(
    "csv",
    None,
    "Prepare the images that a CSV file lists: a header and columns path, label and, optionally, "
    "split. Paths are relative to the file.",
  )
  flags.DEFINE_integer(
    "resize_shorter_side",
    None,
    "Also prepare NAME_shorterN, whose images have at most N pixels on the shorter side.",
    lower_bound=1,
  )
  flags.DEFINE_list("imports", [], "Modules to import first, which define builders of TFDS.")


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
