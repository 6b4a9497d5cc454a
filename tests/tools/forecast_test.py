"""The forecast against formulas stated anew, the real networks, and its own two ways."""

import functools
import json
import math

import keras
import pytest

from tests.launching import run_module
from tf_largebatch.models import resnet
from tools import forecast

CLOSE = functools.partial(pytest.approx, rel=1e-12, abs=1e-15)
B, LATENCY, BANDWIDTH = 3e6, 7e-5, 2e9
CLUSTER = forecast.Cluster(
  gpus_per_server=8,
  server_bandwidth=3e10,
  server_latency=4e-6,
  network_bandwidth=BANDWIDTH,
  network_latency=LATENCY,
  algorithm="ring",
)


def make_step(**values):
  defaults = {"seconds": 0.3, "backward_seconds": 0.2, "images": 32, "layers": [(B, 0.25)] * 4}
  return forecast.Step(**{**defaults, "jitter": 0, "overlap": True, "bytes_per_pack": 1, **values})


def cluster(**values):
  return forecast.dataclasses.replace(CLUSTER, **values)


@pytest.mark.parametrize(
  "algorithm, peers, messages, sizes",
  [
    ("ring", 2, 2, 1),
    ("ring", 10, 18, 1.8),
    ("tree", 2, 2, 2),
    ("tree", 44, 10, 2),  # 32 <= 44 < 64.
    ("halving_doubling", 2, 2, 1),
    ("halving_doubling", 64, 12, 2 * 63 / 64),
    # Each sum is one way; a larger block's own halving is shorter in all of these.
    ("halving_doubling", 3, 2 * (0 + 2), 2 * (0 + 1)),
    ("halving_doubling", 10, 2 * (1 + 4), 2 * (1 / 2 + 1 / 2)),
    ("halving_doubling", 44, 2 * (2 + 2 + 4), 2 * (3 / 4 + 1 / 4 + 1 / 8)),
    # 64 + 2 as 2 + 1, the block of 64 being done after 6 messages, that of 2 after 33.
    ("halving_doubling", 66, 2 * (1 + 32), 2 * (1 / 2 + 1 / 2)),
  ],
)
def test_cost_of_an_allreduce(algorithm, peers, messages, sizes):
  seconds = forecast.ALGORITHMS[algorithm](B, peers, LATENCY, BANDWIDTH)
  assert seconds == CLOSE(messages * LATENCY + sizes * B / BANDWIDTH)


@pytest.mark.parametrize("algorithm", forecast.ALGORITHMS)
def test_no_allreduce_beats_the_bounds(algorithm):
  """Each peer sends 2 (p - 1)/p of the bytes, and hears of all others in log2 p messages."""
  cost = forecast.ALGORITHMS[algorithm]
  assert cost(B, 1, LATENCY, BANDWIDTH) == 0
  for peers in range(2, 200):
    assert cost(B, peers, 0, BANDWIDTH) >= 2 * (peers - 1) / peers * B / BANDWIDTH * (1 - 1e-12)
    assert cost(0, peers, LATENCY, BANDWIDTH) >= 2 * math.floor(math.log2(peers)) * LATENCY


def test_servers_and_the_network_between_them():
  within = 2 * (7 * 4e-6 + B / 3e10)
  between = {name: cost(B, 44, LATENCY, BANDWIDTH) for name, cost in forecast.ALGORITHMS.items()}
  for name, seconds in between.items():
    assert cluster(algorithm=name).allreduce(B, 352) == CLOSE(within + seconds)
  assert cluster(algorithm="auto").allreduce(B, 352) == CLOSE(within + min(between.values()))
  assert CLUSTER.allreduce(B, 4) == CLOSE(6 * 4e-6 + 1.5 * B / 3e10)
  assert CLUSTER.allreduce(B, 1) == 0
  alone = cluster(gpus_per_server=1)
  assert alone.allreduce(B, 5) == CLOSE(8 * LATENCY + 1.6 * B / BANDWIDTH)


@pytest.mark.parametrize(
  "count, expected",
  [
    (1, 0),
    (2, 1 / math.sqrt(math.pi)),
    (3, 3 / (2 * math.sqrt(math.pi))),
    (4, 3 / (2 * math.sqrt(math.pi)) * (1 + 2 / math.pi * math.asin(1 / 3))),
    (5, 5 / (4 * math.sqrt(math.pi)) * (1 + 6 / math.pi * math.asin(1 / 3))),
  ],
)
def test_expected_maximum_of_normals(count, expected):
  """The closed forms there are (David and Nagaraja 2003, §3.2)."""
  assert forecast.expected_maximum(count) == CLOSE(expected)


