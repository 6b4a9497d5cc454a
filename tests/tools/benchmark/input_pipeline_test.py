"""The input benchmark: its figures, its program, and that nothing is left when it is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.launching import ROOT, run_module
from tests.tools.benchmark import photographs
from tools.benchmark import input_pipeline
from tools.benchmark.readers.pixels import DECODERS, compare_pixels

_MODULE = "tools.benchmark.input_pipeline"

pytestmark = pytest.mark.xdist_group("benchmark_input")  # One process prepares the data for all.


def _report(images, seconds, cpu_seconds, others_seconds=0.0):
  return {
    "images": images,
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "others_seconds": others_seconds,
  }


def test_medians_spread_and_ratios():
  results = {
    "ours": [_report(640, 2.0, 4.0), _report(1000, 2.0, 4.0, 0.5), _report(800, 2.0, 3.2)],
    "pillow": [_report(200, 2.0, 4.0), _report(100, 2.0, 4.0), _report(360, 2.0, 3.6)],
    "dali": [{"missing": "No module; pip install it"}],
  }
  rows = input_pipeline.summarize(results, 4, "ours")
  assert rows["ours"] == {
    "images_per_second": 400.0,
    "min": 320.0,
    "max": 500.0,
    "images_per_second_each": [320.0, 500.0, 400.0],
    "images_per_second_per_core": 100.0,
    "cpu_ms_per_image": 4.0,
    "cores_used_by_others": 0.25,
    "ratio": 1.0,
  }
  assert rows["pillow"]["ratio"] == pytest.approx(4.0)
  assert rows["pillow"]["cpu_ms_per_image"] == pytest.approx(20.0)
  assert rows["dali"] == {"missing": "No module; pip install it"}
  table = input_pipeline.to_table(rows, "reader")
  assert len(table) == 4
  assert re.fullmatch(r"reader +images/s +\[min–max\] +per core +CPU ms/image +ours/this", table[0])
  assert re.fullmatch(r"ours +400 +\[320–500\] +100 +4\.00 +1\.00", table[1])
  assert re.fullmatch(r"pillow +100 +\[50–180\] +25 +20\.00 +4\.00", table[2])
  assert re.fullmatch(r"dali +not measured: No module; pip install it", table[3])


def test_without_ours_there_is_no_ratio():
  rows = input_pipeline.summarize({"pillow": [_report(200, 2.0, 4.0)]}, 2, "ours")
  assert rows["pillow"]["ratio"] is None
  assert input_pipeline.to_table(rows, "reader")[1].endswith("–")


def test_each_repeat_starts_with_another_reader(monkeypatch):
  requested = []

  def run_alone(job, task, arguments):
    requested.append(arguments["reader"])
    if arguments["reader"] == "dali":
      return {"missing": "gone"}
    return _report(len(requested), 1.0, 1.0)

  monkeypatch.setattr(input_pipeline, "run_alone", run_alone)
  tasks = {name: (name, None) for name in ("ours", "pillow", "dali")}
  results = input_pipeline.measure(tasks, input_pipeline.Timing(3, 0.0, 1.0))
  # A missing reader is tried once.
  assert requested == ["ours", "pillow", "dali", "pillow", "ours", "ours", "pillow"]
  assert [report["images"] for report in results["ours"]] == [1, 5, 6]
  assert results["dali"] == [{"missing": "gone"}]


def test_the_program_prints_a_table_and_writes_json(tmp_path):
  output, temporary = tmp_path / "report.json", tmp_path / "temporary"
  temporary.mkdir()
  run = run_module(
    _MODULE,
    *(f"--data_dir={photographs.data_dir()}", "--dataset=tiny_photographs", "--repeats=1"),
    *("--seconds=0.2", "--warm_up=0", "--cores=1", "--readers=ours,pillow", f"--json={output}"),
    env={**os.environ, "TMPDIR": str(temporary)},
    timeout=200,
  )
  assert run.returncode == 0, run.stderr
  assert list(temporary.iterdir()) == []
  head, ours, pillow, where, *_ = run.stdout.splitlines()  # A note on other processes may follow.
  assert head.startswith("reader") and ours.startswith("ours") and pillow.startswith("pillow")
  assert where.startswith("1 repeats of 0.2 s on 1 of ")
  assert "tiny_photographs train, 80 JPEGs" in where
  report = json.loads(output.read_text())
  assert set(report) == {"task", "hardware", "versions", "readers"}
  assert report["task"]["examples"] == photographs.COUNT and report["task"]["cores"] == 1
  assert report["task"]["decoder"]["dct_method"].startswith("INTEGER_")
  assert {"python", "tensorflow", "pillow"} <= set(report["versions"])
  assert list(report["readers"]) == ["ours", "pillow"]
  rows = report["readers"]
  for row in rows.values():
    assert row["images_per_second"] > 0 and row["cpu_ms_per_image"] > 0
    assert row["images_per_second_each"] == [row["images_per_second"]]
  expected = rows["ours"]["images_per_second"] / rows["pillow"]["images_per_second"]
  assert rows["pillow"]["ratio"] == pytest.approx(expected)


def test_decoders_are_measured_and_compared(monkeypatch):
  def run_here(job, task, arguments):
    jobs = {"compare_pixels": compare_pixels, "time_reader": time_reader}
    return jobs[job](task, **arguments)

  def time_reader(task, reader, warm_up, seconds):
    decoders.append(task.decoder)
    return _report(100 * len(decoders), 1.0, 1.0)

  decoders = []
  monkeypatch.setattr(input_pipeline, "run_alone", run_here)
  timing = input_pipeline.Timing(repeats=1, warm_up=0.0, seconds=1.0)
  rows = input_pipeline.benchmark_decoders(photographs.task(), 3, timing)
  assert decoders == list(DECODERS.values())
  assert [row["images_per_second"] for row in rows.values()] == [100, 200, 300, 400]
  head, *lines = input_pipeline.to_table(rows, "decoder")
  assert re.search(r"CPU ms/image +decoded \|Δ\| +Δ +max +resized \|Δ\| +Δ +max$", head)
  for row, line in zip(rows.values(), lines, strict=True):
    found = [row["pixels"][stage] for stage in ("decoded", "resized")]
    last = [f"{x['mean']:.3f} {x['bias']:+.3f} {x['max']}" for x in found]
    assert " ".join(line.split()).endswith(" ".join(last))


@pytest.mark.parametrize(
  "flags, expected",
  [
    (["--readers=ours,dalli"], "--readers=dalli: unknown; use some of ours, ours skip"),
    (["--readers="], "--readers=: unknown"),
    (["--cores=4096"], "--cores=4096: only "),
    (["--json=/nowhere/report.json"], "--json=/nowhere/report.json cannot be written"),
    (["ours"], "Unexpected argument 'ours'"),
    ([], "imagenet2012 is not prepared in "),
  ],
)
def test_a_users_mistake_gets_one_line(flags, expected):
  run = run_module(_MODULE, f"--data_dir={photographs.data_dir()}", *flags)
  assert (run.returncode, run.stdout) == (1, "")
  assert run.stderr.startswith(f"error: {expected}") and run.stderr.count("\n") == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_stopped(tmp_path, stop):
  cores = len(os.sched_getaffinity(0))
  flags = (f"--data_dir={photographs.data_dir()}", "--dataset=tiny_photographs", "--readers=pillow")
  program = subprocess.Popen(
    [sys.executable, "-m", _MODULE, *flags, "--seconds=100"],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "TMPDIR": str(tmp_path)},
  )
  try:
    started = []
    deadline = time.monotonic() + 60
    # The reader's process and those that it starts.
    while len(started) < 1 + cores:
      assert time.monotonic() < deadline and program.poll() is None
      started = psutil.Process(program.pid).children(recursive=True)
      time.sleep(0.05)
    program.send_signal(stop)
    _, errors = program.communicate(timeout=20)
  finally:
    program.kill()
  assert program.returncode == (-stop if stop == signal.SIGKILL else 128 + stop)
  assert errors == ""
  psutil.wait_procs(started, timeout=10)
  left = [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
  assert left == []
  if stop != signal.SIGKILL:
    assert list(tmp_path.iterdir()) == []
