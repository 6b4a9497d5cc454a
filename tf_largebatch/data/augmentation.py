"""How images of any shape become images of the recipe's size: crops, flips and resizing."""

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from tf_largebatch.data.shuffle import DRAWS
from tf_largebatch.recipe import Recipe

_PADDING = 4  # Pixels on each side, He et al. 2016 (arXiv 1512.03385), §4.2.
_CROP_TRIES = DRAWS // 4 - 1  # Four draws for each, and four for the flip, which uses the first.
_CENTRE_FRACTION = 224 / 256  # Shorter side 256, centre crop 224 (§5.1).


def _for_both(draws):
  return draws, draws


@dataclasses.dataclass(frozen=True)
class Transform:
  """Cuts out a part of each image, resizes it and finishes it.

  Attributes:
    crop: (shape (H, W, …), draws) → (top, left, height, width) of the part, of one image, or of B
      if H and W are `[B]` and the draws `[B, …]`.
    finish: (recipe, resized images, draws) → images; None: the resized images.
    split_draws: draws float32 `[B, DRAWS]` → the draws `[B, …]` that `crop` takes, and those that
      `finish` takes.
    per_image: whether each image has its own crop. If so, `finish` takes one image `[H, W, C]` and
      its draws, else images `[B, H, W, C]` and the draws of each.
  """

  crop: Callable
  finish: Callable | None = None
  split_draws: Callable = _for_both
  per_image: bool = False

  def finish_one(self, recipe: Recipe, images, draws):
    """Returns one finished image `[H, W, C]`, from images `[1, H, W, C]` and its draws."""
    if self.finish is not None and not self.per_image:
      images = self.finish(recipe, images, draws[tf.newaxis])
    image = tf.squeeze(images, 0)
    return self.finish(recipe, image, draws) if self.per_image else image


def crops_and_flips(draws):
  """Turns draws into what a random crop takes, except for the size of its image, and into flips.

  Args:
    draws: float32 `[B, DRAWS]`.

  Returns:
    (tries, flips). Tries are float32 `[B, tries, 4]`: height and width, in units of the square root
    of the image's area, for an area of 8-100 % and an aspect ratio of 3/4-4/3 that is uniform in
    its logarithm (as in torchvision); then top and left, as shares of the room that the crop
    leaves. Flips are bool `[B]`, each with probability 1/2.
  """
  draws = tf.reshape(draws, [-1, 1 + _CROP_TRIES, 4])
  flips, draws = draws[:, 0, 0] < 0.5, draws[:, 1:]
  area = 0.08 + draws[..., 0] * 0.92
  aspect = tf.exp((2 * draws[..., 1] - 1) * math.log(4 / 3))
  sizes = tf.sqrt(tf.stack([area / aspect, area * aspect], axis=-1))
  return tf.concat([sizes, draws[..., 2:]], axis=-1), flips


def random_crop(shape, tries):
  """Returns crops of 8-100 % of the area with an aspect ratio of 3/4-4/3 (§5.1).

  The first try that fits is taken, or else the largest centre crop of an allowed aspect ratio.

  Args:
    shape: (H, W, …) of the images, integers or int32 `[B]`.
    tries: float32 `[B, tries, 4]`, see `crops_and_flips`; or `[tries, 4]` of one image.

  Returns:
    (top, left, height, width), int32 `[B]`, or scalars of one image.
  """
  sides = tf.cast(tf.stack([shape[0], shape[1]], axis=-1), tf.float32)
  root = tf.sqrt(sides[..., :1] * sides[..., 1:])
  sizes = tf.maximum(tf.round(tries[..., :2] * root[..., tf.newaxis, :]), 1)
  room = sides[..., tf.newaxis, :] - sizes
  fits = tf.reduce_all(room >= 0, axis=-1)
  offsets = tf.floor(tries[..., 2:] * (room + 1))
  drawn = tf.concat([offsets, sizes], axis=-1)
  drawn = tf.gather(drawn, tf.argmax(fits, axis=-1), batch_dims=drawn.shape.rank - 2)
  largest = tf.minimum(sides, tf.maximum(tf.round(sides[..., ::-1] * (4 / 3)), 1))
  fallback = tf.concat([(sides - largest) // 2, largest], axis=-1)
  crop = tf.where(tf.reduce_any(fits, axis=-1, keepdims=True), drawn, fallback)
  return tf.unstack(tf.cast(crop, tf.int32), axis=-1)


def _whole(shape, _draws):
  return [0, 0, shape[0], shape[1]]


def centre_crop(shape, _draws=None):
  """Returns (top, left, height, width) of the centre crop of an image of shape (H, W, …)."""
  height, width = shape[0], shape[1]
  side = tf.cast(tf.minimum(height, width), tf.float32) * _CENTRE_FRACTION
  side = tf.maximum(tf.cast(tf.round(side), tf.int32), 1)
  return [(height - side) // 2, (width - side) // 2, side, side]


def resize(recipe: Recipe, images):
  """Resizes images `[B, H, W, C]` to the recipe's size, bilinearly, in uint8."""
  size = recipe.image_size
  if images.shape[1:3] == (size, size):
    return images
  resized = tf.raw_ops.ResizeBilinear(images=images, size=[size, size], half_pixel_centers=True)
  return tf.cast(resized + 0.5, tf.uint8)


def shift_and_flip(recipe: Recipe, images, draws):
  """Pads images `[B, H, W, C]` by 4, crops and flips them at random, by draws `[B, 3 or more]`.

  The padding is the mean pixel, which normalisation maps to 0.
  """
  size = recipe.image_size
  mean = tf.constant([round(value) for value in recipe.channel_mean], tf.uint8)
  padding = [[0, 0], [_PADDING, _PADDING], [_PADDING, _PADDING], [0, 0]]
  # Pads (pixel − mean) modulo 256 with 0, because tf.pad takes one constant for all channels.
  images = tf.pad(images - mean, padding) + mean
  offsets = tf.cast(draws[:, 1:3, tf.newaxis] * (2 * _PADDING + 1), tf.int32)
  rows = offsets[:, 0] + tf.range(size)
  columns = offsets[:, 1] + tf.where(draws[:, :1] < 0.5, tf.range(size)[::-1], tf.range(size))
  return tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def _flip(recipe: Recipe, image, flip):
  """Flips an image `[H, W, C]` horizontally if `flip` (bool scalar) is true; in graphs only."""
  # What tf.cond becomes when it runs, without tracing two functions for each image of a batch.
  same, mirrored = tf.raw_ops.Switch(data=image, pred=flip)
  return tf.raw_ops.Merge(inputs=[same, tf.reverse(mirrored, [1])]).output


_RESIZE_WHOLE = Transform(_whole)
_PAD_CROP = Transform(_whole, finish=shift_and_flip)
_AREA_CROP = Transform(random_crop, finish=_flip, split_draws=crops_and_flips, per_image=True)
_CENTRE_CROP = Transform(centre_crop)

# The recipe's `augmentation` → (transform for training, transform for evaluation).
TRANSFORMS = {
  "none": (_RESIZE_WHOLE, _RESIZE_WHOLE),
  "pad_crop": (_PAD_CROP, _RESIZE_WHOLE),
  "area_crop": (_AREA_CROP, _CENTRE_CROP),
}
