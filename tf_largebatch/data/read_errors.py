"""What can go wrong while data are read: a damaged record, or files that cannot be reached.

A damaged record stays damaged: it is a bad example, which a run may skip. Files that cannot be
reached, or too little memory, say nothing about the example, so they end the run instead.
"""

import errno
import resource

import tensorflow as tf

from tf_largebatch.errors import LOST_TASK, NEEDS_THE_USER, InterruptedRunError, UserError, summary

# What reading and decoding a damaged example may raise. TensorFlow's message quotes a record that
# it cannot parse, and such a message may not be text (UnicodeDecodeError, a ValueError).
FAULTS = (tf.errors.OpError, ValueError)

# What reading a file may raise, whatever is wrong.
READ_FAILURES = (OSError, tf.errors.OpError, MemoryError)


def unreachable(what: str, error: Exception) -> InterruptedRunError:
  """Returns the error that ends a run because something cannot be read now.

  Args:
    what: that which cannot be read, for instance a file's name.
    error: raised by the attempt.
  """
  code, reason = getattr(error, "errno", None), _reason(error)
  if code == errno.EMFILE:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return InterruptedRunError(
      f"{what} cannot be opened: this process has reached its limit of {limit} open files; raise "
      "the limit (ulimit -n), then run again to continue.",
      NEEDS_THE_USER,
    )
  if code == errno.ENOMEM or isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
    return InterruptedRunError(
      f"{what} cannot be read: memory is exhausted ({reason}); provide more, then run "
      "again to continue.",
      NEEDS_THE_USER,
    )
  return InterruptedRunError(
    f"{what} cannot be reached ({reason}); run again when it can be, to continue.",
    LOST_TASK,
  )


def missing_shard(filename: str, error: Exception) -> UserError | InterruptedRunError:
  """Returns the error for a shard that cannot be read when a data set is opened."""
  found = unreachable(filename, error)
  if found.status == NEEDS_THE_USER:
    return found
  return UserError(
    f"{filename}, a shard of the data set, cannot be read ({_reason(error)}); put it back, or "
    "prepare the data set again."
  )


def _reason(error: Exception) -> str:
  """Returns why a file cannot be read, without its name."""
  return getattr(error, "strerror", None) or summary(error)
