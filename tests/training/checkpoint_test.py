"""Checkpoints restore every variable, and damaged ones are skipped."""

import contextlib
import json
import os
import subprocess
import threading

import keras
import numpy as np
import pytest

from tf_largebatch.errors import UserError
from tf_largebatch.optim.loss_scale import LossScale
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.training.checkpoint import Checkpoints, Manifest


def make(units=3):
  model = keras.Sequential(
    [keras.Input((2,)), keras.layers.Dense(units, name="dense"), keras.layers.BatchNormalization()]
  )
  optimizer = MomentumCorrectedSGD(0.1)
  optimizer.build(model.trainable_variables)
  return model, optimizer


def randomize(model, optimizer):
  rng = np.random.default_rng(0)
  variables = model.variables + optimizer.variables
  for variable in variables:
    variable.assign(rng.integers(1, 9, variable.shape))
  return [variable.numpy() for variable in variables]


def save(directory, *steps, error=None):
  """Saves after each of the steps, with the step as the learning rate."""
  model, optimizer = make()
  checkpoints = Checkpoints(str(directory), model, optimizer)
  for step in steps:
    optimizer.learning_rate = step
    checkpoints.save(step, step / 2)
    if error is not None:
      checkpoints.evaluated(step, error(step))
  checkpoints.wait()
  return checkpoints


def restore(directory):
  """Returns the restored step, from the manifest, and rate, from the state."""
  model, optimizer = make()
  manifest = Checkpoints(str(directory), model, optimizer).restore_newest()
  return (manifest.step, float(optimizer.learning_rate)) if manifest else None


def names(*steps):
  return sorted(f"step-{step:010d}.{kind}" for step in steps for kind in ("json", "npz"))


def test_every_variable_is_restored(tmp_path):
  model, optimizer = make()
  values = randomize(model, optimizer)
  checkpoints = Checkpoints(str(tmp_path), model, optimizer)
  checkpoints.save(7, 1.5)
  # `save` copies the state before it returns, so later changes are not in the checkpoint.
  for variable in model.variables:
    variable.assign(variable * 0)
  checkpoints.wait()
  assert checkpoints.newest_step() == 7 and sorted(os.listdir(tmp_path)) == names(7)
  fresh = make()
  manifest = Checkpoints(str(tmp_path), *fresh).restore_newest()
  assert (manifest.step, manifest.seconds, manifest.validation_error) == (7, 1.5, None)
  # Dense has 2 and BN 4; the optimizer has the step, the rate, the rate that the momentums are
  # scaled by, and a momentum for each of 4 trainable variables.
  restored = fresh[0].variables + fresh[1].variables
  assert len(restored) == len(values) == 6 + 3 + 4
  for variable, value in zip(restored, values, strict=True):
    assert variable.numpy().tobytes() == value.tobytes()


def test_the_newest_is_restored_and_three_and_the_best_are_kept(tmp_path):
  save(tmp_path, 5, 20, 100, 1000, 2000, error=lambda step: abs(step - 20) / 10000)
  assert sorted(os.listdir(tmp_path)) == names(20, 100, 1000, 2000)
  assert restore(tmp_path) == (2000, 2000.0)
  manifest = json.loads((tmp_path / "step-0000000100.json").read_text())
  assert manifest["validation_error"] == 0.008 and manifest["step"] == 100


def test_files_of_torn_saves_are_ignored_and_removed(tmp_path):
  save(tmp_path, 5)
  (tmp_path / "step-0000000009.npz").write_bytes(b"not a manifest")
  (tmp_path / "step-0000000010.npz.partial").write_bytes(b"torn")
  (tmp_path / "notes.txt").write_text("the user's own")
  assert restore(tmp_path) == (5, 5.0)
  save(tmp_path, 6)
  assert sorted(os.listdir(tmp_path)) == ["notes.txt", *names(5, 6)]


