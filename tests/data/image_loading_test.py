"""Images that are loaded together are those that are loaded alone."""

import numpy as np
import pytest
import tensorflow as tf

from tests.data.encoded_source import EncodedSource
from tf_largebatch.data import augmentation, image_loading, input_pipeline, shuffle
from tf_largebatch.recipe import Recipe

EXAMPLES = 200
N = 48  # Loaded in plans of 24.


def mixed_images():
  """Encoded images of many shapes, grey and coloured; every fortieth is a PNG."""
  rng = np.random.default_rng(1)
  encoded = []
  for index in range(EXAMPLES):
    height, width, channels = (*rng.integers(20, 60, 2), 1 + index % 3 // 2 * 2)
    rows = np.linspace(0, rng.integers(50, 256), height)[:, None, None]
    pixels = rows * np.linspace(1, 0.2, width)[:, None] * np.linspace(1, 0.5, channels)
    encode = tf.io.encode_jpeg if index % 40 else tf.io.encode_png
    encoded.append(encode(tf.constant(pixels.astype(np.uint8))).numpy())
  return encoded


def load_alone(recipe, encoded, draws):
  """The image `[H, W, 3]` that training takes from an encoded one, given its draws `[1, DRAWS]`."""
  transform, _ = augmentation.TRANSFORMS[recipe.augmentation]
  crop_draws, draws = (draws[0] for draws in transform.split_draws(draws))
  image = image_loading.decode_and_crop(
    tf.constant(encoded), lambda shape: transform.crop(shape, crop_draws), channels=3
  )
  images = augmentation.resize(recipe, image[tf.newaxis])
  if recipe.augmentation == "area_crop":
    return images[0, :, ::-1] if draws else images[0]  # They are the flip.
  return transform.finish_one(recipe, images, draws)


@pytest.mark.parametrize("on_bad_example", [None, print])
@pytest.mark.parametrize("name", ["none", "pad_crop", "area_crop"])
def test_images_loaded_together_are_those_loaded_alone(name, on_bad_example):
  recipe = Recipe(
    augmentation=name,
    image_size=16,
    channel_mean=(10.4, 20.0, 30.0),
    workers=2,
    per_worker_batch_size=N,
    seed=3,
  )
  encoded = mixed_images()
  step = 3  # Of the second epoch, which has two steps.
  batches = input_pipeline.train_dataset(
    recipe,
    EncodedSource(encoded),
    first_worker=0,
    num_workers=2,
    workers_per_replica=2,
    first_step=step,
    on_bad_example=on_bad_example,
  )
  images, _ = next(batches.as_numpy_iterator())
  ids = [input_pipeline.example_ids(recipe, EXAMPLES, step, worker) for worker in range(2)]
  ids = np.concatenate(ids)
  # Some plans have a PNG, and some have none.
  assert {bool(np.any(plan % 40 == 0)) for plan in ids.reshape(-1, 24)} == {True, False}
  draws = shuffle.draws(recipe, tf.constant(1, tf.int64), tf.constant(2 * N, tf.int64), 2 * N)
  expected = [
    load_alone(recipe, encoded[example], draws[place : place + 1])
    for place, example in enumerate(ids)
  ]
  np.testing.assert_array_equal(images.reshape(2 * N, 16, 16, 3), expected)


@pytest.mark.parametrize("on_bad_example", [None, print])
def test_a_plan_with_another_format_is_loaded_image_by_image(monkeypatch, on_bad_example):
  """Plans of JPEGs are decoded together, here to white; the images are black."""

  def white(recipe, transform, size, draws, encoded):
    # Fails for other formats, as the real one does.
    shapes = [tf.io.extract_jpeg_shape(image) for image in tf.unstack(encoded, size)]
    level = tf.where(tf.reduce_min(shapes) > 0, tf.constant(255, tf.uint8), 1)
    return tf.fill([size, 8, 8, 3], level)

  monkeypatch.setattr(image_loading, "_decode_jpegs", white)
  monkeypatch.setattr(shuffle, "example_id", lambda recipe, count, epoch, position: position)
  black = tf.zeros([9, 9, 3], tf.uint8)
  jpeg, png = tf.io.encode_jpeg(black).numpy(), tf.io.encode_png(black).numpy()
  batches = input_pipeline.train_dataset(
    Recipe(
      augmentation="none",
      image_size=8,
      channel_mean=(0.0, 0.0, 0.0),
      workers=4,
      per_worker_batch_size=6,
    ),
    EncodedSource([jpeg] * 6 + [png] + [jpeg] * 17),
    first_worker=0,
    num_workers=4,
    workers_per_replica=1,
    on_bad_example=on_bad_example,
  )
  levels = [images.mean() for images, _ in batches.take(4).as_numpy_iterator()]
  assert levels == [255, 0, 255, 255]
