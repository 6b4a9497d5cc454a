"""Keras' own tests pass with ours in the place of what they test."""

import os

from tests.keras_own.report import FILES, read_passing, reason_of, run_tests

# Of the tests of the trainer and the callbacks, which take minutes, those that run in CI.
_QUICK = (
  *("::test_compute_loss_no_training_backwards_compatibility", "::test_loss_weights"),
  *("::test_evaluate_flow_graph_fn", "::test_fit_flow_graph_fn", "::test_metric_tracking"),
  *("::test_updates_learning_rate", "::test_terminate_on_nan_graceful_stop"),
)


def test_keras_own_tests_pass():
  names = read_passing()
  if "KERAS_TESTS" not in os.environ:
    quick = ("optimizers/", "layers/", "backend/")
    names = [name for name in names if name.startswith(quick) or name.endswith(_QUICK)]
  files = [file for file in FILES if any(name.startswith(f"{file}::") for name in names)]
  assert names and run_tests(files, names) == dict.fromkeys(names, "passed")


def test_reasons_do_not_excuse_a_wrong_result():
  name = "optimizers/sgd_test.py::SGDTest::test_correctness_with_golden"
  assert reason_of(name, "AssertionError: \nNot equal to tolerance rtol=0.0005") is None
  assert reason_of(name.replace("correctness_with_golden", "weight_decay"), "AssertionError: \n")
