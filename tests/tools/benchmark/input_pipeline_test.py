"""Tests of `tools.benchmark.input_pipeline`, on tiny JPEGs of one colour each."""

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.launching import ROOT
from tf_largebatch.errors import UserError
from tools.benchmark import input_pipeline

_CLASSES = 10
_COUNT = 80


# Of all images of a class.
_COLOURS = np.array([[20 * label + 30, 128, 220 - 20 * label] for label in range(_CLASSES)])


class TinyPhotographs(tfds.core.GeneratorBasedBuilder):
  """JPEGs of one colour that tells their label, of many sizes."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=_CLASSES),
      }
    )
    return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(_COUNT), "few": self._generate_examples(31)}

  def _generate_examples(self, count):
    for index in range(count):
      label = index % _CLASSES
      image = np.broadcast_to(_COLOURS[label], (40 + index % 7, 50 - index % 5, 3))
      buffer = io.BytesIO()
      Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=95)
      yield index, {"image": io.BytesIO(buffer.getvalue()), "label": label}


class TinyPngs(TinyPhotographs):
  """Named as photographs, but lossless."""

  def _generate_examples(self, count):
    for index in range(count):
      buffer = io.BytesIO()
      Image.new("RGB", (8, 6)).save(buffer, "PNG")
      yield index, {"image": io.BytesIO(buffer.getvalue()), "label": 0}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("data"))
  # Several shards, so that their order matters.
  config = tfds.download.DownloadConfig(num_shards=3)
  for builder in (TinyPhotographs, TinyPngs):
    builder(data_dir=directory).download_and_prepare(download_config=config)
  TinyPhotographs(
    data_dir=f"{directory}/array_record", file_format="array_record"
  ).download_and_prepare()
  return directory


def _write_files(data_dir, files, dataset="tiny_photographs", split="train", examples=10_000):
  task = input_pipeline.Task(dataset, split, data_dir, str(files), cores=1)
  found = input_pipeline.write_files(task, examples)
  # As it would come from another process.
  return input_pipeline.Task(**{**vars(task), **json.loads(json.dumps(found))})


@pytest.fixture(scope="module")
def task(data_dir, tmp_path_factory):
  return _write_files(data_dir, tmp_path_factory.mktemp("files"))


def _take(reader, task, count):
  """The first batches, as copies."""
  batches = input_pipeline.READERS[reader].batches(task)
  taken = [(np.array(x), np.array(y)) for x, y in itertools.islice(batches, count)]
  if hasattr(batches, "close"):
    batches.close()  # Its processes are ended.
  return taken


def _labels(reader, task, count):
  return np.concatenate([labels.ravel() for _, labels in _take(reader, task, count)]).tolist()


def test_files_hold_the_examples_in_order(task):
  files = task.jpegs()
  assert len(files) == _COUNT
  assert len(task.shards) == 3 and task.keys == ["image", "label"]
  for path in files:
    image = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_allclose(image[0, 0], _COLOURS[input_pipeline.label_of(path)], atol=3)


def test_a_large_split_is_cut_and_a_slice_is_not(data_dir, tmp_path):
  for name in ("cut", "slice"):
    (tmp_path / name).mkdir()
  cut = _write_files(data_dir, tmp_path / "cut", examples=40)
  assert cut.split == "train[:40]" and len(cut.jpegs()) == 40
  assert sum(take for _, _, take in cut.shards) == 40
  part = _write_files(data_dir, tmp_path / "slice", split="train[2:70]", examples=40)
  assert part.split == "train[2:70]" and len(part.jpegs()) == 68


@pytest.mark.parametrize("reader", input_pipeline.READERS)
def test_every_reader_delivers_batches_of_images_with_their_labels(task, reader):
  if reader == "dali":
    pytest.importorskip("nvidia.dali")
  batches = _take(reader, task, 4)
  assert len(batches) == 4
  for images, labels in batches:
    if reader == "bare libjpeg-turbo":  # A pixel of each.
      assert images.shape == (32, 3)
      images = images[:, np.newaxis, np.newaxis]
    else:
      # Ours has an axis of workers before.
      images, labels = images.reshape(-1, 224, 224, 3), labels.reshape(-1)
      assert images.dtype == (np.float32 if reader == "model garden" else np.uint8)
    if reader == "model garden":
      images = images * [58.395, 57.12, 57.375] + [123.675, 116.28, 103.53]
    assert len(images) == 32 and labels.shape == (32,)
    expected = np.broadcast_to(_COLOURS[labels][:, np.newaxis, np.newaxis], images.shape)
    np.testing.assert_allclose(images.astype(float), expected, atol=4)


def test_in_order_means_in_the_order_of_the_shards(task):
  in_order = [input_pipeline.label_of(path) for path in task.jpegs()][:64]
  ours = _labels("ours", task, 2)
  assert ours != in_order
  assert _labels("ours in order", task, 2) == in_order
  assert _labels("decode whole", task, 2) == in_order
  assert _labels("ours", task, 2) == ours  # The package is as before.


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (80, 60)])
def test_crops_are_within_the_image_and_the_recipe(height, width):
  rng = random.Random(1)
  crops = np.array([input_pipeline.draw_crop(height, width, rng) for _ in range(500)])
  top, left, heights, widths = crops.T
  assert np.all((top >= 0) & (left >= 0) & (top + heights <= height) & (left + widths <= width))
  areas, aspects = heights * widths / (height * width), widths / heights
  # Sides are rounded to pixels.
  assert 0.07 < areas.min() < 0.12 and 0.8 < areas.max() <= 1
  assert 0.72 < aspects.min() < 0.85 and 1.2 < aspects.max() < 1.38


def test_where_no_crop_fits_the_largest_in_the_centre_is_taken():
  rng = random.Random(1)
  assert input_pipeline.draw_crop(1000, 12, rng) == (492, 0, 16, 12)
  assert input_pipeline.draw_crop(12, 1000, rng) == (0, 492, 12, 16)


def _turn(images, seconds, cpu_seconds, others_seconds=0.0):
  return {
    "images": images,
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "others_seconds": others_seconds,
  }


def test_medians_spread_and_ratios():
  results = {
    "ours": [_turn(640, 2.0, 4.0), _turn(1000, 2.0, 4.0, 0.5), _turn(800, 2.0, 3.2)],
    "pillow": [_turn(200, 2.0, 4.0), _turn(100, 2.0, 4.0), _turn(360, 2.0, 3.6)],
    "dali": [{"missing": "No module; pip install it"}],
  }
  rows = input_pipeline.summarize(results, 4, "ours")
  assert rows["ours"] == {
    "images_per_second": 400.0,
    "min": 320.0,
    "max": 500.0,
    "turns": [320.0, 500.0, 400.0],
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
  assert re.fullmatch(r"reader +images/s +\[min–max\] +a core +CPU ms/image +ours/this", table[0])
  assert re.fullmatch(r"ours +400 +\[320–500\] +100 +4\.00 +1\.00", table[1])
  assert re.fullmatch(r"pillow +100 +\[50–180\] +25 +20\.00 +4\.00", table[2])
  assert re.fullmatch(r"dali +not measured: No module; pip install it", table[3])


def test_without_ours_there_is_no_ratio():
  rows = input_pipeline.summarize({"pillow": [_turn(200, 2.0, 4.0)]}, 2, "ours")
  assert rows["pillow"]["ratio"] is None
  assert input_pipeline.to_table(rows, "reader")[1].endswith("–")


def test_turns_begin_with_one_after_the_other(monkeypatch):
  asked = []

  def run_alone(job, task, arguments):
    asked.append(arguments["reader"])
    if arguments["reader"] == "dali":
      return {"missing": "gone"}
    return _turn(len(asked), 1.0, 1.0)

  monkeypatch.setattr(input_pipeline, "run_alone", run_alone)
  tasks = {name: (name, None) for name in ("ours", "pillow", "dali")}
  results = input_pipeline.run_in_turns(tasks, 3, 0.0, 1.0)
  # What is missing is asked for once.
  assert asked == ["ours", "pillow", "dali", "pillow", "ours", "ours", "pillow"]
  assert [turn["images"] for turn in results["ours"]] == [1, 5, 6]
  assert results["dali"] == [{"missing": "gone"}]


def test_a_reader_whose_package_is_missing_says_how_to_get_it(task, monkeypatch):
  monkeypatch.setitem(sys.modules, "nvidia.dali", None)
  missing = input_pipeline.time_reader(task, "dali", 0.0, 0.1)["missing"]
  assert "nvidia" in missing and "pip install nvidia-dali-cuda120" in missing


def test_cpu_time_is_that_of_this_process_and_its_children():
  script = """
