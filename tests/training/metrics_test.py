"""Metrics: their files, and the records that a resumed run drops."""

import json
import os

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tf_largebatch.training.metrics import MetricsWriter, read_metrics

SCALARS = {"loss": 2.5, "error": 0.75, "learning_rate": 0.1, "images_per_second": 10.0}


def write(work_dir, first_step, steps):
  with MetricsWriter(str(work_dir), {"workers": 8, "decay_epochs": [1]}, first_step, 9) as metrics:
    for step in steps:
      metrics.train(step, step / 3, SCALARS | {"loss": float(step)})
      if step % 3 == 0:
        metrics.evaluation(step, step / 3, {"loss": 1.0, "error": step / 10})
    return metrics.evaluations


def test_records_past_the_restored_step_are_replaced(tmp_path):
  write(tmp_path, 0, range(1, 6))
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"kind": "train", "st')  # A torn line.
  evaluations = write(tmp_path, 3, range(4, 10))
  records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert records == read_metrics(str(tmp_path))
  assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 10))
  assert [r["error"] for r in records if r["kind"] == "eval"] == [0.3, 0.6, 0.9]
  # Those of the earlier session count in the median of the last five.
  assert [record["error"] for record in evaluations] == [0.3, 0.6, 0.9]
  assert records[0] == {"kind": "train", "step": 1, "epoch": 1 / 3, **SCALARS, "loss": 1.0}


def test_an_evaluation_survives_a_power_failure(tmp_path, monkeypatch):
  """It is on disk before a checkpoint marks the epoch as evaluated, so it cannot get lost."""
  synced = []
  monkeypatch.setattr(os, "fsync", lambda _: synced.append(read_metrics(str(tmp_path))))
  write(tmp_path, 0, range(1, 4))
  assert [record["error"] for record in synced[-1] if record["kind"] == "eval"] == [0.3]


def test_tensorboard_has_the_scalars_and_the_recipe(tmp_path):
  write(tmp_path, 0, range(1, 4))
  events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
  tags = set(events.Tags()["tensors"])
  assert {"train/loss", "train/error", "validation/loss", "validation/error"} <= tags
  assert {"train/learning_rate", "train/images_per_second", "recipe"} <= tags
  assert [event.step for event in events.Tensors("train/loss")] == [1, 2, 3]
  (value,) = events.Tensors("validation/error")
  assert value.step == 3 and abs(make_ndarray(value.tensor_proto) - 0.3) < 1e-6
  text = str(make_ndarray(events.Tensors("recipe")[0].tensor_proto))
  assert "| workers | 8 |" in text and "| decay_epochs | [1] |" in text
  assert any("hparams" in tag for tag in events.summary_metadata)
