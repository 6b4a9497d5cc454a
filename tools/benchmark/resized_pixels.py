"""How far are the pixels of a resized data set from those of the original?

  python -m tools.benchmark.resized_pixels imagenet2012 imagenet2012_shorter480 --data_dir=data

Compares each further data set with the first, example by example, as an evaluation would see them:
the centre crop, resized to --image_size. The table shows the mean size of a file and, in grey
levels, the mean |Δ|, the mean Δ and the largest |Δ|.

`tools.prepare_data --resize_shorter_side` makes such data sets;
`tools.benchmark.input_pipeline --dataset=NAME` measures how fast they are read.
"""

import os

from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools import output, program


def define_flags():
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  )
  flags.DEFINE_string("split", "validation", "Split to compare, or a slice of it.")
  flags.DEFINE_integer("images", 500, "Images to compare, at most.", lower_bound=1)
  flags.DEFINE_integer("image_size", 224, "Side of the network's images in pixels.", lower_bound=1)


def compare(datasets: list[str], split: str, data_dir: str, images: int, image_size: int) -> dict:
  """Returns by data set {"bytes": of a file on average} and, except for the first, what
  `Differences.to_dict` does of the images minus the first one's.

  Raises:
    UserError: the splits have different numbers of examples, or different labels.
  """
  import tensorflow as tf

  from tf_largebatch.data.augmentation import centre_crop, resize
  from tf_largebatch.data.image_loading import decode_and_crop
  from tf_largebatch.data.sources import open_source
  from tools.benchmark.readers.pixels import Differences

  recipe = Recipe(image_size=image_size)

  def evaluated(content):
    cropped = decode_and_crop(content, centre_crop, channels=3)
    return resize(recipe, cropped[tf.newaxis])[0].numpy().astype(int)

  sources = {name: open_source(name, split, data_dir) for name in datasets}
  counts = {source.num_examples for source in sources.values()}
  if len(counts) > 1:
    raise UserError(f"{split} has {sorted(counts)} examples in these data sets; not the same ones.")
  count = min(images, *counts)
  sizes, totals = dict.fromkeys(datasets, 0), {name: Differences() for name in datasets[1:]}
  for index in range(count):
    first = None
    for name, source in sources.items():
      content, label = source.parse(source.record(index))
      sizes[name] += len(content.numpy())
      image, label = evaluated(content), int(label)
      first = first or (image, label)
      if label != first[1]:
        raise UserError(
          f"Example {index} of {name} has label {label}, but {first[1]} in the first."
        )
      if name in totals:
        totals[name].add(image - first[0])
  return {
    name: {"bytes": sizes[name] / count} | (totals[name].to_dict() if name in totals else {})
    for name in datasets
  }


def main(datasets: list[str]) -> None:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  values = flags.FLAGS
  if len(set(datasets)) < 2:
    raise UserError("Two data sets are needed, such as imagenet2012 imagenet2012_shorter480.")
  data_dir = os.path.expanduser(values.data_dir)
  found = compare(datasets, values.split, data_dir, values.images, values.image_size)
  width = max(map(len, datasets))
  print(output.table_line("data set", width, ("kB/image", "|Δ|", "Δ", "max |Δ|"), 10))
  for name, row in found.items():
    cells = [f"{row['bytes'] / 1000:.1f}"]
    if "mean" in row:
      cells += [f"{row['mean']:.3f}", f"{row['bias']:+.3f}", str(row["max"])]
    print(output.table_line(name, width, cells, 10))


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
