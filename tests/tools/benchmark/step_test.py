"""The step benchmark: its figures, and a run of small contenders."""

import json

import pytest

from tests.launching import run_module
from tf_largebatch.recipe import Recipe
from tools.benchmark import step
from tools.benchmark.contenders.ceiling import ceiling_of
from tools.benchmark.contenders.contender import parse_contender


def test_ratios_are_of_median_images_per_second():
  recipe = Recipe(
    dataset="synthetic",
    image_size=224,
    workers=2,
    channel_mean=(0.0, 0.0, 0.0),
    channel_std=(1.0, 1.0, 1.0),
  ).to_dict()
  fast = parse_contender("ours", recipe, {})
  slow = parse_contender("keras:workers=1:dtype=bfloat16", recipe, {})

  def found(*seconds):
    reports = [{"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": 5} for s in seconds]
    return {"ready": {"passes": 2}, "repeats": reports}

  in_float32, in_bfloat16 = (ceiling_of(contender).name for contender in (fast, slow))
  assert in_float32 != in_bfloat16
  # An evaluation is compared with products in its own dtype.
  evaluation = parse_contender("evaluate:dtype=bfloat16", recipe, {})
  assert ceiling_of(evaluation).name == in_float32
  assert ceiling_of(parse_contender("evaluate:evaluation_dtype=training", recipe, {})).name == (
    in_float32
  )
  in_16_bits = parse_contender("evaluate:dtype=bfloat16:evaluation_dtype=training", recipe, {})
  assert ceiling_of(in_16_bits).name == in_bfloat16
  results = {
    "ours": found(8, 4, 40),
    slow.name: found(8, 8, 2),
    evaluation.name: found(4, 4, 4),
    in_float32: found(2, 1, 9),
    in_bfloat16: found(3, 4, 8),
  }
  work = {
    "ours": {"flops": 10, "parameters": 7},
    slow.name: {"flops": 20, "parameters": 1},
    evaluation.name: {"forward_flops": 3, "flops": 10, "parameters": 7},
  }
  summary = step.summarize([fast, slow, evaluation], results, 2, work)
  ours, keras, evaluated = summary["contenders"].values()
  # Two steps per repeat: medians of 4 s and 4 s per step, of 64 and of 32 images.
  assert ours["images_per_second"] == 16 and keras["images_per_second"] == 8
  assert (ours["ratio"], keras["ratio"]) == (1, 2)
  assert ours["flops_per_second"] == 160 and ours["cpu_seconds"] == 8
  # Eight products of two 2048 × 2048 matrices per step.
  assert summary["ceilings_flops_per_second"] == {
    in_float32: 8 * 2 * 2048**3,
    in_bfloat16: 4 * 2 * 2048**3,
  }
  assert ours["gradient_bytes"] == 28
  assert ours["share_of_ceiling"] == 160 / (16 * 2048**3)
  assert keras["share_of_ceiling"] == 160 / (8 * 2048**3)
  # 64 images in 2 s, with the FLOPs of the forward pass alone.
  assert evaluated["images_per_second"] == 32 and evaluated["flops_per_second"] == 96


def test_a_real_run(tmp_path):
  path = tmp_path / "step.json"
  process = run_module(
    "tools.benchmark.step",
    *("--network=resnet8", "--image_size=8", "--per_worker_batch_size=2", "--repeats=2"),
    "--contenders=ours:workers=2:tasks=2,loop,keras:workers=2,fit,our_fit:workers=2,"
    "evaluate:dtype=bfloat16,torch:network=resnet50",
    *(f"--json={path}", "--profile"),
    timeout=240,
  )
  assert process.returncode == 0, process.stderr
  found = json.loads(path.read_text())
  rows = found["contenders"]
  expected = ["ours:workers=2:tasks=2", "loop", "keras:workers=2", "fit", "our_fit:workers=2"]
  assert list(rows)[:5] == expected
  assert [rows[name]["passes"] for name in expected] == [1, 1, 2, 1, 2]
  for name in expected:
    row = rows[name]
    assert any("Conv2DBackpropFilter" in operation for operation in row["operations"])
    assert "Process" not in row["operations"]  # It calls the operations but is not one.
    assert len(row["step_seconds_each"]) == 2
    assert row["images_per_second"] == 2 * row["workers"] / row["step_seconds"]
    assert 0 < row["share_of_ceiling"] < 1 and row["peak_bytes"] > 2**27
  assert 0.2 < rows["loop"]["share_within_steps"] < 1
  assert 0.2 < rows["loop"]["share_of_bare_step"] < 5
  assert "share_of_bare_step" not in rows["keras:workers=2"]
  # A contender that cannot run does not stop the others.
  evaluation = rows["evaluate:dtype=bfloat16"]
  assert evaluation["images_per_second"] == 2 / evaluation["step_seconds"]
  assert not any("Backprop" in operation for operation in evaluation["operations"])
  missing = "not measured: torch:network=resnet50: No module named 'torch'"
  assert ("torch:network=resnet50" in rows) != (missing in process.stderr)
  assert found["versions"]["tensorflow"] and found["hardware"]["cores"] >= 1
  assert process.stdout.splitlines()[-1].startswith("ceiling: ")


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--contenders=theirs", "--contenders=theirs"),
    ("torch", "Unexpected argument 'torch'"),
    ("--json=nowhere/step.json", "--json=nowhere/step.json cannot be written"),
  ],
)
def test_a_users_mistake_gets_one_line(argument, message):
  process = run_module("tools.benchmark.step", argument)
  assert process.returncode == 1
  assert process.stderr.startswith(f"error: {message}") and process.stderr.count("\n") == 1
