"""g, the workers per pass: measured on a GPU, and checked."""

import pytest
import tensorflow as tf

from tests.training.small_steps import make_model, make_recipe
from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.training import workers_per_pass as passes


@pytest.mark.parametrize(
  "seconds, workers, expected",
  [
    ({1: 1.0, 2: 1.5, 4: 2.9, 8: 6.0}, 8, 4),  # Per worker: 1, 0.75, 0.725 and 0.75.
    ({1: 1.0, 2: 1.97}, 8, 1),  # Less than 2 % faster.
    ({1: 1.0, 2: 1.0, 4: None}, 8, 2),  # Out of memory with four.
    ({1: 1.0, 2: 1.0}, 6, 2),  # 4 does not divide 6.
  ],
)
def test_on_a_gpu_g_doubles_while_that_is_faster(monkeypatch, seconds, workers, expected):
  tried = []

  def make(model, recipe, options):
    tried.append(options.workers_per_pass)
    return lambda *_: (None, None, None, [0.0, 0.0])

  def measured(_):
    if seconds[tried[-1]] is None:
      raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
    return seconds[tried[-1]]

  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [kind])
  monkeypatch.setattr(passes, "make_paper_sums", make)
  monkeypatch.setattr(passes, "_seconds", measured)
  arguments = (make_model(5, "float32"), make_recipe(workers), RunOptions(), workers)
  assert passes.choose_workers_per_pass(*arguments) == expected
  assert tried == list(seconds)
  monkeypatch.setattr(passes.tf.config, "get_visible_devices", lambda kind: [])
  assert passes.choose_workers_per_pass(*arguments) == 1


def test_workers_per_pass_must_divide_the_replicas_workers():
  with pytest.raises(
    UserError, match=r"workers_per_pass=3 .* the 8 workers of a replica; use 1, 2, 4, 8 or auto"
  ):
    passes.check_workers_per_pass(3, 8)
  passes.check_workers_per_pass(4, 8)
