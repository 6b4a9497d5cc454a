"""Bad work directories: one clear line each, and nothing overwritten."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess

import pytest

from tests.bad_input.checks import (
  LONG,
  SMALL,
  check_line,
  check_main,
  contents,
  recipe_of,
  replace,
  run_program,
)
from tests.bad_input.stored_run import store_run
from tf_largebatch.models.networks import build_model
from tf_largebatch.optim.optimizers import build_optimizer
from tf_largebatch.training import resolution
from tf_largebatch.training.checkpoint import Checkpoints
from tf_largebatch.training.metrics import MetricsWriter


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "stored"
  store_run(directory)
  return directory


@pytest.fixture
def run_dir(stored_run, tmp_path):
  """A copy of the stored run that is not complete."""
  directory = tmp_path / "run"
  shutil.copytree(stored_run, directory)
  (directory / "result.json").unlink()
  return directory


def edit(**fields):
  """Returns a change of a work directory: sets fields of its recipe, or removes them (None)."""

  def change(directory):
    facts = json.loads((directory / "recipe.json").read_text())
    recipe = facts["recipe"] | fields
    facts["recipe"] = {name: recipe[name] for name in recipe if fields.get(name, 0) is not None}
    (directory / "recipe.json").write_text(json.dumps(facts))

  return change


def without_a_recipe(directory):
  (directory / "recipe.json").unlink()


DEEP = b"[" * 100_000


# Case → (change of the work directory of an incomplete run, part of the error).
WORK_DIRS = {
  "another recipe": (edit(seed=7), "seed is 7 there and 0 now"),
  "an older schema": (edit(epochs=None), "epochs is 90 there and 1 now"),
  "a newer schema": (edit(shoe_size=LONG), "'shoe_size'"),
  "k that is text": (edit(workers="many"), "workers='many'"),
  "recipe.json empty": (replace("recipe.json", b""), "recipe.json does not hold the recipe"),
  "recipe.json truncated": (
    replace("recipe.json", b'{"recipe": {"work'),
    "recipe.json does not hold the recipe",
  ),
  "recipe.json of a list": (
    replace("recipe.json", b'{"recipe": [1]}'),
    "recipe.json does not hold the recipe",
  ),
  "recipe.json of another program": (replace("recipe.json", b'{"cake": 1}'), "'recipe'"),
  "recipe.json not UTF-8": (
    replace("recipe.json", b"\xff\xfe{}"),
    "recipe.json does not hold the recipe",
  ),
  "recipe.json nested too deep": (replace("recipe.json", DEEP), "nested too deep"),
  "recipe.json a directory": (replace("recipe.json", None), "recipe.json does not hold the recipe"),
  "no recipe.json": (without_a_recipe, "flags.txt and metrics.jsonl and checkpoints"),
  "result.json empty": (replace("result.json", b""), "result.json is not the result"),
  "result.json truncated": (
    replace("result.json", b'{"status": "comp'),
    "result.json is not the result",
  ),
  "result.json of a list": (replace("result.json", b"[[1, 2]]"), "result.json is not the result"),
  "result.json of another program": (
    replace("result.json", b"{}"),
    "result.json is not the result",
  ),
  "result.json not UTF-8": (replace("result.json", b"\xff"), "result.json is not the result"),
  "result.json nested too deep": (replace("result.json", DEEP), "nested too deep"),
  "result.json a directory": (replace("result.json", None), "result.json is not the result"),
  ".lock a directory": (replace(".lock", None), "cannot be written"),
  "another network's checkpoint": (lambda directory: None, "step-0000000002.json holds other"),
  "checkpoints a file": (replace("checkpoints", b"mine"), "checkpoints cannot be listed"),
}


@pytest.mark.parametrize("case", WORK_DIRS)
def test_work_directories(case, run_dir, capfd):
  change, names = WORK_DIRS[case]
  change(run_dir)
  check_main(capfd, run_dir, names, *SMALL)


def test_the_program_itself_with_tensorflow(run_dir):
  """An error that is found after TensorFlow is imported ends the process as it ends `main`."""
  edit(seed=7)(run_dir)
  before = contents(run_dir)
  status, lines = run_program(f"--work_dir={run_dir}", *SMALL)
  assert status == 1 and not any("Traceback" in line for line in lines)
  check_line([line for line in lines if line.startswith("error: ")], "seed is 7 there and 0 now")
  assert contents(run_dir) == before


ELSEWHERE = {
  "a file": ("{}/file", "file is not a directory"),
  "under a file": ("{}/file/run", "file is not a directory"),
  "a device": ("/dev/null", "work_dir=/dev/null cannot be written"),
  "a directory that nobody can write": ("/proc/run", "work_dir=/proc/run cannot be written"),
  "a name too long": ("{}/" + "x" * 300, "too long"),
  "a newline": ("{}/file/a\nb", r"file/a\nb' cannot be a directory's name"),
  "an unknown scheme": ("foo://x/run", "scheme 'foo' not implemented"),
  "a scheme that TensorFlow dropped": ("s3://x/run", "scheme 's3' not implemented"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_impossible_work_directories(case, tmp_path, capfd):
  name, names = ELSEWHERE[case]
  (tmp_path / "file").write_text("precious")
  check_main(capfd, name.format(tmp_path), names, *SMALL, watched=tmp_path)


@contextlib.contextmanager
def mounted(directory, options):
  if os.geteuid() != 0:
    pytest.skip("only root can mount a small disk")
  directory.mkdir()
  (directory / "notes.txt").write_text("precious")  # Hidden by the mounted disk.
  if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]).returncode:
    pytest.skip("this sandbox does not allow mounts")
  try:
    yield
  finally:
    subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("options", ["ro", "size=4k", "size=12k"])
def test_a_disk_that_is_read_only_or_full(options, tmp_path, capfd):
  """12 kB hold the probe, but not recipe.json beside the lock."""
  disk = tmp_path / "disk"
  with mounted(disk, options):
    if options == "size=12k":
      (disk / "notes.txt").write_text("precious")
    check_main(capfd, disk / "run", "cannot be written", *SMALL, watched=disk)


def test_a_work_directory_in_use(run_dir, capfd):
  with open(run_dir / ".lock", "wb") as lock:
    lock.write(b"\xff\nme")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    check_main(capfd, run_dir, r"in use by a run (�\nme)", *SMALL)


def test_a_damaged_metrics_file_does_not_end_a_run(run_dir, caplog):
  """The run's state does not depend on them; the damaged file is kept beside the new one."""
  path = run_dir / "metrics.jsonl"
  good = path.read_bytes().splitlines(keepends=True)
  damaged = b"".join(
    [good[0], b"\xff\0junk\n", b'{"kind": "eval", "step": 1}\n', DEEP + b"\n", *good[1:]]
  )
  path.write_bytes(damaged)
  with caplog.at_level("WARNING", logger="absl"), MetricsWriter(str(run_dir), {}, 2, 2):
    pass
  assert path.read_bytes() == b"".join(good)
  assert (run_dir / "metrics.jsonl.damaged").read_bytes() == damaged
  assert "3 lines of" in caplog.text


def test_a_checkpoint_past_the_end(run_dir, capfd):
  """The checkpoint of another run, copied there."""
  recipe = resolution.resolve(recipe_of(*SMALL), 1, "")
  model = build_model(recipe, 1000)
  optimizer = build_optimizer(recipe, 40)
  optimizer.build(model.trainable_variables)
  checkpoints = Checkpoints(str(run_dir / "checkpoints"), model, optimizer)
  checkpoints.save(3, 1.0)
  checkpoints.wait()
  check_main(capfd, run_dir, "step 3, past the 2", *SMALL)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_file_or_directory_in_place_of_the_metrics(name, run_dir, capfd):
  shutil.rmtree(run_dir / "checkpoints")
  (run_dir / "tensorboard").mkdir()
  replace(name, None if name == "metrics.jsonl" else b"mine")(run_dir)
  check_main(capfd, run_dir, name, *SMALL)
