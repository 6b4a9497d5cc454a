"""Training curves from records."""

import pytest

from tools.studies import curves


def test_training_error_is_the_mean_over_the_steps_of_a_whole_epoch():
  records = [
    {"kind": "train", "epoch": 0.5, "error": 0.8},
    {"kind": "train", "epoch": 0.75, "error": 0.6},
    {"kind": "train", "epoch": 1.0, "error": 0.4},
    {"kind": "eval", "epoch": 1, "error": 0.9},
    {"kind": "train", "epoch": 1.25, "error": 0.3},
    {"kind": "train", "epoch": 2.0, "error": 0.1},
    {"kind": "train", "epoch": 2.5, "error": 0.1},  # The epoch is not over.
  ]
  # (4 x 0.8 + 2 x 0.6 + 2 x 0.4) / 8 and (1 x 0.3 + 3 x 0.1) / 4.
  assert curves.training_curve(records) == pytest.approx({1: 0.65, 2: 0.15})
