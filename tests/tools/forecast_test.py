"""Tests of `tools.forecast` as a program, on measured files and against itself."""

import json
import math

import pytest

from tests.launching import run_module, run_program
from tests.tools.forecasting.examples import CLOSE, make_cluster, make_step
from tools.forecasting.layers import gradient_layers


def run(*arguments):
  finished = run_module("tools.forecast", "--json", *arguments)
  assert finished.returncode == 0, finished.stderr
  return json.loads(finished.stdout)


def measured_files(tmp_path, **changes):
  """Writes the step of two workers of 16 images, and a ring of 1 ms and 100 MB/s."""
  step = {"network": "resnet20", "image_size": 32, "per_worker_batch_size": 16, "workers": 2}
  step |= {"dtype": "float32", "gradient_bytes": 1e6, "step_seconds": 0.4}
  step |= {"step_seconds_each": [0.4, 0.4, 0.4], "steps": 1, "passes": 2, "tasks": 1, **changes}
  points = [{"bytes": b, "seconds": 2e-3 + b / 1e8} for b in (1e3, 1e6, 1e7)]
  link = {"communication": "ring", "tasks": 2, "replicas": 2, "points": points}
  for name, value in (("step", step), ("link", link)):
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
  return f"--measured={tmp_path}/step.json", f"--allreduce={tmp_path}/link.json"


def test_tasks_on_this_machine(tmp_path):
  found = run(*measured_files(tmp_path), "--tasks=1,2,4", "--cores=2", "--workers=8")
  # 0.2 s per worker, eight workers, two cores; 2 (t - 1) messages of a t-th of 1 MB.
  expected = [1.6, 0.8 + 0.002 + 0.01, 0.8 + 0.006 + 0.015]
  rows = found["rows"]
  assert [row["iteration_seconds"] for row in rows] == pytest.approx(expected, rel=1e-9)
  assert [row["speedup"] for row in rows] == pytest.approx([1.6 / t for t in expected], rel=1e-9)
  assert rows[2]["efficiency"] == pytest.approx(1.6 / expected[2] / 4, rel=1e-9)
  assert rows[1]["images_per_second"] == pytest.approx(8 * 16 / expected[1], rel=1e-9)

  flags = ("--tasks=2,4", "--cores=2", "--workers=8", "--step_jitter=0.1")
  link = {"points": [{"bytes": b, "seconds": b / 1e6} for b in (1e3, 1e6)]}
  link |= {"replicas": 4, "tasks": 4}
  (tmp_path / "four.json").write_text(json.dumps(link))
  step, two = measured_files(tmp_path)
  first, second = run(step, f"{two},{tmp_path}/four.json", *flags)["rows"]
  assert first["wait_seconds"] == pytest.approx(0.8 * 0.1 / math.sqrt(math.pi), rel=1e-9)
  # Each number of tasks uses the ring measured with that number.
  assert first["allreduce_seconds"] == pytest.approx(0.012, rel=1e-9)
  assert second["allreduce_seconds"] == pytest.approx(1, rel=1e-9)
  ratio = first["iteration_seconds"] / second["iteration_seconds"]
  assert (first["efficiency"], second["efficiency"]) == CLOSE((1, ratio / 2))


