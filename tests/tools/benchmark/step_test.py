"""`tools/benchmark/step.py`: what it counts, and a real run of its contenders."""

import json

import pytest

from tests.launching import run_module
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.benchmark import step

_RECIPE = Recipe(
  dataset="synthetic",
  image_size=224,
  workers=2,
  channel_mean=(0.0, 0.0, 0.0),
  channel_std=(1.0, 1.0, 1.0),
)


def test_flops_of_resnet50_are_those_of_its_table():
  """He et al.'s table of the layers, by hand: multiply-adds of each convolution."""
  stem = 112 * 112 * 7 * 7 * 3 * 64
  total = stem + 2048 * 1000
  inputs = 64
  for stage, (blocks, side) in enumerate(zip((3, 4, 6, 3), (56, 28, 14, 7), strict=True)):
    filters = 64 * 2**stage
    for block in range(blocks):
      # The first 1×1 works before the stride of the 3×3.
      before = 2 * side if stage and not block else side
      total += before**2 * inputs * filters + side**2 * (9 * filters**2 + 4 * filters**2)
      if not block:
        total += side**2 * inputs * 4 * filters
      inputs = 4 * filters
  assert total == 4_089_184_256
  work = step.count_work(_RECIPE)
  assert work == {"flops": 2 * (3 * total - stem), "parameters": 25_557_032}


def test_a_contenders_options_go_where_they_belong():
  contender = step.parse_contender(
    "ours:workers=8:workers_per_pass=2:jit_compile=true:dtype=bfloat16:TF_X=0:tasks=4",
    _RECIPE.to_dict(),
    {"workers_per_pass": None, "bytes_per_pack": 0},
  )
  assert contender.kind == "ours" and contender.tasks == 4
  assert Recipe(**contender.recipe).workers == 8 and contender.recipe["dtype"] == "bfloat16"
  assert contender.recipe["image_size"] == 224 and contender.environment == {"TF_X": "0"}
  assert contender.step_options == {"workers_per_pass": 2, "bytes_per_pack": 0, "jit_compile": True}


@pytest.mark.parametrize(
  "text, culprit",
  [
    ("theirs", "theirs"),
    ("ours:speed=2", "speed=2"),
    ("ours:workers=0", "workers"),
    ("ours:dtype=int8", "int8"),
    ("ours:workers=8:tasks=3", "tasks=3"),
    ("ours:tasks=x", "tasks=x"),
    ("ours:cores=0", "cores=0"),
    ("ours:cores=10000", "cores=10000"),
    ("keras:dtype=float64", "float64"),
    ("keras:tasks=2", "ours alone"),
    ("torch:network=resnet20", "resnet50"),
  ],
)
def test_bad_contenders_are_refused(text, culprit):
  with pytest.raises(UserError, match=culprit):
    step.parse_contender(text, _RECIPE.to_dict(), {})


def test_ratios_are_of_medians_of_images_a_second():
  fast = step.parse_contender("ours", _RECIPE.to_dict(), {})
  slow = step.parse_contender("keras:workers=1:dtype=bfloat16", _RECIPE.to_dict(), {})

  def found(*seconds):
    turns = [{"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": 5} for s in seconds]
    return {"ready": {"passes": 2}, "turns": turns}

  in_float32, in_bfloat16 = (step.ceiling_of(contender).name for contender in (fast, slow))
  assert in_float32 != in_bfloat16
  results = {
    "ours": found(8, 4, 40),
    slow.name: found(8, 8, 2),
    in_float32: found(2, 1, 9),
    in_bfloat16: found(3, 4, 8),
  }
  work = {"ours": {"flops": 10, "parameters": 7}, slow.name: {"flops": 20, "parameters": 1}}
  summary = step.summarize([fast, slow], results, 2, work)
  ours, keras = summary["contenders"].values()
  # Two steps a turn: medians of 4 s and 4 s a step, of 64 and of 32 images.
  assert ours["images_per_second"] == 16 and keras["images_per_second"] == 8
  assert (ours["ratio"], keras["ratio"]) == (1, 2)
  assert ours["flops_per_second"] == 160 and ours["cpu_seconds"] == 8
  # Eight products of two 2048 × 2048 matrices a step.
  assert summary["ceilings_flops_per_second"] == {
    in_float32: 8 * 2 * 2048**3,
    in_bfloat16: 4 * 2 * 2048**3,
  }
  assert ours["gradient_bytes"] == 28
  assert ours["share_of_ceiling"] == 160 / (16 * 2048**3)
  assert keras["share_of_ceiling"] == 160 / (8 * 2048**3)


def test_a_real_run(tmp_path):
  path = tmp_path / "step.json"
  process = run_module(
    "tools.benchmark.step",
    *("--network=resnet8", "--image_size=8", "--per_worker_batch_size=2", "--turns=2"),
    *("--contenders=ours:workers=2:tasks=2,loop,keras:workers=2", f"--json={path}", "--profile"),
    timeout=240,
  )
  assert process.returncode == 0, process.stderr
  found = json.loads(path.read_text())
  rows = found["contenders"]
  assert list(rows) == ["ours:workers=2:tasks=2", "loop", "keras:workers=2"]
  assert [row["passes"] for row in rows.values()] == [1, 1, 2]
  for row in rows.values():
    assert any("Conv2DBackpropFilter" in name for name in row["operations"])
    assert "Process" not in row["operations"]  # It runs the operations, and is none.
    assert len(row["step_seconds_each"]) == 2
    assert row["images_per_second"] == 2 * row["workers"] / row["step_seconds"]
    assert 0 < row["share_of_ceiling"] < 1 and row["peak_bytes"] > 2**27
  assert 0.2 < rows["loop"]["share_within_steps"] < 1
  assert 0.2 < rows["loop"]["share_of_bare_step"] < 5
  assert "share_of_bare_step" not in rows["keras:workers=2"]
  assert found["versions"]["tensorflow"]
  assert process.stdout.splitlines()[-1].startswith("ceiling: ")


@pytest.mark.parametrize(
  "argument, said",
  [
    ("--contenders=theirs", "--contenders=theirs"),
    ("torch", "Unexpected argument 'torch'"),
    ("--json=nowhere/step.json", "--json=nowhere/step.json: there is no such directory"),
  ],
)
def test_a_users_mistake_gets_one_line(argument, said):
  process = run_module("tools.benchmark.step", argument)
  assert process.returncode == 1
  assert process.stderr.startswith(f"error: {said}") and process.stderr.count("\n") == 1
