"""TensorBoard's event files: every step that the run kept, once, whatever happened to the run."""

import contextlib
import os
import shutil
import subprocess
import time

import pytest
import tensorflow as tf
from tensorboard.summary.writer.record_writer import RecordWriter

from tests.training.small_runs import check_tensorboard, read_tensorboard
from tf_largebatch import files
from tf_largebatch.training import event_files
from tf_largebatch.training.metrics import MetricsWriter

RATES = {"learning_rate": 0.1, "images_per_second": 10.0}


def session(work_dir, first_step, last_step, evaluated_step=None, killed=True, value=1.0):
  """Writes the records of steps first_step + 1 to last_step, then dies without closing."""
  if (work_dir / "tensorboard").exists():
    # Files are read in the order of their names, which begin with the second.
    time.sleep(1 - time.time() % 1)
  metrics = MetricsWriter(str(work_dir), {"workers": 8}, first_step, 99, evaluated_step)
  metrics.flush()  # As when it is entered.
  for step in range(first_step + 1, last_step + 1):
    metrics.train(step, step / 3, {"loss": step * value, "error": 0.5, **RATES})
    if step % 3 == 0:
      metrics.evaluation(step, step // 3, {"loss": value, "error": step / 100})
  if not killed:
    metrics.__exit__()


def event_paths(work_dir):
  return sorted((work_dir / "tensorboard").glob("events*"))


def tear(path):
  """Appends the first half of an event."""
  with open(path, "ab") as file:
    file.write(path.read_bytes()[:20])


@pytest.mark.parametrize("first_step", [0, 3, 4, 7])
def test_a_killed_run_leaves_no_step_twice(tmp_path, first_step):
  session(tmp_path, 0, 7)
  before = read_tensorboard(tmp_path)
  tear(event_paths(tmp_path)[0])
  session(tmp_path, first_step, 9, value=2.0)
  check_tensorboard(tmp_path, 9, 3)
  kept = {tag: [e for e in events if e.step <= first_step] for tag, events in before.items()}
  after = read_tensorboard(tmp_path)
  for tag in ("train/loss", "validation/error"):
    assert after[tag][: len(kept[tag])] == kept[tag]  # With their wall times and values.
  assert [event.step for event in after["recipe"]] == sorted({0, first_step})
  assert len(event_paths(tmp_path)) == (2 if first_step else 1)
  assert not list((tmp_path / "tensorboard").glob("*.partial"))


def test_many_kills(tmp_path):
  """The same step again and again, steps further back, and a run whose checkpoints are lost."""
  for first_step, last_step in ((0, 4), (3, 3), (3, 8), (6, 6), (6, 7), (2, 5), (0, 2), (0, 9)):
    session(tmp_path, first_step, last_step)
    check_tensorboard(tmp_path, last_step, last_step // 3)
  assert len(event_paths(tmp_path)) == 1


def test_an_evaluation_that_is_done_again_is_dropped(tmp_path):
  session(tmp_path, 0, 3)
  metrics = MetricsWriter(str(tmp_path), {}, 3, 99, evaluated_step=0)
  with metrics:
    metrics.evaluation(3, 1, {"loss": 1.0, "error": 0.25})
  check_tensorboard(tmp_path, 3, 1)
  # A session without training records keeps its evaluation and nothing else.
  session(tmp_path, 3, 6)
  check_tensorboard(tmp_path, 6, 2)
  session(tmp_path, 2, 6)
  check_tensorboard(tmp_path, 6, 2)


def test_files_stay_untouched_if_nothing_is_to_be_dropped(tmp_path):
  session(tmp_path, 0, 6, killed=False)
  (path,) = event_paths(tmp_path)
  before = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
  session(tmp_path, 6, 9)
  assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before


def foreign_files(directory):
  """Files in the run's directory that are not its own, although some look like it."""
  writer = tf.summary.create_file_writer(str(directory))
  with writer.as_default(step=50):
    tf.summary.scalar("mine/loss", 1.0)
    tf.summary.scalar("train/loss", 1.0)
  writer.close()
  (path,) = directory.glob("events*")
  (directory / "sub").mkdir()
  shutil.copy(path, directory / "sub")
  shutil.copy(path, directory / (path.name + ".profile-empty"))
  with open(directory / "events.out.tfevents.1.records.v2", "wb") as file:
    RecordWriter(file).write(b"\xffnot an event")
  (directory / "events.out.tfevents.1.text.v2").write_text("not records")
  (directory / "events.out.tfevents.1.directory.v2").mkdir()
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_files_of_others_are_never_touched(tmp_path):
  (tmp_path / "tensorboard").mkdir()
  before = foreign_files(tmp_path / "tensorboard")
  session(tmp_path, 0, 6)
  session(tmp_path, 3, 6)
  assert {path: path.read_bytes() for path in before} == before


def test_what_earlier_versions_drew_twice_is_dropped(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(event_files, "_SUFFIX", ".v2")
    patch.setattr(event_files.EventFiles, "drop_after", lambda *_: None)
    session(tmp_path, 0, 7, value=2.0)
    session(tmp_path, 3, 8)
  assert len(read_tensorboard(tmp_path)["train/loss"]) == 7 + 5
  session(tmp_path, 6, 9)
  events = read_tensorboard(tmp_path)
  assert [event.step for event in events["train/loss"]] == list(range(1, 10))
  check_tensorboard(tmp_path, 9, 3)  # The later session's values are kept, as in metrics.jsonl.


def test_a_file_that_cannot_be_rewritten_is_kept(tmp_path, monkeypatch, caplog):
  """The disk is full: nothing is lost, and the next session removes the repeated steps."""
  session(tmp_path, 0, 7)
  (path,) = event_paths(tmp_path)
  before = path.read_bytes()
  replacing = files.replacing

  def refuse(name, mode, partial=None):
    if "tfevents" in name:
      raise OSError(28, "No space left on device")
    return replacing(name, mode, partial)

  with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="absl"):
    patch.setattr(files, "replacing", refuse)
    session(tmp_path, 3, 8)
  (record,) = caplog.records
  assert "Cannot remove the repeated steps from" in record.getMessage()
  assert "No space left" in record.getMessage()
  assert path.read_bytes() == before and len(read_tensorboard(tmp_path)["train/loss"]) == 7 + 5
  session(tmp_path, 6, 9)
  check_tensorboard(tmp_path, 9, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_was_full_for_a_while(tmp_path):
  """A write that fails half-way hides from TensorBoard what follows it in the same file."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk])
  if mounted.returncode:
    pytest.skip("this sandbox does not allow mounts")
  try:
    metrics = MetricsWriter(str(disk), {"workers": 8}, 0, 99)
    with metrics:
      for step in range(1, 60):
        if step == 20:
          filler = open(disk / "filler", "wb", buffering=0)  # noqa: SIM115
          with filler, contextlib.suppress(OSError):
            while True:
              filler.write(b"x" * 4096)
        if step == 40:
          assert len(read_tensorboard(disk)["train/loss"]) < 39
          (disk / "filler").unlink()
        metrics.train(step, step / 3, {"loss": float(step), "error": 0.5, **RATES})
    check_tensorboard(disk, 59, 0)
    session(disk, 30, 33, killed=False)
    check_tensorboard(disk, 33, 1)
  finally:
    subprocess.run(["umount", disk], check=True)
