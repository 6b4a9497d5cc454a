"""The binary: its help, and a run that `flags.txt` repeats.

`bad_input/` tests that every mistake ends in one clear line.
"""

import dataclasses
import json
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver

from tests.launching import ROOT, SMALL, run_program
from tf_largebatch import train
from tf_largebatch.recipe import Recipe


def run_main(*arguments):
  with flagsaver.flagsaver():
    return train.main(flags.FLAGS(["train", *arguments]))


def test_helpfull_lists_every_flag():
  command = [sys.executable, "-m", "tf_largebatch.train", "--helpfull"]
  finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  for field in dataclasses.fields(Recipe):
    assert f"--{field.name}:" in finished.stdout or f"--[no]{field.name}:" in finished.stdout
    assert len(field.metadata["help"]) > 15


def test_a_run_and_its_repetition_from_flags_txt(tmp_path, capsys):
  assert run_main(f"--work_dir={tmp_path / 'one'}", *SMALL, "--workers=2", "--epochs=1") == 0
  printed = capsys.readouterr().out
  result = json.loads((tmp_path / "one" / "result.json").read_text())
  assert result["weights_sha256"] in printed and "tensorboard" in printed
  flagfile = f"--flagfile={tmp_path / 'one' / 'flags.txt'}"
  assert run_main(flagfile, f"--work_dir={tmp_path / 'two'}") == 0
  again = json.loads((tmp_path / "two" / "result.json").read_text())
  assert again["weights_sha256"] == result["weights_sha256"]


def test_the_start_does_not_import_matplotlib():
  """Keras would, for two functions that draw; it can be imported afterwards."""
  loaded = run_program(
    "import json, sys; from absl import flags; from tf_largebatch import train;"
    "flags.FLAGS(['train']); train._import_trainer(); loaded = sorted(sys.modules);"
    "import matplotlib; print(json.dumps(loaded))"
  )
  assert "keras" in loaded and "matplotlib" not in loaded