def test_expected_maximum_of_many():
  """E[max] = ∫ (1 - Φ(x)^p) over x > 0 less ∫ Φ(x)^p over x < 0, as a sum."""
  for count in (44, 1250):
    xs = [i / 1000 for i in range(-10_000, 10_001)]
    tail = [(x > 0) - (0.5 * math.erfc(-x / math.sqrt(2))) ** count for x in xs]
    tail[10_000] += 0.5  # The jump at 0 is shared between both sides.
    assert forecast.expected_maximum(count) == pytest.approx(sum(tail) / 1000, rel=1e-9)


def test_what_backprop_hides():
  """Four equal layers, ready every 0.05 s; c seconds for each."""
  gpus = 16
  quick, slow = cluster(network_bandwidth=1e10), cluster(network_bandwidth=1e7)
  c, late = (link.allreduce(B, gpus) for link in (quick, slow))
  assert c < 0.05 < late
  assert make_step().exposed(quick, gpus) == CLOSE(c)  # Of the first layer, ready last.
  assert make_step().exposed(slow, gpus) == CLOSE(0.05 + 4 * late - 0.2)
  # Three layers, then the one that is left.
  packs = quick.allreduce(B, gpus), slow.allreduce(3 * B, gpus) + slow.allreduce(B, gpus)
  assert make_step(bytes_per_pack=2.5 * B).exposed(quick, gpus) == CLOSE(packs[0])
  assert make_step(bytes_per_pack=2.5 * B).exposed(slow, gpus) == CLOSE(0.15 + packs[1] - 0.2)
  whole = quick.allreduce(4 * B, gpus)
  assert make_step(bytes_per_pack=0).exposed(quick, gpus) == CLOSE(whole)
  assert make_step(overlap=False).exposed(quick, gpus) == CLOSE(whole)
  # The last layer is ready first; unequal ones tell the order.
  uneven = make_step(layers=[(1e3, 0.9), (B, 0.1)])
  assert uneven.exposed(quick, gpus) == CLOSE(quick.allreduce(1e3, gpus))


def test_an_iteration_waits_for_the_slowest_server():
  step = make_step(jitter=0.05)
  exposed = step.exposed(CLUSTER, 16)
  assert step.iteration(CLUSTER, 16) == CLOSE(0.3 * (1 + 0.05 / math.sqrt(math.pi)) + exposed)
  assert step.iteration(CLUSTER, 8) == CLOSE(0.3 + step.exposed(CLUSTER, 8))


def test_needed_bandwidth():
  """Of a ring of servers of one GPU with nothing hidden, in closed form."""
  step, alone = make_step(overlap=False), cluster(gpus_per_server=1)
  for gpus in (2, 20):
    left = 0.01 * 0.3 - 2 * (gpus - 1) * LATENCY
    expected = 2 * (gpus - 1) / gpus * 4 * B / left * 8 / 1e9 * 1.2
    assert forecast.needed_gigabits(step, alone, gpus, 1.2) == CLOSE(expected)
  # The latencies alone take 0.0030 s.
  assert forecast.needed_gigabits(step, alone, 23, 1.2) is None


@pytest.mark.parametrize("network, parameters", [("resnet50", 25_557_032), ("resnet20", 269_722)])
def test_layers_are_those_of_the_network(network, parameters):
  side, classes = (224, 1000) if network == "resnet50" else (32, 10)
  model = resnet.build(
    network,
    resnet.Layers(keras.layers.BatchNormalization),
    input_shape=(side, side, 3),
    num_classes=classes,
    channel_mean=(0, 0, 0),
    channel_std=(1, 1, 1),
  )
  expected = []
  for layer in model.layers:
    if isinstance(layer, keras.layers.Conv2D):
      weights, (_, height, width, filters) = math.prod(layer.kernel.shape), layer.output.shape
      expected.append((weights + 2 * filters, weights * height * width))
  *convolutions, dense = forecast.network_layers(network, side)
  assert sorted(convolutions) == sorted(expected)
  assert convolutions[0] == expected[0]
  kernel, bias = model.layers[-1].get_weights()
  assert dense == (kernel.size + bias.size, kernel.size)
  assert sum(count for count, _ in (*convolutions, dense)) == parameters
  layers = forecast.gradient_layers(network, side, 1e8)
  assert sum(size for size, _ in layers) == CLOSE(1e8)
  assert sum(share for _, share in layers) == CLOSE(1)
  assert forecast.gradient_layers(network, side, None)[-1][0] == 4 * dense[0]


