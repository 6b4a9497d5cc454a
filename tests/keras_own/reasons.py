"""Why a test of Keras' own cannot apply to ours."""

from typing import NamedTuple


class Reason(NamedTuple):
  """A reason why tests cannot apply.

  Attributes:
    text: the reason.
    outcome: what came of such a test; a regular expression, matched from the start.
    test: which tests may give it, if the outcome alone does not tell; a regular expression.
  """

  text: str
  outcome: str
  test: str = ""


REASONS = (
  Reason("does not use what ours replaces", "passed without ours$"),
  Reason(
    "for another backend, or needs a package that is not installed",
    r"skipped$|ModuleNotFoundError: No module named '(grain|torch|jax\.experimental)'|"
    "ImportError: OrbaxCheckpoint requires",
  ),
  Reason("run_eagerly: refused", ".*run_eagerly=True is not supported"),
  Reason("steps_per_execution: refused", r".*steps_per_execution=\d+ is not supported"),
  Reason("own train_step or test_step: refused", ".* overrides (train|test)_step, "),
  Reason(
    "generators, PyDataset, ragged tensors: refused",
    ".*UserError: .*(generator|TestPyDataset|Ragged|ragged)",
  ),
  Reason("a loss that is a sum: refused", ".*The loss is not a mean over the examples"),
  Reason("gradient_accumulation_steps: refused", ".*does not accumulate gradients over calls"),
  Reason("masks: refused", ".*takes no mask|AssertionError: False != True : Unexpected supports_m"),
  Reason(
    "renorm and synchronized: not in ours",
    "TypeError: .* unexpected keyword argument '(renorm|synchronized)'",
  ),
  Reason("a schedule that ours does not hold", "NotImplementedError: (values|a final rate) "),
  Reason(
    "refused in other words",
    'AssertionError: "`momentum` must be a float between .* does not match "momentum must lie in ',
  ),
  Reason(
    "a partial last batch does not train",
    r"AssertionError: (4 != 6|12 != 17|\n)",
    "test_fit_with_different_batch_size_same|test_backup_corrupted|test_best_case_(epoch|step)$",
  ),
  Reason(
    "a metric whose reset_state does nothing: each epoch starts anew",
    "AssertionError: \n",
    "test_steps_per_epoch_match_multi_epoch_",
  ),
  Reason(
    "compute_loss is also called with training=False, to check the loss",
    "AssertionError: False is not true$",
    "test_fwd_pass_loss_presence_in_compute_loss$|test_metric_update_in_compute_loss$",
  ),
  Reason("weight decay: ours is coupled (remark 1)", "AssertionError: \n", "::test_weight_decay$"),
  Reason(
    "the rate that scales the momentum is saved too",
    "AssertionError: 4 != 2$",
    "SGDTest::test_single_step$",
  ),
  Reason(
    "moving_variance is the unbiased one, as in Caffe2 and PyTorch",
    r"AssertionError: \nNot equal to tolerance rtol=1e-06, atol=0.001\n",
    r"BatchNormalizationTest::test_correctness\d+$",
  ),
)