def test_from_measured_files(tmp_path):
  each = [0.36, 0.4, 0.44, 9.0, 0.3]  # Quartiles 0.36, 0.4, 0.44; 0.08 is 1.349 deviations.
  files = measured_files(tmp_path, step_seconds_each=each)
  flags = ("--gpus=1,4", "--gpus_per_server=1", "--algorithm=ring")
  found = run(*files, *flags, "--epochs=2", "--epoch_examples=6400")
  jitter = 0.08 / 0.4 / 1.3489795003921634
  wait = jitter * 3 / (2 * math.sqrt(math.pi)) * (1 + 2 / math.pi * math.asin(1 / 3))
  seconds = 0.4 * (1 + wait) + 6 * (1e-3 + 1e6 / 4 / 1e8)
  one, four = found["rows"]
  assert (one["iteration_seconds"], one["growth"], one["efficiency"]) == (0.4, 0, 1)
  assert four["iteration_seconds"] == pytest.approx(seconds, rel=1e-9)
  assert four["hours"] == pytest.approx(12_800 / (4 * 32) * seconds / 3600, rel=1e-9)
  assert four["efficiency"] == pytest.approx(0.4 / seconds, rel=1e-9)
  assert found["first_gpus_with_over_1_percent_exposed"] == 4
  assert found["network_gigabits_needed_there"] is None  # Six messages take more than 4 ms.
  # In a step of 4 s, 40 ms may be exposed; a measured bandwidth includes the overhead.
  found = run(*measured_files(tmp_path, step_seconds=4, gradient_bytes=1e8), *flags)
  expected = 1.5 * 1e8 * 8 / (0.04 - 0.006) / 1e9
  assert found["network_gigabits_needed_there"] == pytest.approx(expected, rel=1e-9)
  # Only the backprop of the last pass hides anything; two workers take one pass or two.
  link = make_cluster(gpus_per_server=1, network_latency=1e-3, network_bandwidth=1e8)
  layers = gradient_layers("resnet20", 32, 1e6)
  for passes in (1, 2):
    files = measured_files(tmp_path, passes=passes)
    found = run(*files, *flags, "--overlap=backprop", "--bytes_per_pack=1")
    exposed = make_step(layers=layers, backward_seconds=0.4 / passes * 2 / 3).exposed(link, 4)
    assert found["rows"][1]["exposed_seconds"] == pytest.approx(exposed, rel=1e-9)
  # Means of 25 steps scatter a fifth as much as single steps.
  found = run(*measured_files(tmp_path, step_seconds_each=each, steps=25), *flags)
  assert found["step_jitter"] == pytest.approx(5 * jitter, rel=1e-9)


def test_paper_is_the_same_model(tmp_path):
  """Flags for the paper's inputs predict what --paper does; errors are relative to the paper's."""
  rows = {row["what"]: row for row in run("--paper")["rows"]}
  names = ("growth from 8 to 352 GPUs, %", "efficiency at 256 GPUs, %")
  inputs = ["--step_seconds=0.18", "--gradient_bytes=1e8", "--algorithm=halving_doubling"]
  inputs += ["--gpus=8,256,352"]
  fitted = next(what for what in rows if "fitted to" in what).split(":")[0]
  kinds = {
    "nothing fitted": ["--overlap=backprop", "--bytes_per_pack=1"],
    "nothing fitted, nothing hidden": [],
    fitted: ["--overlap=backprop", "--bytes_per_pack=1", f"--step_jitter={fitted.split()[2]}"],
  }
  for kind, flags in kinds.items():
    _, at_256, at_352 = run(*inputs, *flags)["rows"]
    growth, efficiency = (rows[f"{kind}: {name}"] for name in names)
    rel = 1e-3 if kind == fitted else 1e-9  # The name shows the jitter to four digits.
    assert growth["predicted"] == pytest.approx(100 * at_352["growth"], rel=rel)
    assert efficiency["predicted"] == pytest.approx(100 * at_256["efficiency"], rel=rel)
    assert efficiency["relative_error"] == CLOSE(efficiency["predicted"] / 90 - 1)
    hours = rows[f"{kind}: hours of 90 epochs at 256 GPUs"]
    assert hours["predicted"] == pytest.approx(at_256["hours"], rel=rel)
  assert rows[f"{fitted}: {names[0]}"]["predicted"] == pytest.approx(12, rel=1e-9)
  # Latencies that explain more than the growth leave nothing to fit.
  slow = run("--paper", "--network_latency=1e-4")["rows"]
  assert len(slow) == len(rows) - 3 and slow[3]["predicted"] > 12
  peak = next(row for what, row in rows.items() if what.startswith("peak"))
  assert peak["predicted"] == CLOSE(2 * 800 / 120) and peak["paper"] == 12.8


