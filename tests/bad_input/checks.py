"""Checks that bad input ends in one line and overwrites nothing."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import unittest.mock as mock

from absl import flags
from absl.testing import flagsaver

from tests.launching import ROOT
from tf_largebatch import command_line, train

SMALL = (
  "--dataset=synthetic",
  "--train_split=train[:40]",
  "--validation_split=validation[:20]",
  "--image_size=8",
  "--network=resnet8",
  "--workers=2",
  "--per_worker_batch_size=10",
  "--epochs=1",
  "--warmup_epochs=0",
  "--decay_epochs=",
)
LONG = "x" * 10_000


def contents(directory):
  """Everything in a directory with each file's digest, except .lock, which names the last run."""
  return {
    path.relative_to(directory): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
    for path in directory.rglob("*")
    if path.name != ".lock"
  }


def check_line(errors, names):
  """Checks that the only error is one readable line that names what is wrong."""
  (line,) = errors
  assert line.startswith("error: ") and names in line
  assert line.isprintable() and len(line) < 2500


def run_program(*arguments, **environment):
  """Runs the program; returns its status and the lines of its standard error."""
  finished = subprocess.run(
    [sys.executable, "-m", "tf_largebatch.train", *arguments],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    encoding="utf-8",
    timeout=120,
    check=False,
  )
  return finished.returncode, finished.stderr.splitlines()


def check_program(directory, names, *arguments, **environment):
  """Checks that the program refuses before it imports TensorFlow, and leaves a run alone."""
  work_dir = directory / "run"
  work_dir.mkdir()
  for name in ("recipe.json", "result.json", "metrics.jsonl", "flags.txt", "model.keras"):
    (work_dir / name).write_text("precious")
  before = contents(directory)
  status, errors = run_program(f"--work_dir={work_dir}", *SMALL, *arguments, **environment)
  assert status == 1
  check_line(errors, names)  # TensorFlow would have written more lines.
  assert contents(directory) == before


def check_main(capfd, work_dir, names, *arguments, watched=None):
  """Checks the same of `main` in this process, where any other exception fails the test.

  Args:
    watched: a directory, other than work_dir, whose contents must stay; new files are allowed.
  """
  before = contents(watched or work_dir)
  # The thread that waits for signals ends slowly, and these tests do not need it.
  unwatched = mock.patch.object(train.StopRequest, "watch_signals", contextlib.nullcontext)
  with unwatched, flagsaver.flagsaver():
    argv = command_line.parse_flags(["train", f"--work_dir={work_dir}", *arguments])
    assert train.main(argv) == 1
  lines = capfd.readouterr().err.splitlines()
  check_line([line for line in lines if line.startswith("error: ")], names)
  assert not any("Traceback" in line for line in lines)
  after = contents(watched or work_dir)
  assert before == ({path: after.get(path) for path in before} if watched else after)


def recipe_of(*arguments):
  with flagsaver.flagsaver():
    flags.FLAGS(["train", *arguments])
    return command_line.recipe_from_flags()


def replace(name, content):
  """Returns a change of a directory: puts a file there, or a directory if `content` is None."""

  def change(directory):
    path = directory / name
    if path.is_dir():
      shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content is None:
      path.mkdir(parents=True)
      (path / "notes.txt").write_text("precious")
    else:
      path.write_bytes(content)

  return change
