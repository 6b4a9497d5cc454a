"""The file of `tools.bn_statistics`: a run's validation errors by kind of batch statistics."""

import json

from tf_largebatch.errors import UserError, summary

KINDS = ("running", "recomputed", "minibatch")


def read(path: str, wanted: str) -> dict:
  """Reads what was measured, by the name of the run; empty if the file does not exist.

  Args:
    path: of the file.
    wanted: what to do if it cannot be read, for the error.

  Raises:
    UserError: the file does not hold what `tools.bn_statistics` writes.
  """
  try:
    with open(path, encoding="utf-8") as file:
      known = json.loads(file.read())
    for each in known.values():
      _ = each["weights_sha256"][:1], each["requested_images"]
      sizes = each["workers"], each["per_worker_batch_size"]
      numbers = [*sizes, *(each[kind]["error"] for kind in KINDS)]
      if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("not all errors, k and n are numbers")
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{path} does not hold what tools.bn_statistics writes ({summary(error)}); {wanted}."
    ) from error
  return known
