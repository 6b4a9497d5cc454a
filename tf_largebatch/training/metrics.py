"""Writes the scalars of a run to TensorBoard, to JSON lines and to the terminal."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable

import tensorflow as tf
import tqdm
from absl import logging

from tf_largebatch import files
from tf_largebatch.errors import UserError, summary
from tf_largebatch.training.event_files import EventFiles

_SECONDS_BETWEEN_LINES = 10.0
# TensorBoard's group of the scalars of each kind of record.
_GROUPS = {"train": "train", "eval": "validation"}


class MetricsWriter:
  """Writes a run's records; a context manager, which overwrites nothing before it is entered.

  `work_dir/metrics.jsonl` has one object per line: {"kind": "train" | "eval", "step", "epoch", …};
  docs/metrics.md lists every field. Records past `first_step` (of a session that was cut off) are
  dropped there and in TensorBoard's files, because these steps will be done again.

  Attributes:
    records: of all sessions, in order.
    evaluations: of these, the evaluations.
  """

  def __init__(
    self,
    work_dir: str,
    recipe: dict,
    first_step: int,
    total_steps: int,
    evaluated_step: int | None = None,
    report: Callable[[str, dict], None] = lambda group, record: None,
  ):
    """
    Args:
      work_dir: the run's directory.
      recipe: name → value, shown in TensorBoard as text and as hyper-parameters.
      first_step: steps that are done already.
      total_steps: steps of the whole run.
      evaluated_step: the last step whose evaluation is done already; None: first_step.
      report: also gets each new record, and its group in TensorBoard.
    """
    self._path = os.path.join(work_dir, "metrics.jsonl")
    records = _read(self._path)
    try:
      # The last line may have been cut off. A file with other damage is kept as a copy.
      if None in records[:-1]:
        kept = self._path + ".damaged"
        tf.io.gfile.copy(self._path, kept, overwrite=True)
        logging.warning(
          "Dropped %d lines of %s that are not records; %s is a copy of the file with them.",
          records.count(None),
          self._path,
          kept,
        )
      self._events = EventFiles(os.path.join(work_dir, "tensorboard"), recipe, first_step)
    except files.FAILURES as error:
      raise UserError(
        f"The metrics and tensorboard/ in {work_dir} cannot be written ({summary(error)}); make "
        "room there."
      ) from error
    # The last step of each kind whose record is safely written.
    self._last = {
      "train": first_step,
      "eval": first_step if evaluated_step is None else evaluated_step,
    }
    self.records = [
      record
      for record in records
      if record is not None and record["step"] <= self._last.get(record["kind"], first_step)
    ]
    self.evaluations = [record for record in self.records if record["kind"] == "eval"]
    self._unflushed: list[dict] = []
    self._lines = None  # Open while the file or its buffer holds all records.
    self._failing = False
    self._total_steps = total_steps
    self._report = report
    self._last_line = 0.0
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

  def __enter__(self):
    self.flush()
    return self

  def __exit__(self, *exception):
    self.flush()
    self._close()
    if self._bar is not None:
      self._bar.close()

  def train(self, step: int, epoch: float, scalars: dict[str, float]):
    """Records scalars after `step` steps, `epoch` epochs."""
    self._write("train", step, epoch, scalars)
    if "://" not in self._path:  # An object store would write the whole file again.
      self.flush()
    text = (
      f"loss {scalars['loss']:.4f}  error {scalars['error']:.2%}  "
      f"rate {scalars['learning_rate']:.4g}  {scalars['images_per_second']:.0f} images/s"
    )
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
    elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
      self._last_line = time.monotonic()
      logging.info("step %d/%d  epoch %.2f  %s", step, self._total_steps, epoch, text)

  def evaluation(self, step: int, epoch: float, scalars: dict[str, float]):
    """Records an evaluation."""
    self.evaluations.append(self._write("eval", step, epoch, scalars))
    self.flush()
    with self._retrying_later():
      files.sync(self._path)  # Before the checkpoint says that this epoch is evaluated.
    text = f"validation error {scalars['error']:.2%}, loss {scalars['loss']:.4f}"
    self.say(f"epoch {epoch:g}: {text} after {step} steps")

  def say(self, line: str):
    """Logs a line without breaking the progress bar."""
    if self._bar is not None:
      self._bar.clear()
    logging.info("%s", line)

  def _write(self, kind: str, step: int, epoch: float, scalars: dict[str, float]) -> dict:
    record = {"kind": kind, "step": step, "epoch": epoch, **scalars}
    self.records.append(record)
    self._unflushed.append(record)
    self._report(_GROUPS[kind], record)
    with self._retrying_later():
      if self._lines is not None:
        self._lines.write(json.dumps(record) + "\n")
        self._events.write(_GROUPS[kind], step, scalars)
    return record

  def flush(self):
    """Makes the records durable; if the disk is full, logs that and retries at the next call."""
    with self._retrying_later():
      if self._lines is None:
        self._write_again()
      self._lines.flush()
      self._events.flush()
      self._last |= {record["kind"]: record["step"] for record in self._unflushed}
      self._unflushed.clear()
      self._failing = False

  def _write_again(self):
    """Makes all files hold exactly the records, whatever a killed run or a failed write left."""
    files.write_text(self._path, "".join(json.dumps(r) + "\n" for r in self.records))
    # TensorBoard reads nothing past a torn event, so after a failed write a new file begins.
    self._events.open()
    self._events.drop_after({_GROUPS[kind]: step for kind, step in self._last.items()})
    for record in self._unflushed:
      scalars = {name: x for name, x in record.items() if name not in ("kind", "step", "epoch")}
      self._events.write(_GROUPS[record["kind"]], record["step"], scalars)
    self._lines = tf.io.gfile.GFile(self._path, "a")

  @contextlib.contextmanager
  def _retrying_later(self):
    try:
      yield
    except files.FAILURES as error:
      self._close()
      if not self._failing:
        self._failing = True
        self.say(f"Cannot write the metrics ({summary(error)}); will retry.")

  def _close(self):
    lines, self._lines = self._lines, None
    with contextlib.suppress(AttributeError, *files.FAILURES):
      lines.close()
    self._events.close()


def read_metrics(work_dir: str) -> list[dict]:
  """Reads the records of `metrics.jsonl` in order, up to the first line that is not a record."""
  records = _read(os.path.join(work_dir, "metrics.jsonl"))
  return list(itertools.takewhile(lambda record: record is not None, records))


def _read(path: str) -> list[dict | None]:
  """Reads each line's record, or None if the line is not a record.

  Raises:
    UserError: the file cannot be read, for example because it is a directory.
  """
  try:
    if not tf.io.gfile.exists(path):
      return []
    with tf.io.gfile.GFile(path, "rb") as file:
      lines = file.read().splitlines()
  except files.FAILURES as error:
    raise UserError(
      f"The metrics {path} cannot be read ({summary(error)}); move that file away."
    ) from error
  return list(map(_record, lines))


def _record(line: bytes) -> dict | None:
  try:
    record = files.parse_json(line)
    if not all(isinstance(record[name], int | float) for name in ("epoch", "error")):
      return None
    return {**record, "step": int(record["step"]), "kind": str(record["kind"])}
  except (ValueError, TypeError, KeyError, OverflowError):
    return None
