"""The comparison of libjpeg's settings."""

import numpy as np
import pytest
from PIL import Image

from tools.benchmark.readers.pixels import DECODERS, compare_pixels
from tools.benchmark.readers.task import Task, jpegs_and_crops


def test_pixels_are_compared_with_those_of_the_exact_decoder(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8)
  path = tmp_path / "0000000_3.jpg"
  Image.fromarray(noise).save(path, quality=90, subsampling="4:2:0")
  pixels = compare_pixels(Task("name", "train", "", str(tmp_path), cores=1), 5)
  exact, plain, fast, fast_plain = DECODERS
  zero = {"mean": 0.0, "mean_per_channel": [0.0, 0.0, 0.0], "bias": 0.0, "max": 0}
  assert pixels[exact] == {"decoded": zero, "resized": zero}
  (jpeg,), (crop,) = jpegs_and_crops([path])
  import tensorflow as tf

  decoded = [
    tf.io.decode_and_crop_jpeg(jpeg, crop, channels=3, **DECODERS[name]) for name in (exact, fast)
  ]
  signed = decoded[1].numpy().astype(int) - decoded[0].numpy()
  differences = np.abs(signed)
  assert pixels[fast]["decoded"]["bias"] == pytest.approx(signed.mean())
  assert 0 < differences.max() == pixels[fast]["decoded"]["max"] < 20
  np.testing.assert_allclose(
    pixels[fast]["decoded"]["mean_per_channel"], differences.mean((0, 1)), rtol=1e-12
  )
  assert pixels[fast]["decoded"]["mean"] == pytest.approx(differences.mean())
  # The chroma of noise changes a lot if it is not upscaled smoothly.
  assert pixels[plain]["decoded"]["mean"] > pixels[fast]["decoded"]["mean"]
  assert pixels[fast_plain]["resized"]["mean"] > 0
