"""Batches have the examples of their workers, and the same augmentation on every cluster."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tests.data.encoded_source import EncodedSource
from tf_largebatch.data import input_pipeline, shuffle, sources
from tf_largebatch.recipe import Recipe

# 103 examples, k = 4 workers of n = 6: 4 steps of 24 per epoch, which leave out 7 examples.
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
  """Noise images; each example's label is its id."""
  images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 8, 8, 3)).astype(np.uint8)
  return sources.ArraySource(images, np.arange(EXAMPLES), EXAMPLES)


def ids_of_step(step, recipe=RECIPE):
  return np.stack([input_pipeline.example_ids(recipe, EXAMPLES, step, w) for w in range(4)])


def ids_of_epoch(epoch, recipe=RECIPE):
  first = epoch * EPOCH_STEPS
  return np.stack([ids_of_step(step, recipe) for step in range(first, first + EPOCH_STEPS)])


def task_batches(recipe, source, tasks, replicas_per_task, first_step, steps):
  """Returns the batches of all replicas, [step][replica] → (images, labels)."""
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
  """On any cluster, from any step on, across epochs."""
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
  """k = 12: each worker and step has its examples, and 49 999 validation examples count once."""
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
  # Every position has the same example, so only the augmentation differs.
  monkeypatch.setattr(shuffle, "example_id", lambda *_: tf.constant([7] * 6, tf.int64))

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
      assert found, "the image is not a shift of the padded original"
      seen.add(found[0])
  assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
  assert {flip for _, _, flip in seen} == {False, True}


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
    difference = make(EncodedSource([encoded] * 24)).astype(int) - make(array).astype(int)
    # Decoding a part of a JPEG may round the chroma at the crop's edge differently.
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
  """Even if the example and its place within the step are the same."""
  monkeypatch.setattr(shuffle, "example_id", lambda *_: tf.constant([7] * 6, tf.int64))
  recipe = dataclasses.replace(RECIPE, augmentation="pad_crop")
  steps = task_batches(recipe, source, 1, 1, 0, EPOCH_STEPS)
  images = np.concatenate([step[0][0].reshape(24, -1) for step in steps])
  # 96 draws from 162 crops give 72.5 ± 3.6 different ones; the 24 draws of one step, 22.3.
  assert len(np.unique(images, axis=0)) > 58


def test_the_flip_of_an_area_crop_has_a_draw_of_its_own():
  """The position of a crop says nothing about its flip; channels 0 and 1 encode x and y."""
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
