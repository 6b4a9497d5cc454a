"""The examples that a run could not read: which ones, and why."""

import fnmatch
import json
import os
import queue

import tensorflow as tf
from absl import logging

from tf_largebatch import files
from tf_largebatch.data import sources
from tf_largebatch.errors import UserError, summary


class BadExamples:
  """The examples that a run skipped, listed in the work directory.

  `work_dir/bad_examples.jsonl` has one object per line: {"split", "example", "fault"}; tasks other
  than the chief list theirs in `bad_examples.1.jsonl` and so on. A resumed run extends the lists.
  """

  def __init__(self, work_dir: str, task_index: int, channels: int):
    """
    Args:
      work_dir: the run's directory, the same for all tasks.
      task_index: rank of this task.
      channels: number of channels of the network's images.
    """
    self._work_dir = work_dir
    self._channels = channels
    suffix = f".{task_index}" if task_index else ""
    self._path = os.path.join(work_dir, f"bad_examples{suffix}.jsonl")
    self._lines = _read(self._path)
    self._known = {(line["split"], line["example"]) for line in self._lines}
    self._written = len(self._lines)
    self._recorded = queue.SimpleQueue()

  def record(self, split: str, source, example: int):
    """Queues an example for `write`; safe in the input pipeline's threads."""
    self._recorded.put((split, source, example))

  def write(self) -> int:
    """Lists and logs the queued examples; returns how many examples all tasks have listed."""
    while not self._recorded.empty():
      split, source, example = self._recorded.get()
      if (split, example) in self._known:
        continue
      self._known.add((split, example))
      # If it can be read now, a network or disk failed for a moment.
      fault = sources.fault(source, example, self._channels)
      fault = fault or f"{source.describe(example)}: failed once"
      logging.warning("Skipped in %s: %s", split, fault)
      self._lines.append({"split": split, "example": example, "fault": fault})
    if self._written < len(self._lines):
      try:
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self._written = len(self._lines)
      except files.FAILURES as error:  # For example a full disk: training continues.
        logging.warning("Cannot write %s (%s); will retry later.", self._path, summary(error))
    # Not a glob of the whole path, because its directories may have brackets in their names.
    names = fnmatch.filter(tf.io.gfile.listdir(self._work_dir), "bad_examples*.jsonl")
    listed = (line for name in names for line in _read(os.path.join(self._work_dir, name)))
    return len({(line["split"], line["example"]) for line in listed})


def _read(path: str) -> list[dict]:
  if not tf.io.gfile.exists(path):
    return []
  try:
    lines = [files.parse_json(line) for line in files.read_text(path).splitlines()]
    for line in lines:
      hash((line["split"], line["example"], line["fault"]))
  except (*files.FAILURES, ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{path} is not a list of bad examples ({summary(error)}); move it away to start a new one."
    ) from error
  return lines
