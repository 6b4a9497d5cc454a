"""The random crops."""

import random

import numpy as np
import pytest

from tools.benchmark.readers.task import draw_crop


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (80, 60)])
def test_crops_are_within_the_image_and_the_ranges(height, width):
  rng = random.Random(1)
  crops = np.array([draw_crop(height, width, rng) for _ in range(500)])
  top, left, heights, widths = crops.T
  assert np.all((top >= 0) & (left >= 0) & (top + heights <= height) & (left + widths <= width))
  areas, aspects = heights * widths / (height * width), widths / heights
  # Sides are rounded to pixels.
  assert 0.07 < areas.min() < 0.12 and 0.8 < areas.max() <= 1
  assert 0.72 < aspects.min() < 0.85 and 1.2 < aspects.max() < 1.38


def test_if_no_crop_fits_the_largest_in_the_centre_is_taken():
  rng = random.Random(1)
  assert draw_crop(1000, 12, rng) == (492, 0, 16, 12)
  assert draw_crop(12, 1000, rng) == (0, 492, 12, 16)
