"""The check of the noise scale on a small network."""

import json

import pytest

from tests.launching import run_module

_SMALL = (
  *("--dataset=synthetic", "--train_split=train[:96]", "--network=resnet8", "--image_size=8"),
  *("--workers=4", "--per_worker_batch_size=4", "--dtype=float32", "--repeats=2"),
)


def test_the_meter_agrees_with_brute_force(tmp_path):
  path = tmp_path / "found.json"
  finished = run_module(
    "tools.benchmark.noise_scale", *_SMALL, "--train_steps=0,3", f"--json={path}"
  )
  assert finished.returncode == 0, finished.stdout + finished.stderr
  found = json.loads(path.read_text())
  assert [row["steps"] for row in found["estimates"]] == [0, 3]
  for row in found["estimates"]:
    mean, error, brute = row["variance"]
    assert 0 < abs(mean - brute) <= 4 * error < 0.2 * brute
  assert len(found["seconds"]["with"]) == len(found["seconds"]["without"]) == 2
  assert "ms with the meter" in finished.stdout


@pytest.mark.parametrize(
  "flag, expected",
  [
    ("--train_steps=3,2", "error: --train_steps=3,2: give increasing whole numbers."),
    ("--workers=1", "error: The noise scale needs several workers; give --workers=2 or more."),
  ],
)
def test_refused_in_one_line(flag, expected):
  finished = run_module("tools.benchmark.noise_scale", *_SMALL, flag)
  assert finished.returncode == 1 and finished.stderr.splitlines()[-1] == expected
