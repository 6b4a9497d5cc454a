"""Messages fit on one line of bounded length."""

import pytest
import tensorflow as tf

from tf_largebatch.errors import UserError, one_line, summary


@pytest.mark.parametrize(
  "message, expected",
  [
    (OSError("the disk\nis  full."), "the disk is full"),
    (ValueError(), "ValueError"),
    (KeyError("seed"), "'seed'"),
    ("two\nlines\n", "two lines"),
    (
      "{{function_node f}} no record [[{{node Parse}}]]\nelsewhere [Op:Next]",
      "no record elsewhere",
    ),
  ],
)
def test_a_summary_is_one_line_without_the_names_of_operations(message, expected):
  assert summary(message) == expected


def test_a_summary_of_tensorflows_errors():
  with pytest.raises(tf.errors.InvalidArgumentError) as error:
    tf.io.decode_image(b"not an image")
  text = summary(error.value)
  assert text.startswith("Unknown image file format.")
  assert not any(part in text for part in ("{{", "[Op:", "\n"))


@pytest.mark.parametrize("function, longest", [(summary, 603), (one_line, 2003)])
def test_a_long_message_loses_its_middle(function, longest):
  text = function("begin" + 5000 * "x" + "end")
  assert len(text) == longest and text.startswith("begin") and text.endswith("end")


def test_a_users_error_is_one_line():
  assert str(UserError("a\nb\x00 é")) == r"a\nb\x00 é"
