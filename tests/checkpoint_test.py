"""Checkpoints bring back every variable, and nothing else is taken for one."""

import keras
import numpy as np
import pytest

from tf_largebatch import checkpoint
from tf_largebatch.errors import UserError
from tf_largebatch.optimizer import MomentumCorrectedSGD


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


def test_everything_comes_back(tmp_path):
  model, optimizer = make()
  values = randomize(model, optimizer)
  path = checkpoint.save(str(tmp_path), 7, 1.5, model, optimizer)
  assert path.endswith("step-0000000007.npz")
  fresh = make()
  assert checkpoint.restore_newest(str(tmp_path), *fresh) == (7, 1.5)
  # 2 dense, 4 BN; the step, the rate and a momentum for each of 4 trainable variables, and one
  # for the rate that these are scaled by.
  restored = fresh[0].variables + fresh[1].variables
  assert len(restored) == len(values) == 6 + 3 + 4
  for variable, value in zip(restored, values, strict=True):
    assert variable.numpy().tobytes() == value.tobytes()


def test_the_newest_is_restored_and_three_are_kept(tmp_path):
  model, optimizer = make()
  for step in (5, 20, 100, 1000):
    optimizer.learning_rate = step
    checkpoint.save(str(tmp_path), step, 0.0, model, optimizer)
  # What a save that was cut off leaves is no checkpoint.
  (tmp_path / "step-0000002000.npz.partial").write_bytes(b"torn")
  steps = [20, 100, 1000]
  names = [f"step-{step:010d}.npz" for step in steps] + ["step-0000002000.npz.partial"]
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
  fresh_model, fresh_optimizer = make()
  assert checkpoint.restore_newest(str(tmp_path), fresh_model, fresh_optimizer)[0] == 1000
  assert float(fresh_optimizer.learning_rate) == 1000


@pytest.mark.parametrize("damage", ["empty", "half", "no zip"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, damage):
  model, optimizer = make()
  for step in (5, 20):
    optimizer.learning_rate = step
    path = checkpoint.save(str(tmp_path), step, 0.0, model, optimizer)
  with open(path, "rb") as file:
    content = file.read()
  with open(path, "wb") as file:
    file.write({"empty": b"", "half": content[: len(content) // 2], "no zip": b"x" * 99}[damage])
  fresh_model, fresh_optimizer = make()
  assert checkpoint.restore_newest(str(tmp_path), fresh_model, fresh_optimizer)[0] == 5
  assert float(fresh_optimizer.learning_rate) == 5


def test_without_a_checkpoint_nothing_changes(tmp_path):
  model, optimizer = make()
  values = randomize(model, optimizer)
  assert checkpoint.restore_newest(str(tmp_path / "missing"), model, optimizer) == (0, 0.0)
  for variable, value in zip(model.variables + optimizer.variables, values, strict=True):
    np.testing.assert_array_equal(variable.numpy(), value)


def test_another_networks_checkpoint_is_refused(tmp_path):
  checkpoint.save(str(tmp_path), 1, 0.0, *make(3))
  model, optimizer = make(4)
  values = randomize(model, optimizer)
  with pytest.raises(UserError, match="other variables"):
    checkpoint.restore_newest(str(tmp_path), model, optimizer)
  for variable, value in zip(model.variables + optimizer.variables, values, strict=True):
    np.testing.assert_array_equal(variable.numpy(), value)
