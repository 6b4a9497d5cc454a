"""Runs the tests that ship in Keras' wheel against this package's classes.

  python -m tests.keras_own.report

Only what is under test is replaced (`stand_ins.py`): SGD, three schedules, batch normalisation, and
`fit` and `evaluate` of every model, so that the tests of the trainer, of tf.distribute and of the
callbacks drive ours. The program lists by file how many tests pass, and why the others cannot apply
(`reasons.py`). It fails if a test fails for no listed reason, or if those that pass are not those
of `passing.txt`; --write writes that file anew.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import keras
from absl import app, flags

from tests.keras_own import plugin
from tests.keras_own.reasons import REASONS

_WRITE = flags.DEFINE_bool("write", False, "Write passing.txt.")

_KERAS = pathlib.Path(keras.__file__).parent / "src"
_ROOT = pathlib.Path(__file__).parents[2]
PASSING = pathlib.Path(__file__).parent / "passing.txt"
FILES = (
  "optimizers/sgd_test.py",
  "optimizers/schedules/learning_rate_schedule_test.py",
  "layers/normalization/batch_normalization_test.py",
  "backend/tensorflow/optimizer_distribute_test.py",
  "backend/tensorflow/distribute_test.py",
  "trainers/trainer_test.py",
  *sorted(f"callbacks/{path.name}" for path in (_KERAS / "callbacks").glob("*_test.py")),
)


def read_passing() -> list[str]:
  """The tests that must pass: `FILE::CLASS::TEST`."""
  return PASSING.read_text().split()


def run_tests(files, only=None, timeout: float = 600) -> dict[str, str]:
  """Runs tests of Keras in a process of its own.

  Args:
    files: their names below keras/src.
    only: names of tests; None: all.
    timeout: seconds.

  Returns:
    Test → what came of it, see `plugin.py`.
  """
  with tempfile.TemporaryDirectory() as directory:
    outcomes = pathlib.Path(directory, "outcomes.json")
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "KERAS_OWN_OUTCOMES": str(outcomes)}
    if only is not None:
      chosen = pathlib.Path(directory, "only.json")
      chosen.write_text(json.dumps(only))
      environment["KERAS_OWN_ONLY"] = str(chosen)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "--no-header"]
    command += ["-p", plugin.__name__, "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, f"--rootdir={_KERAS}", *(str(_KERAS / file) for file in files)]
    done = subprocess.run(
      command, env=environment, cwd=directory, capture_output=True, text=True, timeout=timeout
    )
    if not outcomes.exists():
      raise RuntimeError(f"Keras' tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(outcomes.read_text())


def reason_of(name: str, outcome: str) -> str | None:
  """Why a test that does not pass cannot apply; None: for no listed reason."""
  for reason in REASONS:
    if re.match(reason.outcome, outcome) and re.search(reason.test, name):
      return reason.text
  return None


def main(_):
  passing, unknown, total = [], [], collections.Counter()
  for file in FILES:
    reasons = collections.Counter()
    for name, outcome in run_tests([file]).items():
      if outcome == "passed":
        passing.append(name)
        reasons["pass"] += 1
      elif reason := reason_of(name, outcome):
        reasons[reason] += 1
      else:
        unknown.append(f"{name}: {outcome}")
        reasons["fail"] += 1
    total += reasons
    print(file, flush=True)
    for reason, count in reasons.most_common():
      print(f"  {count:4d} {reason}")
  print("in all")
  for reason, count in total.most_common():
    print(f"  {count:4d} {reason}")
  if _WRITE.value:
    PASSING.write_text("".join(f"{name}\n" for name in sorted(passing)))
  differing = sorted(set(passing) ^ set(read_passing()))
  for line in (*unknown, *(f"{name}: not as in passing.txt" for name in differing)):
    print(line, file=sys.stderr)
  if unknown or differing:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