def _cut(content):
  return content[: len(content) // 2]


def _flip(content):
  return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


DAMAGES = {
  "empty": ("npz", lambda content: b"", "0 bytes of state instead of"),
  "half": ("npz", _cut, "bytes of state instead of"),
  "a bit": ("npz", _flip, "SHA-256 differs"),
  "missing": ("npz", None, ""),
  "manifest empty": ("json", lambda content: b"", ""),
  "manifest half": ("json", _cut, ""),
  "manifest a bit": ("json", _flip, "digest differs"),
  "manifest edited": (
    "json",
    lambda c: c.replace(b'"seconds": 10.0', b'"seconds": 11.0'),
    "digest",
  ),
  "another manifest": (
    "json",
    lambda c: Manifest(19, 1.0, 1, "").to_json().encode(),
    "step 19",
  ),
  "manifest a list": ("json", lambda content: b"[1]", "not a manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_or_tampered_checkpoint_is_named_and_skipped(tmp_path, damage, caplog):
  save(tmp_path, 5, 20)
  kind, change, reason = DAMAGES[damage]
  path = tmp_path / f"step-0000000020.{kind}"
  if change is None:
    path.unlink()
  else:
    assert path.read_bytes() != change(path.read_bytes())
    path.write_bytes(change(path.read_bytes()))
  with caplog.at_level("WARNING", logger="absl"):
    assert restore(tmp_path) == (5, 5.0)
  (record,) = caplog.records
  assert "step-0000000020.json, which is not whole" in record.getMessage()
  assert reason in record.getMessage()


def test_a_power_failure_leaves_no_manifest_without_its_state(tmp_path, monkeypatch):
  synced = []

  def fsync(descriptor):
    name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    synced.append((name, os.fstat(descriptor).st_size, sorted(os.listdir(tmp_path))))

  monkeypatch.setattr(os, "fsync", fsync)
  save(tmp_path, 1)
  manifest, state = names(1)
  sizes = [os.path.getsize(tmp_path / name) for name in (state, manifest)]
  # Each file is synced before it gets its name; the manifest comes last.
  assert synced == [
    (f"{state}.partial", sizes[0], [f"{state}.partial"]),
    (f"{manifest}.partial", sizes[1], [f"{manifest}.partial", state]),
  ]


def test_torn_checkpoints_are_removed_when_others_are_saved(tmp_path):
  """Even though their manifests are whole and their steps are the highest."""
  save(tmp_path, 5, 20, 21, error=lambda step: 1 / step)
  for step in (20, 21):
    (tmp_path / f"step-{step:010d}.npz").write_bytes(b"torn")
  model, optimizer = make()
  checkpoints = Checkpoints(str(tmp_path), model, optimizer)
  assert checkpoints.restore_newest().step == 5
  checkpoints.save(6, 1.0)
  checkpoints.wait()
  assert sorted(os.listdir(tmp_path)) == names(5, 6)
  assert restore(tmp_path)[0] == 6


def test_without_a_checkpoint_nothing_changes(tmp_path):
  model, optimizer = make()
  values = randomize(model, optimizer)
  checkpoints = Checkpoints(str(tmp_path / "missing"), model, optimizer)
  assert checkpoints.restore_newest() is None and checkpoints.newest_step() is None
  for variable, value in zip(model.variables + optimizer.variables, values, strict=True):
    np.testing.assert_array_equal(variable.numpy(), value)


def test_another_networks_checkpoint_is_refused(tmp_path):
  save(tmp_path, 1)
  model, optimizer = make(4)
  values = randomize(model, optimizer)
  with pytest.raises(UserError, match="other variables"):
    Checkpoints(str(tmp_path), model, optimizer).restore_newest()
  for variable, value in zip(model.variables + optimizer.variables, values, strict=True):
    np.testing.assert_array_equal(variable.numpy(), value)


def test_without_saves_nothing_is_written(tmp_path):
  checkpoints = Checkpoints(str(tmp_path / "checkpoints"), *make(), saves=False)
  checkpoints.save(1, 1.0)
  checkpoints.evaluated(1, 0.5)
  checkpoints.discard_from(0)
  checkpoints.wait()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value, caplog):
  model, optimizer = make()
  checkpoints = Checkpoints(str(tmp_path), model, optimizer)
  checkpoints.save(1, 1.0)
  model.variables[-1].assign([0.0, value, 0.0])  # A moving variance.
  checkpoints.save(2, 2.0)
  checkpoints.wait()
  assert sorted(os.listdir(tmp_path)) == names(1)
  assert "after step 2 is not saved: 1 of its 13 variables" in caplog.text


def test_discarded_checkpoints_are_removed(tmp_path):
  checkpoints = save(tmp_path, 5, 20, 21)
  checkpoints.discard_from(20)
  assert sorted(os.listdir(tmp_path)) == names(5) and checkpoints.newest_step() == 5


def test_a_failed_save_is_logged_and_can_be_retried(tmp_path, caplog):
  directory = tmp_path / "checkpoints"
  directory.write_text("a file in its place")
  model, optimizer = make()
  checkpoints = Checkpoints(str(directory), model, optimizer)
  checkpoints.save(1, 1.0)
  checkpoints.wait()
  assert "Cannot save the checkpoint of step 1" in caplog.text
  directory.unlink()
  checkpoints.save(1, 1.0)  # Retries the same step.
  checkpoints.wait()
  assert restore(directory)[0] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, caplog):
  directory = tmp_path / "disk"
  directory.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory])
  if mounted.returncode:
    pytest.skip("this sandbox does not allow mounts")
  try:
    checkpoints = save(directory, 5)
    with open(directory / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
      while True:
        filler.write(b"x" * 4096)
    checkpoints.save(6, 1.0)
    checkpoints.wait()
    assert "Cannot save the checkpoint of step 6" in caplog.text
    assert sorted(os.listdir(directory)) == ["filler", *names(5)]
    assert restore(directory)[0] == 5
    (directory / "filler").unlink()
    checkpoints.save(7, 1.0)
    checkpoints.wait()
    assert restore(directory)[0] == 7
  finally:
    subprocess.run(["umount", directory], check=True)


def test_a_save_waits_for_the_one_in_progress(tmp_path, monkeypatch):
  """A second save starts when the first is complete; `busy` is true in between."""
  model, optimizer = make()
  checkpoints = Checkpoints(str(tmp_path), model, optimizer)
  resume, savez = threading.Event(), np.savez

  def slow(*arguments, **arrays):
    assert resume.wait(30)
    savez(*arguments, **arrays)

  monkeypatch.setattr(np, "savez", slow)
  assert not checkpoints.busy
  checkpoints.save(1, 1.0)
  assert checkpoints.busy and not os.path.exists(tmp_path / "step-0000000001.json")
  threading.Timer(0.2, resume.set).start()
  checkpoints.save(2, 1.0)
  assert os.path.exists(tmp_path / "step-0000000001.json")
  checkpoints.wait()
  assert not checkpoints.busy and sorted(os.listdir(tmp_path)) == names(1, 2)


def test_the_loss_scale_is_restored(tmp_path):
  """Otherwise a resumed float16 run would skip other steps than an uninterrupted one."""
  values = (2.0**9, 1234, 7)
  loss_scale = LossScale()
  for variable, value in zip(loss_scale.variables, values, strict=True):
    variable.assign(value)
  checkpoints = Checkpoints(str(tmp_path), *make(), loss_scale)
  checkpoints.save(1, 1.0)
  checkpoints.wait()
  fresh = LossScale()
  assert Checkpoints(str(tmp_path), *make(), fresh).restore_newest().step == 1
  assert tuple(float(variable.numpy()) for variable in fresh.variables) == values
