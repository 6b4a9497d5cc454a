"""Compares the pixels that libjpeg's settings produce."""

import numpy as np

from tools.benchmark.readers.task import SIDE, Task, jpegs_and_crops

# The exact settings come first; the others are compared with them.
DECODERS = {
  f"{dct_method}, {'fancy' if fancy else 'plain'} upscaling": {
    "dct_method": dct_method,
    "fancy_upscaling": fancy,
  }
  for dct_method in ("INTEGER_ACCURATE", "INTEGER_FAST")
  for fancy in (True, False)
}


def compare_pixels(task: Task, count: int) -> dict:
  """Compares each of DECODERS with the first one on `count` crops, in grey levels.

  Returns:
    For each decoder {"decoded", "resized": {"mean": mean absolute difference, "mean_per_channel":
    [red, green, blue], "bias": mean signed difference, "max": largest absolute difference}}. Images
    are resized as ours are, and compared as uint8.
  """
  import tensorflow as tf

  totals = {name: {"decoded": Differences(), "resized": Differences()} for name in DECODERS}
  for jpeg, crop in zip(*jpegs_and_crops(task.jpegs()[:count]), strict=True):
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


class Differences:
  """Sums and maxima, per channel, of the differences between images."""

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
