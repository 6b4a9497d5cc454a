"""TensorBoard's event files of a run, which hold each step once even if the run was killed."""

import collections
import contextlib
import os
import re
from collections.abc import Iterator

import tensorflow as tf
from absl import logging
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.plugins.hparams import api as hparams
from tensorboard.summary.writer.record_writer import RecordWriter

from tf_largebatch import files
from tf_largebatch.errors import summary

_SUFFIX = ".tf_largebatch.v2"
_NAME = re.compile(r"events\.out\.tfevents\.\d+\..*\.v2")
_HEADER = ("recipe", "_hparams_")  # The groups of the tags that each file begins with.


class EventFiles:
  """The event files in a directory, of which the newest is open."""

  def __init__(self, directory: str, recipe: dict, first_step: int):
    """Opens a new file; other files stay as they are until `drop_after`.

    Args:
      directory: of the run's event files.
      recipe: name → value, shown as text and as hyper-parameters.
      first_step: steps that were done when this session began.
    """
    self._directory = directory
    self._recipe = recipe
    self._first_step = first_step
    self._writer = None
    self.open()

  def open(self) -> None:
    """Opens a new file with the recipe, unless one is open."""
    if self._writer is not None:
      return
    self._older = _event_files(self._directory)
    self._writer = tf.summary.create_file_writer(self._directory, filename_suffix=_SUFFIX)
    rows = "".join(f"\n| {name} | {value} |" for name, value in self._recipe.items())
    shown = hparams.hparams_pb({name: _hparam(value) for name, value in self._recipe.items()})
    with self._writer.as_default(step=self._first_step):
      tf.summary.text("recipe", f"| field | value |\n| --- | --- |{rows}")
      tf.summary.experimental.write_raw_pb(shown.SerializeToString())

  def drop_after(self, last_steps: dict[str, int]) -> None:
    """Drops from the older files the events that are, or will be, recorded again.

    Args:
      last_steps: the last step to keep for each group of tags, such as "train" in "train/loss".
    """
    last_steps = dict.fromkeys(_HEADER, self._first_step - 1) | last_steps
    recorded = collections.defaultdict(set)  # The steps in newer files, by group.
    for path in reversed(self._older):
      try:
        kept = _drop(path, last_steps, recorded)
      except (*files.FAILURES, DecodeError) as error:
        logging.warning(
          "Cannot remove the repeated steps from %s (%s); TensorBoard shows them twice until the "
          "next session removes them.",
          path,
          summary(error),
        )
        continue
      for group, steps in kept.items():
        recorded[group] |= steps

  def write(self, group: str, step: int, scalars: dict[str, float]) -> None:
    with self._writer.as_default(step=step):
      for name, value in scalars.items():
        tf.summary.scalar(f"{group}/{name}", value)

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    """Closes the file; what cannot be written any more is lost."""
    writer, self._writer = self._writer, None
    if writer is not None:
      with contextlib.suppress(*files.FAILURES):
        writer.close()


def _event_files(directory: str) -> list[str]:
  """Returns the event files in a directory, oldest first."""
  if not tf.io.gfile.exists(directory):
    return []
  names = sorted(filter(_NAME.fullmatch, tf.io.gfile.listdir(directory)))
  return [os.path.join(directory, name) for name in names]


def _drop(
  path: str, last_steps: dict[str, int], recorded: dict[str, set[int]]
) -> dict[str, set[int]]:
  """Rewrites a file without the events past `last_steps` or `recorded` elsewhere, if it has any.

  Returns:
    The steps that the file still holds, by group; none if the file is not one of a run's.
  """

  def is_kept(group: str, step: int) -> bool:
    return step <= last_steps.get(group, step) and step not in recorded[group]

  kept, dropped = collections.defaultdict(set), False
  for _, group, step in _read(path):
    if not (kept or dropped or group in _HEADER or path.endswith(_SUFFIX)):
      return {}  # Files of earlier versions begin with the recipe, too.
    if is_kept(group, step):
      kept[group].add(step)
    else:
      dropped = True
  if dropped and not kept:
    tf.io.gfile.remove(path)
  elif dropped:
    # A name without "tfevents", so that TensorBoard does not read an incomplete file.
    partial = os.path.join(os.path.dirname(path), "rewritten.partial")
    with files.replacing(path, "wb", partial) as file:
      writer = RecordWriter(file)
      for record, group, step in _read(path, every=True):
        if group is None or is_kept(group, step):
          writer.write(record)
  return kept


def _read(path: str, every: bool = False) -> Iterator[tuple[bytes, str | None, int]]:
  """Yields (event, group of its tag, step) up to the end or the first torn event.

  Args:
    path: of an event file.
    every: also yield the events without a tag, such as the file's version; their group is None.
  """
  for record in RawEventFileLoader(path).Load():
    event = tf.compat.v1.Event.FromString(record)
    if event.summary.value:
      yield record, event.summary.value[0].tag.partition("/")[0], event.step
    elif every:
      yield record, None, event.step


def _hparam(value):
  """Converts a value to what TensorBoard accepts as a hyper-parameter."""
  return value if isinstance(value, (bool, int, float, str)) else str(value)
