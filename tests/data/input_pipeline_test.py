"""Which example each worker sees, and what becomes of its image."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch.data import input_pipeline, sources
from tf_largebatch.recipe import Recipe

# 103 examples, k = 4 workers of n = 6: 4 steps of 24 an epoch, a tail of 7.
EXAMPLES = 103
RECIPE = Recipe(
  dataset="test",
  validation_split="validation",
  image_size=8,
  augmentation="none",
  channel_mean=(10.4, 20.0, 30.0),
  channel_std=(1.0, 1.0, 1.0),
  network="resnet20",
  workers=4,
  per_worker_batch_size=6,
  epochs=3,
  warmup_epochs=1,
  decay_epochs=(2,),
  seed=5,
)
EPOCH_STEPS = 4


@pytest.fixture(scope="module")
def source():
  """Images of noise; the label of an example is its id."""
  images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 8, 8, 3)).astype(np.uint8)
  return sources.ArraySource(images, np.arange(EXAMPLES), EXAMPLES)


def ids_of_step(step, recipe=RECIPE):
  return np.stack([input_pipeline.example_ids(recipe, EXAMPLES, step, w) for w in range(4)])


def ids_of_epoch(epoch, recipe=RECIPE):
  first = epoch * EPOCH_STEPS
  return np.stack([ids_of_step(step, recipe) for step in range(first, first + EPOCH_STEPS)])


def test_an_epoch_sees_every_example_at_most_once():
  for epoch in range(3):
    ids = ids_of_epoch(epoch).ravel()
    assert len(ids) == len(set(ids)) == EXAMPLES - 7
    assert set(ids) <= set(range(EXAMPLES))


def test_the_tail_changes_from_epoch_to_epoch():
  left_out = [set(range(EXAMPLES)) - set(ids_of_epoch(epoch).ravel()) for epoch in range(3)]
  assert len(set(map(frozenset, left_out))) == 3


def test_the_shuffle_depends_on_seed_and_epoch_and_mixes_the_workers():
  epochs = [ids_of_epoch(epoch) for epoch in range(3)]
  other_seed = ids_of_epoch(0, dataclasses.replace(RECIPE, seed=6))
  for other in (epochs[1], epochs[2], other_seed):
    assert np.mean(epochs[0] == other) < 0.1
  # One shuffle for all workers: the examples that worker 0 sees are not the same every epoch.
  assert set(epochs[0][:, 0].ravel()) != set(epochs[1][:, 0].ravel())


def test_the_shuffle_is_as_good_as_random():
  """No correlation of epochs, seeds or neighbours; none comes again for its low bits."""
  for examples in (50_000, 65_000):
    recipe = dataclasses.replace(RECIPE, workers=1, per_worker_batch_size=examples)

    def shuffle(epoch, seed=0, recipe=recipe, examples=examples):
      recipe = dataclasses.replace(recipe, seed=seed)
      return input_pipeline.example_ids(recipe, examples, epoch, 0)

    first = shuffle(0)
    np.testing.assert_array_equal(np.sort(first), np.arange(examples))
    others = [shuffle(1), shuffle(256), shuffle(65536), shuffle(0, 1), shuffle(0, 256)]
    others += [shuffle(0, 65536), np.roll(first, 1), np.arange(examples)]
    for other in others:
      # Standard deviation 1 / sqrt(50 000) = 0.0045 for independent permutations.
      assert abs(np.corrcoef(first, other)[0, 1]) < 0.025
      assert np.sum(first == other) < 12  # Poisson with mean 1.


@pytest.mark.parametrize("examples", [2**16, 2**16 + 1, 2**16 + 2, 2**17 + 1, 2**18 + 1, 2**20 + 1])
def test_the_shuffle_is_a_permutation(examples):
  """TensorFlow's own shuffle misses the last example where the others are a power of 4."""
  recipe = dataclasses.replace(RECIPE, workers=1, per_worker_batch_size=examples)
  epochs = [input_pipeline.example_ids(recipe, examples, epoch, 0) for epoch in range(2)]
  for ids in epochs:
    np.testing.assert_array_equal(np.sort(ids), np.arange(examples))
  assert np.sum(epochs[0] == epochs[1]) < 12  # Poisson with mean 1.