def test_fit():
  sizes, latency, bandwidth = (1e3, 1e5, 1e7), 3e-4, 5e8
  seconds = [2 * 3 * (latency + size / 4 / bandwidth) for size in sizes]
  found = forecast.fit([(b, t, 4) for b, t in zip(sizes, seconds, strict=True)])
  assert found["latency_seconds"] == pytest.approx(latency, rel=1e-9)
  assert found["bandwidth_bytes_per_second"] == pytest.approx(bandwidth, rel=1e-9)
  assert found["worst_relative_error"] < 1e-9
  # One latency for times t and 3t of the same tiny size: Σ (a/t - 1)² is least at a = 1.2 t.
  found = forecast.fit([(1e-20, 1.0, 2), (1e-20, 3.0, 2), (1e12, 1e9, 2)])
  assert found["latency_seconds"] == pytest.approx(0.6, rel=1e-6)
  assert found["worst_relative_error"] == pytest.approx(0.6, rel=1e-6)
  assert found["median_relative_error"] == pytest.approx(0.2, rel=1e-6)
  # Times that grow faster than the bytes leave no latency.
  assert forecast.fit([(1e3, 1e-7, 2), (1e6, 1e-3, 2)])["latency_seconds"] == 0


def run(*arguments):
  finished = run_module("tools.forecast", "--json", *arguments)
  assert finished.returncode == 0, finished.stderr
  return json.loads(finished.stdout)


def measured_files(tmp_path, **changes):
  """A replica of two workers of 16 images; a ring of 1 ms and 100 MB/s between two tasks."""
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
  # 0.2 s a worker, eight workers, two cores; 2 (t - 1) messages, of a t-th of 1 MB.
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
  # Each number of tasks has the ring that was measured with as many.
  assert first["allreduce_seconds"] == pytest.approx(0.012, rel=1e-9)
  assert second["allreduce_seconds"] == pytest.approx(1, rel=1e-9)
  ratio = first["iteration_seconds"] / second["iteration_seconds"]
  assert (first["efficiency"], second["efficiency"]) == CLOSE((1, ratio / 2))


def test_from_measured_files(tmp_path):
  each = [0.36, 0.4, 0.44, 9.0, 0.3]  # Quarters at 0.36, 0.4, 0.44; 0.08 is 1.349 deviations.
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
  # Of a step of 4 s, 40 ms may show; what was measured needs no protocol's overhead.
  found = run(*measured_files(tmp_path, step_seconds=4, gradient_bytes=1e8), *flags)
  expected = 1.5 * 1e8 * 8 / (0.04 - 0.006) / 1e9
  assert found["network_gigabits_needed_there"] == pytest.approx(expected, rel=1e-9)
  # Of two passes only the last one's backprop hides anything, and both workers may go in one.
  link = cluster(gpus_per_server=1, network_latency=1e-3, network_bandwidth=1e8)
  layers = forecast.gradient_layers("resnet20", 32, 1e6)
  for passes in (1, 2):
    files = measured_files(tmp_path, passes=passes)
    found = run(*files, *flags, "--overlap=backprop", "--bytes_per_pack=1")
    exposed = make_step(layers=layers, backward_seconds=0.4 / passes * 2 / 3).exposed(link, 4)
    assert found["rows"][1]["exposed_seconds"] == pytest.approx(exposed, rel=1e-9)
  # Means of 25 steps scatter by a fifth of what one does.
  found = run(*measured_files(tmp_path, step_seconds_each=each, steps=25), *flags)
  assert found["step_jitter"] == pytest.approx(5 * jitter, rel=1e-9)


def test_paper_is_the_same_model(tmp_path):
  """What --paper predicts, flags for its inputs predict, and errors are relative to the paper's."""
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
    rel = 1e-3 if kind == fitted else 1e-9  # The jitter is named with four digits.
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
    (["--gpus=8,256"], "exposed at 8 GPUs first; no network, however fast, would hide it there."),
    (
      ["--gpus=8,16", "--overlap=backprop", "--bytes_per_pack=1"],
      "Nowhere is over 1 % of a step exposed.",
    ),
    # A ring of 2 with no latency: 100 MB each way in 1 % of a step.
    (
      ["--gpus=1,2", "--gpus_per_server=1", "--network_latency=0", "--network_overhead=1"],
      f"exposed at 2 GPUs first; a network of {8e8 / 0.0018 / 1e9:.4g} Gbit/s would hide it there.",
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
    (("--step_seconds=1", "--gpus=0"), "gpus=0 is refused"),
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
  """Its all-reduce would count twice, and each GPU for all of them."""
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
    ("link", '{"points": [], "replicas": 1, "tasks": 1}', "take two or more"),
    ("link", '{"points": [], "replicas": 16, "tasks": 2}', "one replica a task"),
    ("link", '{"points": 5, "replicas": 2}', "with a list 'points'"),
  ],
)
def test_damaged_files_are_refused(tmp_path, name, text, expected):
  files = measured_files(tmp_path)
  (tmp_path / f"{name}.json").write_text(text)
  finished = run_module("tools.forecast", *files)
  assert finished.returncode == 1 and finished.stderr.startswith("error: ")
  assert expected in finished.stderr and finished.stderr.count("\n") == 1
