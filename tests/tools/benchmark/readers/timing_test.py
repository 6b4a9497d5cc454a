"""The readers' batches, and the time that they take."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT
from tests.tools.benchmark import photographs
from tools.benchmark.readers.task import label_of
from tools.benchmark.readers.timing import READERS, time_reader

pytestmark = pytest.mark.xdist_group("benchmark_input")  # One process prepares the data for all.


def _take(reader, count):
  """Copies of the first batches."""
  batches = READERS[reader](photographs.task())
  taken = [(np.array(x), np.array(y)) for x, y in itertools.islice(batches, count)]
  if hasattr(batches, "close"):
    batches.close()  # Ends its processes.
  return taken


def _labels(reader, count):
  return np.concatenate([labels.ravel() for _, labels in _take(reader, count)]).tolist()


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_delivers_batches_of_images_with_their_labels(reader):
  if reader == "dali":
    pytest.importorskip("nvidia.dali")
  batches = _take(reader, 4)
  assert len(batches) == 4
  for images, labels in batches:
    if reader == "bare libjpeg-turbo":  # One pixel of each image.
      assert images.shape == (32, 3)
      images = images[:, np.newaxis, np.newaxis]
    else:
      # Ours has a leading axis of workers.
      images, labels = images.reshape(-1, 224, 224, 3), labels.reshape(-1)
      assert images.dtype == (np.float32 if reader == "model garden" else np.uint8)
    if reader == "model garden":
      images = images * [58.395, 57.12, 57.375] + [123.675, 116.28, 103.53]
    assert len(images) == 32 and labels.shape == (32,)
    colours = photographs.COLOURS[labels][:, np.newaxis, np.newaxis]
    expected = np.broadcast_to(colours, images.shape)
    np.testing.assert_allclose(images.astype(float), expected, atol=4)


def test_in_order_means_in_the_order_of_the_shards():
  in_order = [label_of(path) for path in photographs.task().jpegs()][:64]
  ours = _labels("ours", 2)
  assert ours != in_order
  assert _labels("ours in order", 2) == in_order
  assert _labels("decode whole", 2) == in_order
  assert _labels("ours", 2) == ours  # The package still shuffles.


def test_a_reader_whose_package_is_missing_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "nvidia.dali", None)
  missing = time_reader(photographs.task(), "dali", 0.0, 0.1)["missing"]
  assert "nvidia" in missing and "pip install nvidia-dali-cuda120" in missing


def test_cpu_time_is_that_of_this_process_and_its_children():
  script = """
import multiprocessing, time
from tools.benchmark.readers.timing import cpu_seconds, machine_seconds
def burn(done):
  while time.process_time() < 0.4: pass
  done.put(None)
  time.sleep(60)
before, all_before = cpu_seconds(), machine_seconds()
context = multiprocessing.get_context("fork")
done = context.SimpleQueue()
own = time.process_time()
while time.process_time() < own + 0.2: pass
child = context.Process(target=burn, args=(done,), daemon=True)
child.start()
done.get()
own, of_all = cpu_seconds() - before, machine_seconds() - all_before
assert of_all > own - 0.1
print(own)
"""
  run = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert 0.55 < float(run.stdout) < 1.0, run.stderr
