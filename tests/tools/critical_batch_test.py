"""`tools.critical_batch` on runs with a known noise scale."""

import json
import math
import types

import numpy as np
import pytest

from tests.tools.studies.made_up_runs import make_run
from tf_largebatch.errors import UserError
from tools import critical_batch as critical_batch_program
from tools.studies.noise import critical_batch, epochs_of


@pytest.mark.parametrize("noise_scale", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("share", [0.8, 0.5, 1.0])
def test_adascale_keeps_the_share_at_the_critical_batch(noise_scale, share):
  n = 32
  k = critical_batch(noise_scale, n, share) / n
  gain = k * (noise_scale + n) / (noise_scale + k * n)
  assert gain / k == pytest.approx(share, rel=1e-12)


def _record(step, epoch, variance, squared):
  noise = {"gradient_variance": variance, "squared_gradient": squared}
  return {"kind": "train", "step": step, "epoch": epoch, **noise}


def test_an_epoch_is_the_mean_of_its_steps():
  records = [
    _record(3, 0.3, 6.0, 2.0),
    _record(8, 0.8, 5.0, 1.0),
    _record(10, 1.0, 9.0, -1.0),
    {"kind": "eval", "step": 10, "epoch": 1},
    _record(15, 1.5, 7.0, -0.5),
    {"kind": "train", "step": 20, "epoch": 2.0},  # The loss scale skipped these steps.
  ]
  first, second = epochs_of(records)
  steps = [(6.0, 2.0)] * 3 + [(5.0, 1.0)] * 5 + [(9.0, -1.0)] * 2
  variance, squared = np.mean(steps, axis=0)
  assert (first.epoch, first.variance, first.squared_gradient) == (1, variance, squared)
  assert first.noise_scale == variance / squared
  left_out = [steps[3:], steps[:3] + steps[8:], steps[:8]]
  ratios = [np.mean([v for v, _ in each]) / np.mean([s for _, s in each]) for each in left_out]
  spread = sum((ratio - sum(ratios) / 3) ** 2 for ratio in ratios)
  assert first.error == pytest.approx(math.sqrt(2 / 3 * spread), rel=1e-12)
  assert (second.epoch, second.variance, second.squared_gradient) == (2, 7.0, -0.5)
  assert math.isinf(second.noise_scale) and second.error is None


def _add_noise(work_dir, variance, squared):
  path = f"{work_dir}/metrics.jsonl"
  with open(path) as file:
    records = [json.loads(line) for line in file]
  for record in records:
    if record["kind"] == "train":
      record |= {"gradient_variance": variance, "squared_gradient": squared}
  with open(path, "w") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)


def _main(monkeypatch, runs, output_dir):
  values = types.SimpleNamespace(output_dir=output_dir, from_checkpoint=None)
  monkeypatch.setattr(critical_batch_program, "flags", types.SimpleNamespace(FLAGS=values))
  critical_batch_program.main(runs)


def test_the_table_the_picture_and_the_numbers(tmp_path, monkeypatch, capsys):
  runs = [make_run(tmp_path, name, [0.3, 0.2], per_worker_batch_size=8) for name in "ab"]
  _add_noise(runs[0], 24.0, 0.5)
  _add_noise(runs[1], 24.0, -0.5)
  _main(monkeypatch, runs, f"{tmp_path}/out")
  printed = capsys.readouterr().out
  # B = 48, n = 8, kn = 64: 0.25 · 48 + 1.25 · 8 and 48 + 2 · 8; (48 + 8) / (48 + 64).
  assert printed.count("48         0            22            64           50%") == 2
  assert printed.count("-         -             -             -          100%") == 2
  found = json.loads((tmp_path / "out" / "critical_batch.json").read_text())
  for row in found[runs[0]]["epochs"]:
    assert row["kn"] == pytest.approx({"0.8": 22.0, "0.5": 64.0}, rel=1e-12)
  assert [row["noise_scale"] for row in found[runs[1]]["epochs"]] == [None, None]
  assert (tmp_path / "out" / "critical_batch.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_the_noise_is_refused_in_one_line(tmp_path, monkeypatch):
  run = make_run(tmp_path, "run", [0.3])
  with pytest.raises(UserError) as error:
    _main(monkeypatch, [run], str(tmp_path))
  assert str(error.value).startswith(f"{run} holds no gradient_variance: its steps have one pass")
  assert "\n" not in str(error.value)