import multiprocessing, sys, time
from tools.benchmark import input_pipeline
def burn(done):
  while time.process_time() < 0.4: pass
  done.put(None)
  time.sleep(60)
before, all_before = input_pipeline.cpu_seconds(), input_pipeline.machine_seconds()
context = multiprocessing.get_context("fork")
done = context.SimpleQueue()
own = time.process_time()
while time.process_time() < own + 0.2: pass
child = context.Process(target=burn, args=(done,), daemon=True)
child.start()
done.get()
own, of_all = input_pipeline.cpu_seconds() - before, input_pipeline.machine_seconds() - all_before
assert of_all > own - 0.1
print(own)
"""
  run = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert 0.55 < float(run.stdout) < 1.0, run.stderr


def test_pixels_are_compared_with_those_of_the_exact_decoder(task, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8)
  path = tmp_path / "0000000_3.jpg"
  Image.fromarray(noise).save(path, quality=90, subsampling="4:2:0")
  files = input_pipeline.Task(**{**vars(task), "files": str(tmp_path)})
  pixels = input_pipeline.compare_pixels(files, 5)
  exact, plain, fast, fast_plain = input_pipeline.DECODERS
  zero = {"mean": 0.0, "mean_per_channel": [0.0, 0.0, 0.0], "bias": 0.0, "max": 0}
  assert pixels[exact] == {"decoded": zero, "resized": zero}
  (jpeg,), (crop,) = input_pipeline._jpegs_and_crops([path])
  import tensorflow as tf

  decoded = [
    tf.io.decode_and_crop_jpeg(jpeg, crop, channels=3, **input_pipeline.DECODERS[name])
    for name in (exact, fast)
  ]
  signed = decoded[1].numpy().astype(int) - decoded[0].numpy()
  differences = np.abs(signed)
  assert pixels[fast]["decoded"]["bias"] == pytest.approx(signed.mean())
  assert 0 < differences.max() == pixels[fast]["decoded"]["max"] < 20
  np.testing.assert_allclose(
    pixels[fast]["decoded"]["mean_per_channel"], differences.mean((0, 1)), rtol=1e-12
  )
  assert pixels[fast]["decoded"]["mean"] == pytest.approx(differences.mean())
  # Chroma of noise is far off where its upscaling is not smooth.
  assert pixels[plain]["decoded"]["mean"] > pixels[fast]["decoded"]["mean"]
  assert pixels[fast_plain]["resized"]["mean"] > 0


def _command(data_dir, *arguments):
  return [
    sys.executable,
    "-m",
    "tools.benchmark.input_pipeline",
    f"--data_dir={data_dir}",
    *arguments,
  ]


def _run(data_dir, *arguments):
  return subprocess.run(
    _command(data_dir, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=200
  )


def test_the_program_prints_a_table_and_writes_json(data_dir, tmp_path):
  output, temporary = tmp_path / "report.json", tmp_path / "temporary"
  temporary.mkdir()
  flags = ["--dataset=tiny_photographs", "--turns=1", "--seconds=0.2", "--warm_up=0", "--cores=1"]
  command = _command(data_dir, *flags, "--readers=ours,pillow", f"--json={output}")
  environ = {**os.environ, "TMPDIR": str(temporary)}
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environ)
  assert run.returncode == 0, run.stderr
  assert list(temporary.iterdir()) == []
  head, ours, pillow, where, *_ = run.stdout.splitlines()  # A note of others may follow.
  assert head.startswith("reader") and ours.startswith("ours") and pillow.startswith("pillow")
  assert (
    where.startswith("1 turns of 0.2 s on 1 of ") and "tiny_photographs train, 80 JPEGs" in where
  )
  report = json.loads(output.read_text())
  assert set(report) == {"task", "hardware", "versions", "readers"}
  assert report["task"]["examples"] == _COUNT and report["task"]["cores"] == 1
  assert report["task"]["decoder"]["dct_method"].startswith("INTEGER_")
  assert {"python", "tensorflow", "pillow"} <= set(report["versions"])
  assert list(report["readers"]) == ["ours", "pillow"]
  rows = report["readers"]
  for row in rows.values():
    assert row["images_per_second"] > 0 and row["cpu_ms_per_image"] > 0
    assert row["turns"] == [row["images_per_second"]]
  expected = rows["ours"]["images_per_second"] / rows["pillow"]["images_per_second"]
  assert rows["pillow"]["ratio"] == pytest.approx(expected)


def test_decoders_are_measured_and_compared(task, monkeypatch):
  def run_here(job, task, arguments):
    return {"compare_pixels": input_pipeline.compare_pixels, "time_reader": time_reader}[job](
      task, **arguments
    )

  def time_reader(task, reader, warm_up, seconds):
    decoders.append(task.decoder)
    return _turn(100 * len(decoders), 1.0, 1.0)

  decoders = []
  monkeypatch.setattr(input_pipeline, "run_alone", run_here)
  rows = input_pipeline.benchmark_decoders(task, 3, turns=1, warm_up=0.0, seconds=1.0)
  assert decoders == list(input_pipeline.DECODERS.values())
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
    (["--readers=ours,dalli"], "--readers=dalli: no such reader; there are ours, ours in order"),
    (["--readers="], "--readers=: no such reader"),
    (["--cores=4096"], "--cores=4096: there are "),
    (["--json=/nowhere/report.json"], "--json=/nowhere/report.json cannot be written"),
    (["ours"], "Unexpected argument 'ours'"),
    ([], "imagenet2012 is not prepared in "),
  ],
)
def test_a_users_mistake_gets_one_line(data_dir, flags, expected):
  run = _run(data_dir, *flags)
  assert (run.returncode, run.stdout) == (1, "")
  assert run.stderr.startswith(f"error: {expected}") and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "values, expected",
  [
    ({"dataset": "tiny_photograph"}, "TensorFlow Datasets has no 'tiny_photograph'"),
    ({"split": "test"}, "tiny_photographs has no split 'test'"),
    ({"split": "few"}, "few has 31 examples"),
    ({"dataset": "tiny_pngs"}, r"example 0 .* is no JPEG"),
    ({"data_dir": "array_record"}, "prepared as array_record, which not all readers know"),
  ],
)
def test_data_that_will_not_do_are_refused_in_one_line(data_dir, tmp_path, values, expected):
  values = {"data_dir": data_dir, **values}
  if values["data_dir"] == "array_record":
    values["data_dir"] = f"{data_dir}/array_record"
  with pytest.raises(UserError, match=expected) as error:
    _write_files(files=tmp_path, **values)
  assert "\n" not in str(error.value)


def test_a_reader_that_fails_shows_why(task, tmp_path, monkeypatch, capfd):
  (tmp_path / "PIL").mkdir()
  (tmp_path / "PIL" / "__init__.py").write_text("raise RuntimeError('broken Pillow')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  arguments = {"reader": "pillow", "warm_up": 0.0, "seconds": 0.1}
  with pytest.raises(UserError, match="pillow failed with status 1"):
    input_pipeline.run_alone("time_reader", task, arguments)
  assert "RuntimeError: broken Pillow" in capfd.readouterr().err


def test_a_reader_that_does_not_come_to_an_end_is_given_up(task, monkeypatch):
  monkeypatch.setattr(input_pipeline, "_START_SECONDS", -99)
  arguments = {"reader": "pillow", "warm_up": 0.0, "seconds": 100.0}
  with pytest.raises(UserError, match="pillow did not end within 1 s"):
    input_pipeline.run_alone("time_reader", task, arguments)
  assert psutil.Process().children() == []


# The program's `main`, whose data are there already.
_STOPPED = """
import json, sys
from tools.benchmark import input_pipeline
from tests.launching import ROOT
task = input_pipeline.Task(**json.loads(sys.argv[1]))
arguments = {"reader": "pillow", "warm_up": 0.0, "seconds": 100.0}
input_pipeline._run = lambda: input_pipeline.run_alone("time_reader", task, arguments)
sys.exit(input_pipeline.main(["benchmark_input"]))
"""

# One process takes all of them, for what they share takes long to make.
pytestmark = pytest.mark.xdist_group("benchmark_input")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_stopped(task, tmp_path, stop):
  cores = len(os.sched_getaffinity(0))
  program = subprocess.Popen(
    [sys.executable, "-c", _STOPPED, json.dumps({**vars(task), "cores": cores})],
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