@pytest.mark.parametrize(
  "flags, last",
  [
    (["--gpus=8,256"], "first exposed at 8 GPUs; no network, however fast, would hide it there."),
    (
      ["--gpus=8,16", "--overlap=backprop", "--bytes_per_pack=1"],
      "Over 1 % of a step is exposed nowhere.",
    ),
    # A ring of 2 with no latency: 100 MB each way in 1 % of a step.
    (
      ["--gpus=1,2", "--gpus_per_server=1", "--network_latency=0", "--network_overhead=1"],
      f"first exposed at 2 GPUs; a network of {8e8 / 0.0018 / 1e9:.4g} Gbit/s would hide it there.",
    ),
  ],
)
def test_table_says_where_communication_shows(flags, last):
  finished = run_module(
    "tools.forecast", "--step_seconds=0.18", "--gradient_bytes=1e8", "--algorithm=ring", *flags
  )
  header, *rows, _, said = finished.stdout.splitlines()
  assert header.split()[:2] == ["gpus", "iteration_seconds"]
  assert [row.split()[0] for row in rows] == flags[0].removeprefix("--gpus=").split(",")
  assert said.endswith(last)


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ((), "Give --measured=FILE"),
    (("--measured=nowhere.json",), "nowhere.json cannot be read"),
    (("--step_seconds=-1",), "step_seconds=-1.0 is refused"),
    (("--step_seconds=nan",), "step_seconds=nan is refused"),
    (("--step_seconds=1", "--network_gigabits=inf"), "network_gigabits=inf is refused"),
    (("--step_seconds=1", "--step_jitter=-0.1"), "step_jitter=-0.1 is refused"),
    (("--step_seconds=1", "--backward_share=1.5"), "backward_share=1.5 is refused"),
    (("--step_seconds=1", "--gpus=8,x"), "gpus='8,x' is refused"),
    (("--step_seconds=1", "--gpus="), "gpus='' is refused"),
    (("--step_seconds=1", "--gpus=0"), "gpus='0' is refused"),
    (("--step_seconds=1", "--gpus=12"), "gpus=12 must be a multiple"),
    (("--step_seconds=1", "--tasks=2"), "--allreduce=FILE must have points"),
    (("--step_seconds=1", "--tasks=1,3"), "--allreduce=FILE must have points"),
    (("--step_seconds=1", "extra"), "Unexpected argument 'extra'"),
  ],
)
def test_refused_in_one_line(arguments, expected):
  finished = run_module("tools.forecast", *arguments)
  assert finished.returncode == 1
  assert finished.stderr.startswith(f"error: {expected}"), finished.stderr
  assert finished.stderr.count("\n") == 1 and not finished.stdout


def test_a_step_of_several_tasks_is_refused(tmp_path):
  """Its all-reduce would count twice."""
  finished = run_module("tools.forecast", *measured_files(tmp_path, tasks=2))
  assert finished.returncode == 1
  assert "holds the step of 2 tasks" in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "name, text, expected",
  [
    ("step", "{", "step.json cannot be read as JSON"),
    ("step", "[]", "must hold a JSON object"),
    ("step", '{"step_seconds_each": [1], "image_size": 8.5}', "image_size=8.5 is refused"),
    ("link", '{"points": [{}], "replicas": 2, "tasks": 2}', "bytes=None is refused"),
    ("link", '{"points": [{"bytes": 8, "seconds": NaN}], "replicas": 2, "tasks": 2}', "=nan is"),
    ("link", '{"points": [], "replicas": 2, "tasks": 2}', "must have points of at least two"),
    ("link", '{"points": [], "replicas": 1, "tasks": 1}', "use two or more"),
    ("link", '{"points": [], "replicas": 16, "tasks": 2}', "one replica per task"),
    ("link", '{"points": 5, "replicas": 2}', "with a list 'points'"),
  ],
)
def test_damaged_files_are_refused(tmp_path, name, text, expected):
  files = measured_files(tmp_path)
  (tmp_path / f"{name}.json").write_text(text)
  finished = run_module("tools.forecast", *files)
  assert finished.returncode == 1 and finished.stderr.startswith("error: ")
  assert expected in finished.stderr and finished.stderr.count("\n") == 1


def test_it_starts_without_tensorflow():
  loaded = run_program(
    "import json, sys; from tools import forecast; print(json.dumps(sorted(sys.modules)))"
  )
  assert "tools.forecasting.model" in loaded and "tensorflow" not in loaded
