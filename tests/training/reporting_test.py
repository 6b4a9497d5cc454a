"""The warning about a run that learns nothing."""

import pytest

from tests.training.small_runs import train
from tf_largebatch.training import reporting, trainer


@pytest.mark.parametrize(
  "error, classes, examples, warned",
  [
    # σ = √(0.9 · 0.1 / 10 000) = 0.003, so the threshold is 0.891.
    (0.9, 10, 10_000, True),
    (0.8911, 10, 10_000, True),
    (0.8909, 10, 10_000, False),
    (0.94, 10, 10_000, True),
    (0.1, 10, 10_000, False),
    # σ = √(0.5 · 0.5 / 100) = 0.05, so the threshold is 0.35.
    (0.351, 2, 100, True),
    (0.349, 2, 100, False),
  ],
)
def test_an_evaluation_no_better_than_guessing_gets_a_warning(
  caplog, error, classes, examples, warned
):
  with caplog.at_level("WARNING", logger="absl"):
    reporting.warn_of_guessing(classes, examples, error, epoch=7)
  assert len(caplog.records) == warned
  if warned:
    message = caplog.records[0].getMessage()
    assert message.startswith(f"Epoch 7 ends with a validation error of {100 * error:.2f}%, ")
    by_chance = {10: "0.90", 2: "15.00"}[classes]  # 3 σ.
    guessing = f"({100 - 100 / classes:.2f}%, by chance up to {by_chance} points less)"
    assert f"guessing one of {classes} classes {guessing}" in message
    assert "--warmup_epochs" in message


def test_a_run_that_learns_nothing_logs_it_after_each_epoch(tmp_path, caplog, monkeypatch):
  evaluations = iter((0.999, 0.5, 1.0))
  evaluate = lambda: {"loss": 6.9, "error": next(evaluations)}  # noqa: E731
  monkeypatch.setattr(trainer, "make_evaluation", lambda *_: evaluate)
  with caplog.at_level("WARNING", logger="absl"):
    train(tmp_path)
  messages = [record.getMessage() for record in caplog.records]
  warnings = [text.split(",")[0] for text in messages if "better than guessing" in text]
  assert warnings == [
    "Epoch 1 ends with a validation error of 99.90%",
    "Epoch 3 ends with a validation error of 100.00%",
  ]
