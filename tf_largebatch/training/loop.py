"""Stage 5 of a run: epochs of steps, evaluations and checkpoints."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.building import Networks
from tf_largebatch.training.checkpoint import Checkpoints
from tf_largebatch.training.metrics import MetricsWriter
from tf_largebatch.training.noise_scale import NoiseScale
from tf_largebatch.training.reporting import REMEDIES

# The scalars of a step from which the noise scale comes.
_NOISE = ("gradient_variance", "squared_gradient")


@dataclasses.dataclass
class Loop:
  """The steps of a run, and how far it has come.

  Attributes:
    recipe: resolved.
    options: of the run.
    steps_per_epoch: steps in an epoch.
    train_step: see `step.make_train_step`.
    batches: its batches, from step `done` on.
    evaluate: see `evaluation.make_evaluation`.
    check_error: called with each epoch's validation error and the epoch's number.
    networks, checkpoints, metrics: where the run's state, checkpoints and records are.
    bad: the bad examples that are skipped; None: none are.
    stop: the request to stop.
    noise: running averages of the gradient noise scale.
    alone: whether the run has a single task.
    done: steps done.
    curvature: see `curvature.make_curvature`; by default, nothing is measured.
    before_saving: called before each checkpoint.
    seconds: time trained, in earlier sessions too; without evaluation.
    stop_requested: whether the last step that was read reported a request to stop.
  """

  recipe: Recipe
  options: RunOptions
  steps_per_epoch: int
  train_step: Callable
  batches: Iterator
  evaluate: Callable[[], dict[str, float] | None]
  check_error: Callable[[float, int], None]
  networks: Networks
  checkpoints: Checkpoints
  metrics: MetricsWriter
  bad: BadExamples | None
  stop: StopRequest
  noise: NoiseScale
  alone: bool
  done: int = 0
  curvature: Callable[[Any], dict[str, float]] = lambda batch: {}
  before_saving: Callable[[], None] = lambda: None
  seconds: float = 0.0
  stop_requested: bool = False

  def run_epochs(self, first: int) -> bool:
    """Trains and evaluates from epoch `first` (counted from 1) to the last.

    Returns:
      True if all are complete; False if a task was asked to stop, with the state saved.

    Raises:
      UserError: training diverged, or an example cannot be read.
    """
    for epoch in range(first, self.recipe.epochs + 1):
      complete = self.train_to(epoch * self.steps_per_epoch)
      self._save()  # Written during the evaluation.
      if not (complete and self._evaluate_epoch()):
        self._save()  # Again, if the first try failed.
        self.checkpoints.wait()
        return False
    return True

  def train_to(self, last: int) -> bool:
    """Trains until `last` steps are done or a task was asked to stop; whether `last` are done."""
    window, saved_at = _Window(), time.monotonic()
    previous, stops = None, False
    while self.done < last and not stops:
      batch = window.next_batch(self.batches)
      curvature = self._measure_curvature(window, batch)
      scalars = self.train_step(batch, tf.constant(float(self.stop.signal is not None)))
      self.done += 1
      # Read the previous step's scalars while the device computes this one. (If that step ended a
      # record, they were read at once.) A request to stop is part of these scalars, the same for
      # all tasks, so all stop after the same step; a task on its own can check the signal itself.
      if previous is not None:
        self._read(window, self.done - 1, previous)
      stops = self.stop_requested or (self.alone and self.stop.signal is not None)
      previous = scalars
      save = self._checkpoint_is_due(saved_at)
      # A checkpoint ends a record, so that a resumed run records each step once.
      due = self.done == last or self.done % self.options.log_every_steps == 0
      if stops or save or due or curvature:
        self._read(window, self.done, scalars)
        self._record(window, scalars | curvature)
        if save:
          self.metrics.flush()
          self._save()
          saved_at = time.monotonic()
        previous, window = None, _Window()
    self.metrics.flush()
    return self.done == last and not stops

  def _measure_curvature(self, window: "_Window", batch) -> dict[str, float]:
    """Measures the curvature of the next step's loss, before the step, if it is due."""
    every = self.options.curvature_every_steps
    return window.exclude(self.curvature, batch) if every and (self.done + 1) % every == 0 else {}

  def _save(self):
    self.before_saving()
    self.checkpoints.save(self.done, self.seconds)

  def _checkpoint_is_due(self, saved_at: float) -> bool:
    steps, minutes = self.options.checkpoint_every_steps, self.options.checkpoint_every_minutes
    due = (steps and self.done % steps == 0) or (0 < minutes <= (time.monotonic() - saved_at) / 60)
    return bool(due) and not self.checkpoints.busy

  def _read(self, window: "_Window", number: int, scalars: dict):
    """Waits for step `number`, checks its loss and notes whether a task was asked to stop."""
    loss = float(scalars["loss"])
    if not math.isfinite(loss):
      rate = float(scalars["learning_rate"])
      raise self._divergence(f"loss is {loss} (rate {rate:g})", number, number - 1)
    window.losses.append(loss)
    window.errors.append(float(scalars["error"]))
    self.stop_requested = float(scalars["stop"]) > 0
    if "gradient_variance" in scalars:
      window.noise.append([float(scalars[name]) for name in _NOISE])

  def _record(self, window: "_Window", scalars: dict):
    """Writes a training record: means over the window, and the last step's other scalars."""
    seconds = window.seconds()
    left_out = ("stop", *_NOISE)  # The noise is a mean, below.
    record = {name: float(value) for name, value in scalars.items() if name not in left_out}
    if not math.isfinite(record["gradient_norm"]):
      del record["gradient_norm"]  # The loss scale had this step skipped.
    record["loss"], record["error"] = float(np.mean(window.losses)), float(np.mean(window.errors))
    noise = np.asarray(window.noise).reshape(-1, len(_NOISE))
    noise = noise[np.isfinite(noise).all(axis=1)]  # The loss scale skips the other steps.
    if len(noise):
      means = noise.mean(axis=0).tolist()
      record |= dict(zip(_NOISE, means, strict=True)) | self.noise.update(self.done, *means)
    images = len(window.losses) * self.recipe.global_batch_size
    record["images_per_second"] = images / seconds
    record["input_wait_share"] = window.waited / seconds
    if self.bad is not None:
      record["bad_examples"] = self.bad.write()
    self.metrics.train(self.done, self.done / self.steps_per_epoch, record)
    self.seconds += seconds

  def _evaluate_epoch(self) -> bool:
    """Evaluates; whether the evaluation was complete."""
    self.networks.update_evaluated()
    scalars = self.evaluate()
    if scalars is None:
      return False
    if not math.isfinite(scalars["loss"]):
      # These weights are bad, although they are finite.
      raise self._divergence(f"validation loss is {scalars['loss']}", self.done, self.done)
    if self.bad is not None:
      scalars["bad_examples"] = self.bad.write()
    epoch = self.done // self.steps_per_epoch
    self.metrics.evaluation(self.done, epoch, scalars)
    self.check_error(scalars["error"], epoch)
    self.checkpoints.evaluated(self.done, scalars["error"])
    return True

  def _divergence(self, what: str, number: int, bad_from: int) -> UserError:
    """The error for a loss that is not finite; checkpoints from step `bad_from` on are removed."""
    self.checkpoints.discard_from(bad_from)
    newest = self.checkpoints.newest_step()
    recipe = self.recipe
    return UserError(
      f"Training diverged: the {what} at step {number}, epoch {number / self.steps_per_epoch:.2f}, "
      f"with kn = {recipe.workers} x {recipe.per_worker_batch_size} = {recipe.global_batch_size} "
      f"and a peak rate of {recipe.peak_learning_rate:g}; the last good checkpoint is "
      f"{'none' if newest is None else f'that of step {newest}'}. {REMEDIES}"
    )

  def interruption(self) -> InterruptedRunError:
    """The error that ends a run which was asked to stop."""
    number = signal.SIGTERM if self.stop.signal is None else self.stop.signal
    reason = signal.Signals(number).name
    if self.stop.signal is None:
      reason = "another task was asked to"
    newest = self.checkpoints.newest_step()
    saved = f"not saved; the newest checkpoint: step {newest or 0}"
    if newest == self.done:
      saved = "saved"
    total = self.recipe.epochs * self.steps_per_epoch
    return InterruptedRunError(
      f"Stopped ({reason}) after step {self.done} of {total}, {saved}; run the same command to "
      "continue from there.",
      128 + number,
    )


class _Window:
  """The steps between two training records.

  Attributes:
    losses, errors: of each step.
    noise: estimates of each step, see `noise_scale`; empty if a step has one pass.
    waited: seconds spent waiting for batches.
  """

  def __init__(self):
    self._began = time.perf_counter()
    self.waited = 0.0
    self.losses: list[float] = []
    self.errors: list[float] = []
    self.noise: list[list[float]] = []

  def next_batch(self, batches: Iterator):
    before = time.perf_counter()
    batch = next(batches)
    self.waited += time.perf_counter() - before
    return batch

  def exclude(self, measure: Callable, batch):
    """Returns what `measure` returns for the batch, whose time does not count."""
    before = time.perf_counter()
    result = measure(batch)
    self._began += time.perf_counter() - before
    return result

  def seconds(self) -> float:
    return time.perf_counter() - self._began
