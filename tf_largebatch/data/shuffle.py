"""The permutation of each epoch and the random draws of each position, computed without state."""

import tensorflow as tf

from tf_largebatch.recipe import Recipe

# Uniform random numbers that each position draws: 11 of Philox's blocks of four.
DRAWS = 4 * 11
# For these values of max_index the op's block cipher is one bit too short (it takes log2 of
# max_index, not of the number of indices), so one index would occur twice and the last one never.
_ONE_BIT_SHORT = frozenset(4**power for power in range(8, 32))


def example_id(recipe: Recipe, train_examples: int, epoch, position):
  """Returns the example at a position of the epoch's permutation of all training examples.

  Args:
    recipe: supplies the seed.
    train_examples: size of the training split.
    epoch, position: see `permute`.
  """
  return permute(recipe.seed, train_examples, epoch, position)


def permute(seed: int, count: int, epoch, position):
  """Returns what stands at a position of an epoch's permutation of 0 to count − 1.

  The permutation is a block cipher of the positions, so nothing is stored and any number of
  positions can be computed at once. `tf.random.experimental.index_shuffle` runs the cipher for 4
  rounds on the unmodified seed, which uses only its low bits: successive epochs then correlate
  (0.75 for 50 000 examples), and seeds 0 and 256 give the same permutation. A hashed key and 24
  rounds remove both effects.

  Args:
    seed: of the permutations.
    count: of what is permuted.
    epoch: integer scalar, from 0.
    position: integers of any shape, from 0 to count − 1.

  Returns:
    int64, in the shape of `position`.
  """
  seed = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
  key = tf.random.stateless_uniform([3], seed, minval=None, maxval=None, dtype=tf.int32)

  def shuffle(index, last: int):
    return tf.raw_ops.RandomIndexShuffle(
      index=tf.cast(index, tf.int64),
      seed=key,
      max_index=tf.constant(last, tf.int64),
      rounds=24,
    )

  last = count - 1
  if last not in _ONE_BIT_SHORT:
    return shuffle(position, last)
  # Permutes one more index, and replaces the extra one by what it is mapped to itself.
  ids = shuffle(position, count)
  return tf.where(ids == count, shuffle(count, count), ids)


def draws(recipe: Recipe, epoch, first, count: int):
  """Returns the draws of successive positions of an epoch: uniform in [0, 1), `[count, DRAWS]`.

  Philox turns each value of a counter into four words. The counter runs from the beginning of the
  epoch, so the draws of a position depend on nothing that is drawn beside them.

  Args:
    recipe: supplies the seed.
    epoch: int64 scalar, from 0.
    first: int64 scalar, the first position.
    count: number of positions.
  """
  # Not the stream of the shuffle, whose seed contains the epoch itself.
  seed = tf.stack([tf.constant(recipe.seed, tf.int64), -1 - epoch])
  key = tf.random.stateless_uniform([1], seed, minval=None, maxval=None, dtype=tf.uint64)
  return tf.raw_ops.StatelessRandomUniformV2(
    shape=[count, DRAWS],
    key=key,
    counter=tf.cast(tf.stack([first * (DRAWS // 4), 0]), tf.uint64),
    alg=tf.random.Algorithm.PHILOX.value,
  )
