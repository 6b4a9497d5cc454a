"""Keras' own tests pass with ours in the place of what they test."""

import os

import pytest

from tests.keras_own.report import FILES, read_passing, reason_of, run_tests

# They train small models for each value of an argument, 15 s each.
_SLOW = ("::test_early_stopping", "::test_model_checkpoint_options", "::test_monitor_op_logic")


@pytest.mark.parametrize("folders", [("optimizers", "layers", "backend"), "trainers", "callbacks"])
def test_keras_own_tests_pass(folders):
  names = [name for name in read_passing() if name.startswith(folders)]
  if "KERAS_TESTS" not in os.environ:
    # Without the variants that differ in jit_compile alone, too: XLA takes its time.
    with_xla = [name for name in names if name.endswith("_jit") and "_non_" not in name]
    names = [name for name in names if not name.endswith(_SLOW) and name not in with_xla]
  files = [file for file in FILES if any(name.startswith(f"{file}::") for name in names)]
  assert names and run_tests(files, names) == dict.fromkeys(names, "passed")


def test_reasons_do_not_excuse_a_wrong_result():
  name = "optimizers/sgd_test.py::SGDTest::test_correctness_with_golden"
  assert reason_of(name, "AssertionError: \nNot equal to tolerance rtol=0.0005") is None
  assert reason_of(name.replace("correctness_with_golden", "weight_decay"), "AssertionError: \n")
