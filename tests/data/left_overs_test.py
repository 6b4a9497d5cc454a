"""What preparations leave that a signal, SIGKILL or an older version interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import preparation_test
from tests.launching import ROOT
from tf_largebatch.data import left_overs, preparation

_ENDLESS = "ENDLESS_SHAPES_ENDLESS"

# As the trainer does: signals are watched before TensorFlow is imported.
_PROGRAM = """
import sys
from tf_largebatch.signals import StopRequest
with StopRequest().watch_signals():
  from tests.data import left_overs_test
  left_overs_test.preparation.prepare("endless_shapes", sys.argv[1])
"""


class EndlessShapes(preparation_test.TinyShapes):
  """A data set whose preparation writes megabytes until it is interrupted."""

  def _generate_examples(self):
    yield 0, {"image": np.zeros((2, 2, 3), np.uint8), "label": 0}
    while _ENDLESS in os.environ:
      with open(os.path.join(self.data_dir, f"part-{time.monotonic_ns()}"), "wb") as file:
        file.write(bytes(100_000))
      time.sleep(0.01)


@contextlib.contextmanager
def preparing(data_dir, *arguments):
  """A process, of these arguments of Python, in the middle of a preparation."""
  with subprocess.Popen(
    [sys.executable, *(arguments or ("-c", _PROGRAM, str(data_dir)))],
    cwd=ROOT,
    env={**os.environ, _ENDLESS: "1"},
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      deadline = time.monotonic() + 100
      while not [*data_dir.glob("*/*/part-*")]:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
      yield process
    finally:
      process.kill()


def files(data_dir):
  return sorted(path.relative_to(data_dir) for path in data_dir.rglob("*") if path.is_file())


def test_a_signal_and_the_preparation_after_sigkill_remove_everything(tmp_path):
  stopped, killed = tmp_path / "stopped", tmp_path / "killed"
  with preparing(stopped) as first, preparing(killed) as second:
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=15) == 130
    lines = first.stderr.read().splitlines()
    assert lines[-1] == "error: Ended at once by SIGINT."  # No word of the files that vanished.
    assert [path.name for path in files(stopped)] == [".preparation.lock"]
    assert not (stopped / ".preparation").exists()
    second.kill()
    second.wait()
  assert len(files(killed)) > 1
  preparation.prepare("endless_shapes", str(killed))
  assert {path.parent.name for path in files(killed)} == {"", "1.0.0"}
  assert [path.name for path in (killed / "endless_shapes").iterdir()] == ["1.0.0"]


def test_what_may_belong_to_another_program_is_removed_after_a_day(tmp_path, caplog):
  """TFDS's own names, in the places where it uses them."""
  hexadecimal = "0123456789abcdef" * 2
  directories = {
    name: tmp_path / name
    for name in (
      "flowers/incomplete.A1B2C3_1.0.0",
      "flowers/config/incomplete.A1B2C3_1.0.0",
      f"downloads/flowers/host_file.tgz.tmp.{hexadecimal}",
    )
  }
  others = [tmp_path / "flowers/1.0.0", tmp_path / "downloads/flowers/a.tmp.tgz"]
  empty = tmp_path / "flowers/incomplete.Z1B2C3_1.0.0"
  empty.mkdir(parents=True)
  for directory in [*directories.values(), *others]:
    directory.mkdir(parents=True)
    (directory / "part").write_bytes(bytes(2000))
  with caplog.at_level("INFO", logger="absl"):
    left_overs.remove(str(tmp_path))
  assert all(directory.exists() for directory in directories.values())
  assert all(f"{tmp_path / name} (1.95 KiB) belongs to" in caplog.text for name in directories)

  long_ago = time.time() - left_overs._IDLE_SECONDS - 10
  for directory in [*directories.values(), *others]:
    os.utime(directory / "part", (long_ago, long_ago))
  left_overs.remove(str(tmp_path))
  assert not any(directory.exists() for directory in directories.values())
  assert empty.exists() and all((other / "part").exists() for other in others)


@pytest.mark.parametrize("name", ["flowers", "flowers/config"])
def test_ours_are_removed_at_once(name, tmp_path):
  directory = tmp_path / name / left_overs._OURS.format("1.0.0")
  directory.mkdir(parents=True)
  (directory / "part").touch()
  left_overs.remove(str(tmp_path))
  assert not directory.exists() and directory.parent.exists()


def test_tfds_still_takes_its_name_from_the_function_that_is_replaced(tmp_path):
  """Else a preparation would leave what nobody knows is ours."""
  assert tfds.core.dataset_builder.utils.incomplete_dir is tfds.core.utils.incomplete_dir
  builder = tfds.builder("endless_shapes", data_dir=tmp_path)
  with left_overs.removable(builder):
    assert tfds.core.utils.incomplete_dir is left_overs._incomplete_dir
  assert tfds.core.utils.incomplete_dir is not left_overs._incomplete_dir
