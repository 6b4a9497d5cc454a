"""Keras' own tests pass with ours in the place of what they test."""

import os

import pytest

from tests.keras_own.report import FILES, read_passing, reason_of, run_tests

_all = "KERAS_TESTS" in os.environ
slow = pytest.mark.skipif(not _all, reason="set KERAS_TESTS=1")


@pytest.mark.parametrize(
  "folders",
  [("optimizers", "layers", "backend"), "trainers", pytest.param("callbacks", marks=slow)],
)
def test_keras_own_tests_pass(folders):
  names = [name for name in read_passing() if name.startswith(folders)]
  if not _all:  # Without the variants that differ in jit_compile alone: XLA takes its time.
    names = [name for name in names if not name.endswith("_jit") or "_non_" in name]
  files = [file for file in FILES if any(name.startswith(f"{file}::") for name in names)]
  assert names and run_tests(files, names) == dict.fromkeys(names, "passed")


def test_reasons_do_not_excuse_a_wrong_result():
  name = "optimizers/sgd_test.py::SGDTest::test_correctness_with_golden"
  assert reason_of(name, "AssertionError: \nNot equal to tolerance rtol=0.0005") is None
  assert reason_of(name.replace("correctness_with_golden", "weight_decay"), "AssertionError: \n")