def test_positions_and_neighbours_are_uniform():
  """χ² over 2000 epochs' permutations of 1000 examples: position × id, and adjacent pairs.

  A table of independent permutations has a χ² of (cells − 1)² degrees of freedom: position × id;
  the pairs' is that of 999 draws an epoch from 999 000 pairs, all but independent.
  """
  examples, epochs, cells = 1000, 2000, 50
  recipe = dataclasses.replace(RECIPE, workers=1, per_worker_batch_size=examples)
  ids = np.stack(
    [input_pipeline.example_ids(recipe, examples, epoch, 0) for epoch in range(epochs)]
  )
  np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(examples), (epochs, 1)))

  def chi_squared(rows, columns, bins):
    counts = np.histogram2d(rows.ravel(), columns.ravel(), bins)[0]
    expected = counts.sum() / counts.size
    return np.sum((counts - expected) ** 2) / expected

  positions = np.broadcast_to(np.arange(examples), ids.shape)
  # (name, rows, columns, how fine, degrees of freedom); every position × id, and in 50 × 50 cells.
  for name, rows, columns, bins, freedom in [
    ("position, id", positions, ids, examples, (examples - 1) ** 2),
    ("position, id, coarse", positions, ids, cells, (cells - 1) ** 2),
    ("neighbours, coarse", ids[:, :-1], ids[:, 1:], cells, cells**2 - 1),
    ("next epoch's", ids[:-1], ids[1:], examples, (examples - 1) ** 2),
    ("lag in the cycle", (ids[:, 1:] - ids[:, :-1]) % examples, positions[:, 1:], None, None),
  ]:
    if freedom is None:  # How far it is from one to the next: each of 999 distances alike often.
      counts = np.bincount(rows.ravel(), minlength=examples)
      assert counts[0] == 0
      expected = rows.size / (examples - 1)
      statistic, freedom = np.sum((counts[1:] - expected) ** 2) / expected, examples - 2
    else:
      statistic = chi_squared(rows, columns, bins)
    # A χ² of many degrees is normal with this mean and variance.
    assert abs(statistic - freedom) < 4.5 * np.sqrt(2 * freedom), name


def test_the_shuffle_is_of_examples_not_of_their_grouping():
  """2 workers of 12 and 4 of 6 see the same examples at each step, in the same order."""
  regrouped = dataclasses.replace(RECIPE, workers=2, per_worker_batch_size=12)
  for step in (0, 3, 4, 11):
    two = [input_pipeline.example_ids(regrouped, EXAMPLES, step, w) for w in range(2)]
    np.testing.assert_array_equal(np.concatenate(two), ids_of_step(step).ravel())


def task_batches(recipe, source, tasks, replicas_per_task, first_step, steps):
  """The batches of all replicas, [step][replica] → (images, labels)."""
  per_task, per_replica = 4 // tasks, 4 // (tasks * replicas_per_task)
  iterators = [
    input_pipeline.train_dataset(
      recipe,
      source,
      first_worker=task * per_task,
      num_workers=per_task,
      workers_per_replica=per_replica,
      first_step=first_step,
    ).as_numpy_iterator()
    for task in range(tasks)
  ]
  return [
    [next(iterators[task]) for task in range(tasks) for _ in range(replicas_per_task)]
    for _ in range(steps)
  ]


