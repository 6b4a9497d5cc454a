"""The binary: every mistake gets one clear line and a status other than 0."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from tf_largebatch import train
from tf_largebatch.recipe import Recipe

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = (
  "--dataset=synthetic",
  "--train_split=train[:40]",
  "--validation_split=validation[:20]",
  "--image_size=8",
  "--network=resnet20",
  "--workers=2",
  "--per_worker_batch_size=10",
  "--epochs=1",
  "--warmup_epochs=0",
  "--decay_epochs=",
)


def run_main(*arguments):
  with flagsaver.flagsaver():
    return train.main(flags.FLAGS(["train", *arguments]))


def recipe_of(*arguments):
  with flagsaver.flagsaver():
    flags.FLAGS(["train", *arguments])
    return train.recipe_from_flags()


def run_binary(*arguments, environment=None):
  return subprocess.run(
    [sys.executable, "-m", "tf_largebatch.train", *arguments],
    cwd=ROOT,
    env={**os.environ, **(environment or {})},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_every_field_of_the_recipe_is_a_flag_with_its_default():
  assert recipe_of() == Recipe()


def test_flags_set_fields():
  recipe = recipe_of(
    "--workers=8", "--decay_epochs=1,2.5", "--epochs=3", "--warmup_epochs=1", "--nonesterov"
  )
  expected = Recipe(workers=8, decay_epochs=(1, 2.5), epochs=3, warmup_epochs=1, nesterov=False)
  assert recipe == expected


REFUSED = {
  "n = 0": (["--per_worker_batch_size=0"], "per_worker_batch_size=0"),
  "k = 0": (["--workers=0"], "workers=0"),
  "decays out of order": (["--epochs=9", "--decay_epochs=5,3"], "decay_epochs=(5.0, 3.0)"),
  "decay no number": (["--decay_epochs=5,x"], "decay_epochs=5,x"),
  "warmup too long": (["--workers=64", "--epochs=3", "--warmup_epochs=4"], "warmup_epochs=4.0"),
  "unknown dataset": (["--dataset=cifar11"], "cifar11"),
  "unknown network": (["--network=resnet51"], "resnet51"),
  "split missing": (["--validation_split=test"], "'test'"),
  "argument": (["somewhere"], "'somewhere'"),
  "no work_dir": (["--work_dir="], "--work_dir"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path, capsys):
  arguments, names = REFUSED[case]
  arguments = [f"--work_dir={tmp_path / 'run'}", f"--data_dir={tmp_path}", *SMALL, *arguments]
  assert run_main(*arguments) == 1
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1 and names in errors[0]
  assert not (tmp_path / "run").exists()


def test_an_unwritable_work_directory_is_refused(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert run_main(f"--work_dir={tmp_path / 'file' / 'run'}", *SMALL) == 1
  assert f"work_dir={tmp_path / 'file' / 'run'} cannot be written" in capsys.readouterr().err


def test_a_work_directory_that_holds_something_else_is_refused(tmp_path, capsys):
  (tmp_path / "recipe.json").write_text("[1, 2")
  assert run_main(f"--work_dir={tmp_path}", *SMALL) == 1
  error = capsys.readouterr().err
  assert "recipe.json is no recipe of a run" in error and "Traceback" not in error
  assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
  "arguments, environment, names",
  [
    (["--flagfile={}"], {}, "no_such_flag"),
    (["--wokers=8"], {}, "wokers"),
    (["--workers=many"], {}, "many"),
    (["--epochs=3", "--warmup_epochs=4", "--work_dir=x"], {}, "warmup_epochs=4.0"),
    (["--work_dir=x"], {"TF_CONFIG": "{"}, "TF_CONFIG"),
  ],
)
def test_the_process_itself(arguments, environment, names, tmp_path):
  """… ends with a status other than 0 and no traceback, before TensorFlow is imported."""
  flagfile = tmp_path / "bad.flags"
  flagfile.write_text("--workers=8\n--no_such_flag=1\n")
  finished = run_binary(*[a.format(flagfile) for a in arguments], environment=environment)
  assert finished.returncode == 1
  assert names in finished.stderr and "Traceback" not in finished.stderr
  assert "oneDNN" not in finished.stderr


def test_helpfull_tells_every_flag():
  finished = run_binary("--helpfull")
  for field in dataclasses.fields(Recipe):
    assert f"--{field.name}:" in finished.stdout or f"--[no]{field.name}:" in finished.stdout
    assert len(field.metadata["help"]) > 15


def test_a_run_and_its_repetition_from_flags_txt(tmp_path, capsys):
  assert run_main(f"--work_dir={tmp_path / 'one'}", *SMALL) == 0
  printed = capsys.readouterr().out
  result = json.loads((tmp_path / "one" / "result.json").read_text())
  assert result["weights_sha256"] in printed and "tensorboard" in printed
  flagfile = f"--flagfile={tmp_path / 'one' / 'flags.txt'}"
  assert run_main(flagfile, f"--work_dir={tmp_path / 'two'}") == 0
  again = json.loads((tmp_path / "two" / "result.json").read_text())
  assert again["weights_sha256"] == result["weights_sha256"]
