"""The loop: where it stops, what it records, and what it does when training diverges."""

import dataclasses
import itertools
import os
import types

import numpy as np
import pytest

from tests.training.small_runs import RECIPE, train
from tf_largebatch.errors import UserError
from tf_largebatch.signals import StopRequest
from tf_largebatch.training.loop import Loop
from tf_largebatch.training.noise_scale import NoiseScale


class Discard:
  """Stands for metrics and checkpoints, and keeps nothing."""

  busy = False

  def __getattr__(self, name):
    return lambda *_: None


class Multiples:
  """Stands for a number of which only the given steps are multiples."""

  def __init__(self, steps):
    self._steps = steps

  def __rmod__(self, number):
    return number not in self._steps


def make_loop(first_request, log_every_steps, saves):
  """The loop of a run of several tasks, whose steps only sum up the tasks' requests to stop.

  Args:
    first_request: step from which on a task requests a stop.
    log_every_steps: as in `RunOptions`.
    saves: steps after which a checkpoint is due; the clock makes them differ between tasks.
  """

  def train_step(batch, _):
    request = float(batch >= first_request)
    names = ("loss", "error", "learning_rate", "gradient_norm")
    return dict.fromkeys(names, 1.0) | {"stop": request}

  return Loop(
    recipe=RECIPE,
    options=types.SimpleNamespace(
      log_every_steps=log_every_steps,
      curvature_every_steps=0,
      checkpoint_every_steps=Multiples(saves),
      checkpoint_every_minutes=0,
    ),
    steps_per_epoch=10,
    train_step=train_step,
    batches=itertools.count(1),
    evaluate=None,
    check_error=None,
    networks=None,
    checkpoints=Discard(),
    metrics=Discard(),
    bad=None,
    stop=StopRequest(),
    noise=NoiseScale(RECIPE),
    alone=False,
  )


@pytest.mark.parametrize("log_every_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("saves", [(), (5,), (6,), (5, 6), (4, 5, 6, 7)])
@pytest.mark.parametrize("first_request", [5, 6])
def test_all_tasks_stop_after_the_same_step(first_request, log_every_steps, saves):
  """One step after the first that reports a request: it is under way when the report is read.

  When a task records or saves does not matter.
  """
  loop = make_loop(first_request, log_every_steps, saves)
  assert not loop.train_to(40)
  assert loop.done == first_request + 1


def test_a_request_in_an_epochs_last_step_takes_effect_in_the_next_epoch():
  for log_every_steps in (1, 3, 100):
    loop = make_loop(5, log_every_steps, ())
    assert loop.train_to(5)  # The epoch is complete, so it is evaluated.
    assert not loop.train_to(10) and loop.done == 6
    loop = make_loop(5, log_every_steps, ())
    ends = [loop.train_to(last) for last in range(1, 7)]  # Epochs of one step.
    assert ends == [True] * 5 + [False]


def test_a_record_is_the_mean_over_its_steps():
  """As in the training curves of the paper's figures."""
  records = []
  loop = make_loop(99, 3, ())
  step = loop.train_step
  loop.train_step = lambda batch, stop: step(batch, stop) | {"loss": batch**2, "error": 1 / batch}
  loop.metrics = Discard()
  loop.metrics.train = lambda number, epoch, record: records.append((number, epoch, record))
  assert loop.train_to(7)
  assert [(number, epoch) for number, epoch, _ in records] == [(3, 0.3), (6, 0.6), (7, 0.7)]
  for (_, _, record), steps in zip(records, ([1, 2, 3], [4, 5, 6], [7]), strict=True):
    assert record["loss"] == pytest.approx(np.mean([s**2 for s in steps]))
    assert record["error"] == pytest.approx(np.mean([1 / s for s in steps]))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
  """The rate is reasonable until step 3; step 4 ruins the weights and step 5 shows it."""
  wild = dataclasses.replace(
    RECIPE, decay_epochs=(1,), decay_factor=1e30, warmup="none", warmup_epochs=0
  )
  with pytest.raises(UserError) as error:
    train(tmp_path, wild, checkpoint_every_steps=1)
  message = str(error.value)
  assert "\n" not in message
  assert "Training diverged: the loss is nan (rate 2e+29) at step 5, epoch 1.67" in message
  assert "kn = 2 x 10 = 20" in message and "last good checkpoint is that of step 3" in message
  assert "--warmup_epochs" in message and "--reference_learning_rate" in message
  # The checkpoint of step 4, made by the rate that ruined the run, is gone.
  assert sorted({name[5:15] for name in os.listdir(tmp_path / "checkpoints")})[-1] == f"{3:010d}"
  # What is saved is finite, and the same command ends the same way.
  for name in os.listdir(tmp_path / "checkpoints"):
    if name.endswith(".npz"):
      arrays = np.load(tmp_path / "checkpoints" / name)
      assert all(np.isfinite(arrays[key]).all() for key in arrays.files)
  with pytest.raises(UserError, match="diverged"):
    train(tmp_path, wild, checkpoint_every_steps=1)


def test_an_evaluation_that_is_not_finite_leaves_no_checkpoint(tmp_path):
  """The only step's loss is finite, because it is that of the weights before the step."""
  wild = dataclasses.replace(
    RECIPE, train_split="train[:20]", epochs=1, reference_learning_rate=1e30, warmup="none"
  )
  with pytest.raises(UserError, match=r"validation loss is .* last good checkpoint is none"):
    train(tmp_path, wild)
  assert os.listdir(tmp_path / "checkpoints") == [] and not (tmp_path / "result.json").exists()