@pytest.mark.parametrize("first_step", [0, 6])
@pytest.mark.parametrize("tasks, replicas", [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_the_pipeline_delivers_just_those_ids(source, tasks, replicas, first_step):
  """… on any cluster, from any step on, across the ends of epochs."""
  batches = task_batches(RECIPE, source, tasks, replicas, first_step, 6)
  for offset, step_batches in enumerate(batches):
    labels = np.concatenate([labels for _, labels in step_batches])
    np.testing.assert_array_equal(labels, ids_of_step(first_step + offset))
    for images, labels in step_batches:
      assert images.dtype == np.uint8
      np.testing.assert_array_equal(images, source._images.numpy()[labels])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_one_to_three_tasks_read_the_same(source, tasks, replicas):
  """k = 12: the examples of each worker and step, and each of 49 999 validation examples once."""
  recipe = dataclasses.replace(RECIPE, workers=12, per_worker_batch_size=2)
  batches = [
    input_pipeline.train_dataset(
      recipe,
      source,
      first_worker=task * (12 // tasks),
      num_workers=12 // tasks,
      workers_per_replica=12 // (tasks * replicas),
    ).as_numpy_iterator()
    for task in range(tasks)
  ]
  for step in range(10):
    labels = [next(batches[task])[1] for task in range(tasks) for _ in range(replicas)]
    expected = [input_pipeline.example_ids(recipe, EXAMPLES, step, worker) for worker in range(12)]
    np.testing.assert_array_equal(np.concatenate(labels), expected)

  count = 49_999
  validation = sources.ArraySource(np.zeros((count, 8, 8, 3), np.uint8), np.arange(count), count)
  seen = np.zeros(count)
  iterators = evaluation(recipe, validation, 500, tasks, replicas)
  for _ in range(input_pipeline.evaluation_steps(validation, 500, tasks * replicas)):
    for iterator in iterators:
      for _ in range(replicas):
        _, labels, weights = next(iterator)
        np.add.at(seen, labels, weights)
  assert np.all(seen == 1)


def test_draws_are_a_positions_own():
  """… wherever a worker's share begins, and however long it is."""

  def draws(first, count, epoch=3, seed=5):
    recipe = dataclasses.replace(RECIPE, seed=seed)
    epoch, first = (tf.constant(value, tf.int64) for value in (epoch, first))
    return input_pipeline._draws(recipe, epoch, first, count).numpy()

  whole = draws(0, 100)
  for first, count in [(0, 1), (1, 7), (50, 50), (99, 1)]:
    np.testing.assert_array_equal(draws(first, count), whole[first : first + count])
  assert len(np.unique(whole)) > 0.999 * whole.size  # Of 2^23 values, 4400 draws.
  assert whole.min() >= 0 and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.02
  for other in (draws(0, 100, epoch=4), draws(0, 100, seed=6), draws(100, 100)):
    assert np.mean(other == whole) < 0.001
    assert abs(np.corrcoef(other.ravel(), whole.ravel())[0, 1]) < 0.06


@pytest.mark.parametrize("augmentation", ["pad_crop", "area_crop"])
def test_augmentation_is_the_same_on_every_cluster_and_changes_with_the_epoch(source, augmentation):
  recipe = dataclasses.replace(RECIPE, augmentation=augmentation)

  def images(tasks, replicas, first_step, steps):
    batches = task_batches(recipe, source, tasks, replicas, first_step, steps)
    return np.stack([np.concatenate([x for x, _ in step]) for step in batches])

  whole = images(1, 1, 0, 6)
  np.testing.assert_array_equal(images(4, 1, 0, 6), whole)
  np.testing.assert_array_equal(images(2, 2, 3, 3), whole[3:])
  first = dict(zip(ids_of_epoch(0).ravel(), whole[:4].reshape(-1, 8, 8, 3), strict=True))
  second = dict(zip(ids_of_step(4).ravel(), whole[4].reshape(-1, 8, 8, 3), strict=True))
  changed = [np.any(first[i] != second[i]) for i in first.keys() & second.keys()]
  assert len(changed) > 10 and np.mean(changed) > 0.9


@pytest.mark.parametrize("augmentation", ["pad_crop", "area_crop"])
def test_augmentation_depends_on_seed_epoch_and_position(source, augmentation, monkeypatch):
  # The same example everywhere: what differs is the augmentation.
  monkeypatch.setattr(input_pipeline, "_example_id", lambda *_: tf.constant([7] * 6, tf.int64))

  def images(seed, first_step):
    recipe = dataclasses.replace(RECIPE, augmentation=augmentation, seed=seed)
    return task_batches(recipe, source, 1, 1, first_step, 1)[0][0][0].reshape(24, -1)

  first = images(5, 0)
  np.testing.assert_array_equal(images(5, 0), first)
  for other in (images(6, 0), images(5, 4)):
    assert np.mean(np.any(first != other, axis=1)) > 0.9
  assert len(np.unique(first, axis=0)) > 20  # Each position has a draw of its own.


def test_half_of_the_area_crops_are_flipped(monkeypatch):
  ramp = np.tile(np.arange(8, dtype=np.uint8)[:, None], (EXAMPLES, 8, 1, 3)) * 30
  ramp_source = sources.ArraySource(ramp, np.arange(EXAMPLES), EXAMPLES)
  recipe = dataclasses.replace(RECIPE, augmentation="area_crop")
  batches = task_batches(recipe, ramp_source, 1, 1, 0, 12)
  images = np.concatenate([step[0][0].reshape(-1, 8, 8, 3) for step in batches]).astype(int)
  flipped = np.mean(images[:, :, 0], (1, 2)) > np.mean(images[:, :, -1], (1, 2))
  assert len(flipped) == 288 and 0.38 < np.mean(flipped) < 0.62  # Four standard deviations.


def test_pad_crop_pads_with_the_mean_shifts_by_up_to_four_and_flips(source):
  recipe = dataclasses.replace(RECIPE, augmentation="pad_crop")
  seen = set()
  for step in task_batches(recipe, source, 1, 1, 0, 12):
    for image, label in zip(step[0][0].reshape(-1, 8, 8, 3), step[0][1].ravel(), strict=True):
      padded = np.empty((16, 16, 3), np.uint8)
      padded[:] = (10, 20, 30)
      padded[4:12, 4:12] = source._images.numpy()[label]
      candidates = {
        (top, left, flip): padded[top : top + 8, left : left + 8][:, :: -1 if flip else 1]
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
      }
      found = [key for key, value in candidates.items() if np.array_equal(value, image)]
      assert found, "the image is no shift of the padded original"
      seen.add(found[0])
  assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
  assert {flip for _, _, flip in seen} == {False, True}


@pytest.mark.parametrize("shape", [(375, 500, 3), (500, 375, 3), (64, 64, 3)])
def test_random_crop_has_the_papers_area_and_aspect(shape):
  draws = input_pipeline._draws(RECIPE, tf.constant(0, tf.int64), tf.constant(0, tf.int64), 3000)
  crops = tf.data.Dataset.from_tensor_slices(input_pipeline._crop_tries(draws)[:, 1:]).map(
    lambda tries: input_pipeline._random_crop(tf.constant(shape), tries)
  )
  crops = np.stack(list(crops.as_numpy_iterator()))
  top, left, height, width = crops.T
  assert np.all((top >= 0) & (left >= 0) & (top + height <= shape[0]) & (left + width <= shape[1]))
  share = height * width / (shape[0] * shape[1])
  # Rounding to whole pixels moves a side by at most one half.
  slack = 0.5 / np.minimum(height, width)
  assert np.all(share >= 0.08 * (1 - slack) ** 2) and np.all(share <= 1)
  aspect = width / height
  assert np.all(aspect <= 4 / 3 * (1 + 3 * slack)) and np.all(aspect >= 3 / 4 / (1 + 3 * slack))
  assert share.min() < 0.1 and share.max() > 0.85 and aspect.min() < 0.78 and aspect.max() > 1.3
  assert 0.45 < np.mean(np.log(aspect) > 0) < 0.55 or shape[0] != shape[1]
  # Crops fall left and right, above and below alike.
  for offset, room in ((left, shape[1] - width), (top, shape[0] - height)):
    assert 0.47 < np.mean(offset[room > 20] / room[room > 20]) < 0.53
  if shape[0] == shape[1]:
    # A share s fits where |log aspect| ≤ -log s: always up to 3/4, with probability -log s /
    # log(4/3) above. Integrated by hand: 0.789 / 0.92 of the draws fit, their mean is 0.478, and
    # 0.23 / 0.789 = 0.29 of them lie below 0.31. Three standard deviations.
    assert abs(np.mean(share) - 0.478) < 0.014
    assert abs(np.mean(share < 0.31) - 0.2915) < 0.025


def test_random_crop_of_a_sliver_falls_back_to_a_centre_crop():
  for seed in range(10):
    tries = input_pipeline._crop_tries(tf.random.stateless_uniform([1, 44], [0, seed]))[0, 1:]
    crop = input_pipeline._random_crop(tf.constant([1000, 10, 3]), tries)
    np.testing.assert_array_equal(crop, [493, 0, 13, 10])


def test_the_centre_crop_is_224_of_a_shorter_side_of_256():
  recipe = dataclasses.replace(RECIPE, augmentation="area_crop")
  for shape, expected in [
    ((256, 512, 3), [16, 144, 224, 224]),
    ((1000, 500, 3), [281, 31, 438, 438]),
    ((1, 1, 3), [0, 0, 1, 1]),
  ]:
    np.testing.assert_array_equal(input_pipeline._fixed_crop(recipe, shape), expected)


class EncodedSource:
  """One encoded image of a shape that is not known beforehand."""

  image_shape = None
  num_examples = 24
  num_classes = 1

  def __init__(self, encoded):
    self.encoded = encoded

  def read(self, indices):
    return tf.repeat(tf.constant([self.encoded]), tf.size(indices))

  def parse(self, record):
    return record, 0


@pytest.mark.parametrize("encode", [tf.io.encode_png, tf.io.encode_jpeg])
def test_encoded_images_are_cropped_as_decoded_ones(encode):
  smooth = np.linspace(0, 255, 90)[:, None, None] * np.ones((1, 70, 3))
  encoded = encode(tf.constant(smooth.astype(np.uint8))).numpy()
  decoded = tf.io.decode_image(encoded, channels=3).numpy()
  recipe = dataclasses.replace(RECIPE, augmentation="area_crop", image_size=16)
  array = sources.ArraySource(np.repeat(decoded[None], 24, 0), np.zeros(24), 1)
  for make in (
    lambda s: task_batches(recipe, s, 1, 1, 0, 1)[0][0][0],
    lambda s: next(evaluation(recipe, s, 24, 1, 1)[0])[0],
  ):
    difference = make(EncodedSource(encoded)).astype(int) - make(array).astype(int)
    # A JPEG that is decoded in part may round the chroma at the crop's edge otherwise.
    assert np.max(np.abs(difference)) <= (0 if encode is tf.io.encode_png else 2)


def evaluation(recipe, source, batch_size, tasks, replicas):
  return [
    input_pipeline.evaluation_dataset(
      recipe,
      source,
      batch_size=batch_size,
      first_replica=task * replicas,
      num_replicas=replicas,
      replicas=tasks * replicas,
    ).as_numpy_iterator()
    for task in range(tasks)
  ]


@pytest.mark.parametrize("tasks, replicas", [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("batch_size", [1, 10, 103, 200])
def test_evaluation_counts_every_example_once(source, batch_size, tasks, replicas):
  iterators = evaluation(RECIPE, source, batch_size, tasks, replicas)
  steps = input_pipeline.evaluation_steps(source, batch_size, tasks * replicas)
  counted = []
  for _ in range(steps):
    for iterator in iterators:
      for _ in range(replicas):
        images, labels, weights = next(iterator)
        assert set(weights) <= {0.0, 1.0}
        np.testing.assert_array_equal(images, source._images.numpy()[labels])
        counted.extend(labels[weights == 1])
  assert sorted(counted) == list(range(EXAMPLES))


def test_a_position_of_any_step_has_draws_of_its_own(source, monkeypatch):
  """Also where it is the same example in the same place of its step."""
  monkeypatch.setattr(input_pipeline, "_example_id", lambda *_: tf.constant([7] * 6, tf.int64))
  recipe = dataclasses.replace(RECIPE, augmentation="pad_crop")
  steps = task_batches(recipe, source, 1, 1, 0, EPOCH_STEPS)
  images = np.concatenate([step[0][0].reshape(24, -1) for step in steps])
  # 96 draws from 162 crops: 72.5 different ones, give or take 3.6; of one step's alone 22.3.
  assert len(np.unique(images, axis=0)) > 58


def test_pad_crop_takes_another_draw_for_each_choice(source):
  """Row, column and flip, each image's own, all as often."""
  choices = [(f, r, c) for f in (0, 0.49, 0.5, 0.99) for r in range(9) for c in range(9)]
  draws = np.array([[f, (r + 0.5) / 9, (c + 0.5) / 9] for f, r, c in choices], np.float32)
  image = source._images.numpy()[3]
  images = tf.constant(np.repeat(image[None], len(choices), axis=0))
  recipe = dataclasses.replace(RECIPE, augmentation="pad_crop")
  actual = input_pipeline._shift_and_flip(recipe, images, tf.constant(draws)).numpy()
  padded = np.empty((16, 16, 3), np.uint8)
  padded[:] = (10, 20, 30)
  padded[4:12, 4:12] = image
  for (f, r, c), crop in zip(choices, actual, strict=True):
    expected = padded[r : r + 8, c : c + 8]
    np.testing.assert_array_equal(crop, expected[:, ::-1] if f < 0.5 else expected)


def test_area_crops_lie_anywhere_whatever_else_was_drawn():
  """Top, left and flip are independent, and a crop reaches the far edge as often as any place."""
  first = tf.constant(0, tf.int64)
  tries = input_pipeline._crop_tries(input_pipeline._draws(RECIPE, first, first, 3000))
  crops = tf.data.Dataset.from_tensor_slices(tries[:, 1:]).map(
    lambda tries: input_pipeline._random_crop(tf.constant((64, 64, 3)), tries)
  )
  top, left, height, width = np.stack(list(crops.as_numpy_iterator())).T
  rooms, offsets = np.array([64 - height, 64 - width]), np.array([top, left])
  far, expected = np.sum(offsets == rooms, axis=1), np.sum(1 / (rooms + 1), axis=1)
  assert np.all(np.abs(far - expected) < 4 * np.sqrt(expected))
  wide = np.all(rooms > 8, axis=0)
  places = offsets[:, wide] / rooms[:, wide]
  flips = tries.numpy()[wide, 0, 0] < 0.5
  correlation = np.corrcoef([*places, flips]) - np.eye(3)
  assert np.max(np.abs(correlation)) < 4.5 / np.sqrt(np.sum(wide))


def test_the_flip_of_an_area_crop_has_a_draw_of_its_own():
  """Where a crop lies tells nothing of its flip: column 0 of channel 1 is the image's row."""
  rows, columns = np.indices((8, 8)) * 30
  image = np.stack([columns, rows, rows], axis=-1).astype(np.uint8)
  ramps = sources.ArraySource(np.tile(image, (EXAMPLES, 1, 1, 1)), np.arange(EXAMPLES), EXAMPLES)
  recipe = dataclasses.replace(RECIPE, augmentation="area_crop")
  batches = task_batches(recipe, ramps, 1, 1, 0, 12)
  images = np.concatenate([step[0][0].reshape(-1, 8, 8, 3) for step in batches]).astype(int)
  flipped = images[:, :, 0, 0].mean(1) > images[:, :, -1, 0].mean(1)
  for channel in (0, 1):
    places = images[..., channel].mean((1, 2))
    assert abs(np.corrcoef(flipped, places)[0, 1]) < 4.5 / np.sqrt(len(flipped))


@pytest.mark.parametrize("shape", [(5, 9), (8, 8), (20, 13), (3, 40)])
def test_images_are_resized_bilinearly_and_rounded(shape):
  """At half-pixel centres, in float64; every pixel is the nearest of 256 levels."""
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)

  def weights(size):
    """Of each of 8 pixels on the pixels of a side: [8, size]."""
    places = np.clip((np.arange(8) + 0.5) * size / 8 - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))

  expected = np.einsum("ih,jw,hwc->ijc", weights(shape[0]), weights(shape[1]), image.astype(float))
  actual = input_pipeline._resize(RECIPE, tf.constant(image[None])).numpy()[0]
  assert actual.dtype == np.uint8
  assert np.max(np.abs(actual - expected)) < 0.5 + 1e-3
