"""Which example each worker sees, and the random draws of each position."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_largebatch.data import shuffle
from tf_largebatch.data.input_pipeline import example_ids
from tf_largebatch.recipe import Recipe

# 103 examples, k = 4 workers of n = 6: 4 steps of 24 per epoch, which leave out 7 examples.
EXAMPLES = 103
RECIPE = Recipe(workers=4, per_worker_batch_size=6, seed=5)
EPOCH_STEPS = 4


def ids_of_step(step, recipe=RECIPE):
  return np.stack([example_ids(recipe, EXAMPLES, step, w) for w in range(4)])


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
  # One shuffle for all workers: worker 0 does not see the same examples in every epoch.
  assert set(epochs[0][:, 0].ravel()) != set(epochs[1][:, 0].ravel())


def test_the_shuffle_is_as_good_as_random():
  """Epochs, seeds and neighbours do not correlate, and all bits of a seed count."""
  for examples in (50_000, 65_000):
    recipe = dataclasses.replace(RECIPE, workers=1, per_worker_batch_size=examples)

    def permute(epoch, seed=0, recipe=recipe, examples=examples):
      recipe = dataclasses.replace(recipe, seed=seed)
      return example_ids(recipe, examples, epoch, 0)

    first = permute(0)
    np.testing.assert_array_equal(np.sort(first), np.arange(examples))
    others = [permute(1), permute(256), permute(65536), permute(0, 1), permute(0, 256)]
    others += [permute(0, 65536), np.roll(first, 1), np.arange(examples)]
    for other in others:
      # Standard deviation 1 / sqrt(50 000) = 0.0045 for independent permutations.
      assert abs(np.corrcoef(first, other)[0, 1]) < 0.025
      assert np.sum(first == other) < 12  # Poisson with mean 1.


@pytest.mark.parametrize("examples", [2**16, 2**16 + 1, 2**16 + 2, 2**17 + 1, 2**18 + 1, 2**20 + 1])
def test_the_shuffle_is_a_permutation(examples):
  """TensorFlow's own shuffle misses the last example if the number of others is a power of 4."""
  recipe = dataclasses.replace(RECIPE, workers=1, per_worker_batch_size=examples)
  epochs = [example_ids(recipe, examples, epoch, 0) for epoch in range(2)]
  for ids in epochs:
    np.testing.assert_array_equal(np.sort(ids), np.arange(examples))
  assert np.sum(epochs[0] == epochs[1]) < 12  # Poisson with mean 1.


def test_positions_and_neighbours_are_uniform():
  """χ² over 2000 epochs' permutations of 1000 examples: position × id, and adjacent pairs.

  For independent permutations, the χ² of the table position × id has (cells − 1)² degrees of
  freedom. That of the pairs is the χ² of 999 almost independent draws per epoch from 999 000 pairs.
  """
  examples, epochs, cells = 1000, 2000, 50
  recipe = dataclasses.replace(RECIPE, workers=1, per_worker_batch_size=examples)
  ids = np.stack([example_ids(recipe, examples, epoch, 0) for epoch in range(epochs)])
  np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(examples), (epochs, 1)))

  def chi_squared(rows, columns, bins):
    counts = np.histogram2d(rows.ravel(), columns.ravel(), bins)[0]
    expected = counts.sum() / counts.size
    return np.sum((counts - expected) ** 2) / expected

  positions = np.broadcast_to(np.arange(examples), ids.shape)
  # (name, rows, columns, bins, degrees of freedom); position × id in 1000 × 1000 and 50 × 50 cells.
  for name, rows, columns, bins, freedom in [
    ("position, id", positions, ids, examples, (examples - 1) ** 2),
    ("position, id, coarse", positions, ids, cells, (cells - 1) ** 2),
    ("neighbours, coarse", ids[:, :-1], ids[:, 1:], cells, cells**2 - 1),
    ("next epoch's", ids[:-1], ids[1:], examples, (examples - 1) ** 2),
    ("lag in the cycle", (ids[:, 1:] - ids[:, :-1]) % examples, positions[:, 1:], None, None),
  ]:
    if freedom is None:  # The distance from an id to the next: 999 values, equally frequent.
      counts = np.bincount(rows.ravel(), minlength=examples)
      assert counts[0] == 0
      expected = rows.size / (examples - 1)
      statistic, freedom = np.sum((counts[1:] - expected) ** 2) / expected, examples - 2
    else:
      statistic = chi_squared(rows, columns, bins)
    # A χ² with many degrees of freedom is normal with this mean and variance.
    assert abs(statistic - freedom) < 4.5 * np.sqrt(2 * freedom), name


def test_the_shuffle_is_of_examples_not_of_their_grouping():
  """2 workers of n = 12 and 4 of n = 6 see the same examples at each step, in the same order."""
  regrouped = dataclasses.replace(RECIPE, workers=2, per_worker_batch_size=12)
  for step in (0, 3, 4, 11):
    two = [example_ids(regrouped, EXAMPLES, step, w) for w in range(2)]
    np.testing.assert_array_equal(np.concatenate(two), ids_of_step(step).ravel())


def test_draws_are_a_positions_own():
  """They depend neither on where a worker's share begins nor on how long it is."""

  def draws(first, count, epoch=3, seed=5):
    recipe = dataclasses.replace(RECIPE, seed=seed)
    epoch, first = (tf.constant(value, tf.int64) for value in (epoch, first))
    return shuffle.draws(recipe, epoch, first, count).numpy()

  whole = draws(0, 100)
  for first, count in [(0, 1), (1, 7), (50, 50), (99, 1)]:
    np.testing.assert_array_equal(draws(first, count), whole[first : first + count])
  assert len(np.unique(whole)) > 0.999 * whole.size  # Of 2^23 values, 4400 draws.
  assert whole.min() >= 0 and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.02
  for other in (draws(0, 100, epoch=4), draws(0, 100, seed=6), draws(100, 100)):
    assert np.mean(other == whole) < 0.001
    assert abs(np.corrcoef(other.ravel(), whole.ravel())[0, 1]) < 0.06
