"""Crops, flips and resizing."""

import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch.data import augmentation, shuffle
from tf_largebatch.recipe import AUGMENTATIONS, Recipe

RECIPE = Recipe(image_size=8, channel_mean=(10.4, 20.0, 30.0))


def test_every_augmentation_of_a_recipe_has_its_transforms():
  assert augmentation.TRANSFORMS.keys() == set(AUGMENTATIONS)


@pytest.mark.parametrize("shape", [(375, 500, 3), (500, 375, 3), (64, 64, 3)])
def test_random_crop_has_the_papers_area_and_aspect(shape):
  draws = shuffle.draws(RECIPE, tf.constant(0, tf.int64), tf.constant(0, tf.int64), 3000)
  tries, _ = augmentation.crops_and_flips(draws)
  top, left, height, width = np.array(augmentation.random_crop(shape, tries))
  assert np.all((top >= 0) & (left >= 0) & (top + height <= shape[0]) & (left + width <= shape[1]))
  share = height * width / (shape[0] * shape[1])
  # Rounding to whole pixels moves a side by at most one half.
  slack = 0.5 / np.minimum(height, width)
  assert np.all(share >= 0.08 * (1 - slack) ** 2) and np.all(share <= 1)
  aspect = width / height
  assert np.all(aspect <= 4 / 3 * (1 + 3 * slack)) and np.all(aspect >= 3 / 4 / (1 + 3 * slack))
  assert share.min() < 0.1 and share.max() > 0.85 and aspect.min() < 0.78 and aspect.max() > 1.3
  assert 0.45 < np.mean(np.log(aspect) > 0) < 0.55 or shape[0] != shape[1]
  # Crops lie left and right, above and below, equally often.
  for offset, room in ((left, shape[1] - width), (top, shape[0] - height)):
    assert 0.47 < np.mean(offset[room > 20] / room[room > 20]) < 0.53
  if shape[0] == shape[1]:
    # A share s fits if |log aspect| ≤ -log s: always up to 3/4, and with probability -log s /
    # log(4/3) above. Integrated on paper: 0.789 / 0.92 of the draws fit, their mean is 0.478, and
    # 0.23 / 0.789 = 0.29 of them are below 0.31. The limits are three standard deviations.
    assert abs(np.mean(share) - 0.478) < 0.014
    assert abs(np.mean(share < 0.31) - 0.2915) < 0.025


def test_random_crop_of_a_sliver_falls_back_to_a_centre_crop():
  for seed in range(10):
    tries, _ = augmentation.crops_and_flips(tf.random.stateless_uniform([1, 44], [0, seed]))
    crop = augmentation.random_crop(tf.constant([1000, 10, 3]), tries[0])
    np.testing.assert_array_equal(crop, [493, 0, 13, 10])


@pytest.mark.parametrize("name", augmentation.TRANSFORMS)
def test_crops_of_several_images_are_those_of_each(name):
  shapes = np.random.default_rng(0).integers(1, 600, (200, 3)).astype(np.int32)
  shapes[0] = (1000, 10, 3)  # No try fits.
  draws = shuffle.draws(RECIPE, tf.constant(0, tf.int64), tf.constant(0, tf.int64), len(shapes))
  for transform in augmentation.TRANSFORMS[name]:
    crop_draws, _ = transform.split_draws(draws)
    together = [np.broadcast_to(side, 200) for side in transform.crop(shapes.T, crop_draws)]
    alone = [
      [int(side) for side in transform.crop(shape, draw)]
      for shape, draw in zip(shapes, crop_draws, strict=True)
    ]
    np.testing.assert_array_equal(np.transpose(together), alone)


def test_the_centre_crop_is_224_of_a_shorter_side_of_256():
  for shape, expected in [
    ((256, 512, 3), [16, 144, 224, 224]),
    ((1000, 500, 3), [281, 31, 438, 438]),
    ((1, 1, 3), [0, 0, 1, 1]),
  ]:
    np.testing.assert_array_equal(augmentation.centre_crop(shape), expected)


def test_pad_crop_takes_another_draw_for_each_choice():
  """Row, column and flip of each image follow from its own draws, and all are equally likely."""
  choices = [(f, r, c) for f in (0, 0.49, 0.5, 0.99) for r in range(9) for c in range(9)]
  draws = np.array([[f, (r + 0.5) / 9, (c + 0.5) / 9] for f, r, c in choices], np.float32)
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  images = tf.constant(np.repeat(image[None], len(choices), axis=0))
  actual = augmentation.shift_and_flip(RECIPE, images, tf.constant(draws)).numpy()
  padded = np.empty((16, 16, 3), np.uint8)
  padded[:] = (10, 20, 30)
  padded[4:12, 4:12] = image
  for (f, r, c), crop in zip(choices, actual, strict=True):
    expected = padded[r : r + 8, c : c + 8]
    np.testing.assert_array_equal(crop, expected[:, ::-1] if f < 0.5 else expected)


def test_area_crops_lie_anywhere_whatever_else_was_drawn():
  """Top, left and flip are independent, and a crop touches the far edge as often as it should."""
  first = tf.constant(0, tf.int64)
  tries, flips = augmentation.crops_and_flips(shuffle.draws(RECIPE, first, first, 3000))
  top, left, height, width = np.array(augmentation.random_crop((64, 64, 3), tries))
  rooms, offsets = np.array([64 - height, 64 - width]), np.array([top, left])
  far, expected = np.sum(offsets == rooms, axis=1), np.sum(1 / (rooms + 1), axis=1)
  assert np.all(np.abs(far - expected) < 4 * np.sqrt(expected))
  wide = np.all(rooms > 8, axis=0)
  places = offsets[:, wide] / rooms[:, wide]
  correlation = np.corrcoef([*places, flips.numpy()[wide]]) - np.eye(3)
  assert np.max(np.abs(correlation)) < 4.5 / np.sqrt(np.sum(wide))


@pytest.mark.parametrize("shape", [(5, 9), (8, 8), (20, 13), (3, 40)])
def test_images_are_resized_bilinearly_and_rounded(shape):
  """The expected values take pixel centres at halves, in float64; pixels are the nearest levels."""
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)

  def weights(size):
    """Returns the weights that each of 8 pixels gives to those of a side: [8, size]."""
    places = np.clip((np.arange(8) + 0.5) * size / 8 - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))

  expected = np.einsum("ih,jw,hwc->ijc", weights(shape[0]), weights(shape[1]), image.astype(float))
  actual = augmentation.resize(RECIPE, tf.constant(image[None])).numpy()[0]
  assert actual.dtype == np.uint8
  assert np.max(np.abs(actual - expected)) < 0.5 + 1e-3
