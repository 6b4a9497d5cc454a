"""The data of `fit` and `evaluate`: from what Keras takes to each replica's examples."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch.data.shuffle import permute
from tf_largebatch.distributed.place import Place
from tf_largebatch.errors import UserError
from tf_largebatch.training.fit_arrays import Arrays

# Steps that are known ahead: what a task sends with one step is read by the others after the next.
_AHEAD = 2
_HASH_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Workers:
  """The workers of a step.

  Attributes:
    count: k.
    batch_size: n, examples of each.
    per_pass: g, how many a replica takes through the model at once.
  """

  count: int
  batch_size: int
  per_pass: int = 1

  @property
  def examples(self) -> int:
    """kn, examples in a step."""
    return self.count * self.batch_size


def limit(name: str, number: int | None, maximum: int | None) -> int | None:
  """Limits a number of steps or epochs to what Keras' configuration allows in debugging runs."""
  if maximum is None or (number is not None and number <= maximum):
    return number
  logging.warning("Keras' configuration limits %s to %d.", name, maximum)
  return maximum


class TrainingData:
  """The steps of each epoch.

  Args:
    data: `Arrays`, a `tf.data.Dataset` of batches, or a function epoch → data set.
    place: of this task.
    workers: of a step.
    steps_per_epoch: as in Keras: None: all whole steps. Otherwise the next epoch continues where
      the last one stopped, and the last part of the data may be shorter.
    shuffle: whether arrays are permuted each time that their examples are all used.
    class_weight: class → weight of its examples.
    seed: of the permutations.

  Attributes:
    steps: in an epoch; None: not known.
  """

  def __init__(
    self,
    data,
    place: Place,
    workers: Workers,
    steps_per_epoch: int | None = None,
    shuffle: bool = True,
    class_weight: dict | None = None,
    seed: int = 0,
  ):
    self._data, self._place, self._workers = data, place, workers
    steps_per_epoch = limit("steps_per_epoch", steps_per_epoch, keras.config.max_steps_per_epoch())
    self._asked, self._shuffle, self._seed = steps_per_epoch, shuffle, seed
    self._class_weight = class_weight
    self._iterator = self._started = None
    self.steps = steps_per_epoch or self._count()

  def _count(self) -> int | None:
    kn = self._workers.examples
    if isinstance(self._data, Arrays):
      return self._data.size // kn
    if not isinstance(self._data, tf.data.Dataset):
      return None
    if int(self._data.cardinality()) == tf.data.INFINITE_CARDINALITY:
      raise UserError("The data set has no end; give steps_per_epoch.")
    count = int(_rebatch(self._data, kn).cardinality())
    return None if count == tf.data.UNKNOWN_CARDINALITY else count

  def first_worker_batch(self):
    """The examples of worker 0 in a first step: `[n, …]`, nested."""
    steps = iter(self._steps(0))
    first = next(steps, None)
    if first is None:
      raise self._too_few()
    # `epoch` uses this iterator: see `EvaluationData.first`.
    self._started = itertools.chain([first], steps)
    return first[-1]

  def _too_few(self) -> UserError:
    k, n = self._workers.count, self._workers.batch_size
    return UserError(
      f"The data have fewer than the kn = {k} x {n} = {k * n} examples of a step; use fewer or "
      "smaller workers."
    )

  def _dataset(self, epoch: int) -> tf.data.Dataset:
    """The epoch's steps: `[kn, …]`, nested: (x,), (x, y) or (x, y, sample_weight)."""
    kn, data = self._workers.examples, self._data
    if isinstance(data, Arrays):
      steps = data.size // kn
      per_epoch = min(self._asked or steps, steps)
      # An epoch is a part of a pass over the data; which one depends on its number alone.
      data_pass, part = divmod(epoch, -(-steps // per_epoch) if steps else 1)
      order = tf.range(data.size, dtype=tf.int64)
      if self._shuffle:
        order = permute(self._seed, data.size, data_pass, order)
      first, last = part * per_epoch, min((part + 1) * per_epoch, steps)
      dataset = data.batches(kn, order[first * kn : last * kn])
      # Every batch is whole, which the shapes should say.
      dataset = dataset.map(lambda *e: tf.nest.map_structure(lambda x: _set_size(x, kn), e))
    else:
      dataset = _rebatch(data if isinstance(data, tf.data.Dataset) else data(epoch), kn)
    if self._class_weight:
      _require_class(dataset.element_spec)
      dataset = dataset.map(lambda *e: weigh(e, self._class_weight))
    return dataset

  def epoch(self, epoch: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Iterates over an epoch's steps.

    Yields:
      The batch, an argument of `strategy.run` with `[workers on the replica, n, …]` for each
      replica, and what all tasks must see equal: how many steps are known to follow, and a hash of
      the examples; float64 `[1 + bytes]`.
    """
    goes_on = self._asked is not None and isinstance(self._data, tf.data.Dataset)
    steps, count = iter(()), 0
    if goes_on and self._iterator is not None:
      steps = itertools.islice(self._iterator, self._asked)
    first = next(steps, None)
    if first is None:
      self._iterator = self._start(epoch)
      steps = itertools.islice(self._iterator, self._asked)
      first = next(steps, None)
    if first is None:
      raise self._too_few()
    for (hashed, parts, _), following in _look_ahead(itertools.chain([first], steps)):
      count += 1
      yield self._place.distribute(parts), np.array([following, *hashed.numpy()], np.float64)
    if self._asked is not None and count < self._asked:
      logging.warning("The data ended after %d of %d steps of the epoch.", count, self._asked)

  def _start(self, epoch: int) -> Iterator:
    """Starts an epoch, or continues with what `first_worker_batch` started."""
    started, self._started = self._started, None
    if started is not None and (epoch == 0 or isinstance(self._data, tf.data.Dataset)):
      return started
    return iter(self._steps(epoch))

  def _steps(self, epoch: int) -> tf.data.Dataset:
    """Each step's hash, parts of the local replicas and examples of worker 0."""
    place, k, n = self._place, self._workers.count, self._workers.batch_size
    per_replica = k // place.replicas

    def arrange(*batch):
      workers = tf.nest.map_structure(lambda x: tf.reshape(x, [k, n, *x.shape[1:]]), batch)
      parts = tuple(
        tf.nest.map_structure(lambda x, r=r: x[r * per_replica : (r + 1) * per_replica], workers)
        for r in range(place.first, place.first + place.local)
      )
      return _fingerprint(batch, place), parts, tf.nest.map_structure(lambda x: x[0], workers)

    return self._dataset(epoch).map(arrange).prefetch(_AHEAD)


class EvaluationData:
  """The batches of an evaluation, in order; each replica takes every R-th of them.

  A batch stays whole, because Keras weighs some losses by its size. Whatever the number of
  replicas, these are the batches that `model.evaluate` takes.

  Args:
    data: `Arrays` or a `tf.data.Dataset` of batches.
    place: of this task.
    batch_size: of arrays.
    steps: batches to take; None: all.

  Attributes:
    steps: number of groups of batches; None: not known.
  """

  def __init__(self, data, place: Place, batch_size: int, steps: int | None = None):
    if isinstance(data, Arrays):
      dataset = data.batches(batch_size)
    elif isinstance(data, tf.data.Dataset):
      dataset = _require_batches(data).map(lambda *e: e)
    else:
      raise UserError("Evaluation takes arrays or a tf.data.Dataset, not a function.")
    steps = limit("steps", steps, keras.config.max_steps_per_epoch())
    dataset = dataset if steps is None else dataset.take(steps)
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
      raise UserError("The validation data have no end; give the number of steps.")
    self._place, self._started = place, None
    self._dataset = dataset.map(lambda *e: (_fingerprint(e, place), e)).prefetch(_AHEAD)

  def first(self):
    """The first batch, nested; `groups` must follow and begins with it.

    The iterator is kept, because TensorFlow truncates a data set with `batch(…).cache()` if its
    first iterator is destroyed while it reads ahead.
    """
    elements = iter(self._dataset)
    first = next(elements, None)
    if first is None:
      raise UserError("The data to evaluate hold no example.")
    self._started = itertools.chain([first], elements)
    return first[1]

  def groups(self) -> Iterator[tuple[list, list, np.ndarray]]:
    """Iterates over groups of as many batches of one size as there are replicas.

    Yields:
      The local replicas' batches, whether each counts (1.0, or 0.0 for padding), and what all tasks
      must see equal, as in `TrainingData.epoch`.
    """
    place = self._place
    own = range(place.first, place.first + place.local)
    elements, self._started = self._started or iter(self._dataset), None
    for group, following in _look_ahead(_group(elements, place.replicas)):
      hashes = np.sum([hashed.numpy() for hashed, _ in group], axis=0) % 256
      parts = [group[r if r < len(group) else 0][1] for r in own]
      counts = [tf.constant(float(r < len(group))) for r in own]
      facts = np.array([following, *hashes], np.float64)
      yield parts, counts, facts


def _group(elements: Iterator, size: int) -> Iterator[list]:
  """Groups successive elements of equal shapes, at most `size` of them."""
  group, shapes = [], None
  for element in elements:
    found = [x.shape for x in tf.nest.flatten(element)]
    if group and (found != shapes or len(group) == size):
      yield group
      group = []
    group, shapes = [*group, element], found
  if group:
    yield group


def _look_ahead(steps: Iterator) -> Iterator[tuple[Any, int]]:
  """Yields each step with the number of steps, up to `_AHEAD`, that are known to follow."""
  ahead = collections.deque()
  for step in steps:
    ahead.append(step)
    if len(ahead) > _AHEAD:
      yield ahead.popleft(), _AHEAD
  while ahead:
    step = ahead.popleft()
    yield step, len(ahead)


def _set_size(x, size: int):
  return tf.ensure_shape(x, [size, *x.shape[1:]])


def _require_batches(dataset) -> tf.data.Dataset:
  """Returns the data set, whose elements must be batches of dense tensors.

  Raises:
    UserError: they are not.
  """
  if not isinstance(dataset, tf.data.Dataset):
    raise UserError(f"x(epoch) returned {type(dataset).__name__}, not a tf.data.Dataset.")
  for spec in tf.nest.flatten(dataset.element_spec):
    if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
      raise UserError(
        f"The data set's elements hold {spec}; they must be batches of dense tensors of known rank "
        "(`dataset.batch(…)`)."
      )
  return dataset


def _rebatch(dataset, size: int) -> tf.data.Dataset:
  rebatched = _require_batches(dataset).rebatch(size, drop_remainder=True)
  return rebatched.map(lambda *e: tf.nest.map_structure(lambda x: _set_size(x, size), e))


def _require_class(spec: tuple) -> None:
  """Raises UserError unless elements are (x, y) with one y."""
  if len(spec) != 2 or tf.nest.is_nested(spec[1]):
    raise UserError("class_weight needs elements (x, y) with one y and no sample_weight.")


def weigh(batch: tuple, class_weight: dict[int, float]) -> tuple:
  """Weighs examples by their class, as Keras does.

  Args:
    batch: (x, y), y being class numbers `[examples]` or `[examples, 1]`, or one-hot vectors.
    class_weight: class → weight; other classes have weight 1.
  """
  y = batch[1]
  if y.shape.rank > 1:
    y = tf.argmax(y, axis=-1) if y.shape[-1] != 1 else tf.squeeze(y, axis=-1)
  y = tf.cast(y, tf.int64)
  weights = tf.ones_like(y, keras.config.floatx())
  for number, weight in class_weight.items():
    weights = tf.where(y == int(number), tf.cast(weight, weights.dtype), weights)
  return (*batch, weights)


def _fingerprint(batch: tuple, place: Place):
  """Hash of the targets and of the first example: numbers below 256, `[bytes]`."""
  if place.alone:
    return tf.zeros([_HASH_BYTES], tf.int64)
  whole = batch[1:] if len(batch) > 1 else batch
  first = tf.nest.map_structure(lambda x: x[:1], batch[0])
  texts = [tf.io.serialize_tensor(x) for x in tf.nest.flatten((whole, first))]
  number = tf.strings.to_hash_bucket_fast(tf.strings.join(texts), 2 ** (8 * _HASH_BYTES))
  shifts = tf.constant([8 * i for i in range(_HASH_BYTES)], tf.int64)
  return tf.bitwise.bitwise_and(tf.bitwise.right_shift(number, shifts), 255)
