"""Disks and directories that fill up, lose files or fail, at the start, during and after a run."""

import contextlib
import errno
import os
import resource
import shutil
import tempfile

import pytest

from tests.surroundings.users import no_privileges
from tests.training.small_runs import STEPS, interrupting, train
from tf_largebatch import files
from tf_largebatch import train as train_program
from tf_largebatch.data import preparation
from tf_largebatch.errors import UserError
from tf_largebatch.training import finishing, work_directory
from tf_largebatch.training.metrics import MetricsWriter


def after_step(monkeypatch, number, action):
  """Has the next run call `action` once the record of step `number` is written."""
  original = MetricsWriter.train

  def replacement(self, step, epoch, scalars):
    original(self, step, epoch, scalars)
    if step == number:
      action()

  monkeypatch.setattr(MetricsWriter, "train", replacement)


@contextlib.contextmanager
def quota():
  """Bounds each file's size; Python ignores the signal, so that writing fails (EFBIG)."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def set_limit(size=before[0]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

  try:
    yield set_limit
  finally:
    set_limit()


def test_a_full_quota_at_the_start_is_named(tmp_path):
  with quota() as set_limit, pytest.raises(UserError) as error:
    set_limit(1000)
    train(tmp_path / "run")
  assert f"work_dir={tmp_path / 'run'} cannot be written" in str(error.value)
  assert "File too large" in str(error.value)


def test_a_quota_that_is_full_for_a_while(tmp_path, monkeypatch, undisturbed_sha256, caplog):
  with quota() as set_limit:
    after_step(monkeypatch, 2, lambda: set_limit(1000))
    after_step(monkeypatch, 6, set_limit)
    result = train(tmp_path)
  assert result["weights_sha256"] == undisturbed_sha256
  assert "Cannot save the checkpoint of step 3 " in caplog.text
  names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert names == [f"step-{step:010d}.{kind}" for step in (6, 9) for kind in ("json", "npz")]


def test_a_quota_that_is_full_at_the_end(tmp_path, monkeypatch, undisturbed_sha256):
  export = finishing.export

  def full(*arguments):
    set_limit(1000)
    export(*arguments)

  with quota() as set_limit, monkeypatch.context() as patched:
    patched.setattr(finishing, "export", full)
    with pytest.raises(UserError, match=f"All {STEPS} steps are done, but work_dir={tmp_path} "):
      train(tmp_path)
  assert not [name for name in os.listdir(tmp_path) if name.startswith(("model", "result"))]
  assert train(tmp_path)["weights_sha256"] == undisturbed_sha256
  assert (tmp_path / "model.keras").stat().st_size > 100_000


def test_a_work_dir_that_is_removed_during_the_run(tmp_path, monkeypatch, undisturbed_sha256):
  """What the run saves from then on is a run again, which the same command continues."""
  work_dir = tmp_path / "run"
  with monkeypatch.context() as patched:
    after_step(patched, 4, lambda: shutil.rmtree(work_dir))
    patched.setattr(MetricsWriter, "train", interrupting("train", 8))
    with pytest.raises(KeyboardInterrupt):
      train(work_dir)
  assert {"recipe.json", "flags.txt", "checkpoints"} <= set(os.listdir(work_dir))
  assert train(work_dir)["weights_sha256"] == undisturbed_sha256


@pytest.fixture
def public_dir():
  """A directory that every user can enter, unlike pytest's."""
  with tempfile.TemporaryDirectory() as directory:
    os.chmod(directory, 0o755)
    yield directory


def test_a_work_dir_that_is_read_only_says_so(public_dir):
  os.chmod(public_dir, 0o555)
  with no_privileges(), pytest.raises(UserError, match=r"cannot be written .*Permission denied"):
    work_directory.make_writable(f"{public_dir}/run")


def test_a_data_dir_that_this_user_may_not_read_says_so(public_dir):
  """As one that another user prepared with umask 077."""
  data_dir = f"{public_dir}/data"
  os.makedirs(f"{data_dir}/own_images")
  os.chmod(data_dir, 0)
  named = rf"data_dir={data_dir} cannot be read \(Permission denied\)"
  with no_privileges(), pytest.raises(UserError, match=named):
    preparation.prepare("own_images", data_dir)
  os.chmod(data_dir, 0o700)


def test_a_data_dir_that_does_not_exist_is_named(tmp_path):
  """As one on a disk that is not mounted now."""
  named = rf"no dataset 'own_images' .*, and {tmp_path / 'data'} does not exist"
  with pytest.raises(UserError, match=named):
    preparation.prepare("own_images", str(tmp_path / "data"))


def test_no_room_for_temporary_files(tmp_path, monkeypatch, undisturbed_sha256):
  def fail(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  for name in ("TemporaryDirectory", "NamedTemporaryFile"):
    monkeypatch.setattr(tempfile, name, fail)
  assert train(tmp_path)["weights_sha256"] == undisturbed_sha256


@pytest.mark.parametrize("number, fails", [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_systems_without_fsync_and_failing_disks(tmp_path, monkeypatch, number, fails):
  def fsync(descriptor):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, "fsync", fsync)
  path = str(tmp_path / "file")
  with pytest.raises(OSError) if fails else contextlib.nullcontext():
    files.write_text(path, "whole")
  assert os.listdir(tmp_path) == ([] if fails else ["file"])


def test_no_directory_for_temporary_files_is_named_before_tensorflow_needs_one(monkeypatch):
  def fail():
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

  monkeypatch.setattr(tempfile, "gettempdir", fail)
  with pytest.raises(UserError, match=r"found in \['/tmp'\]\); set TMPDIR to "):
    train_program.adapt_to_surroundings()
