"""The binary: its help, and a run that `flags.txt` repeats.

`bad_input/` tests that every mistake ends in one clear line.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
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


@pytest.mark.parametrize(
  "cores, tasks, given, expected",
  [
    ({3}, 2, None, "2"),  # TensorFlow would start one thread, which the all-reduce blocks.
    ({3}, 2, "1", "1"),  # The user's.
    ({3}, 1, None, None),
    ({3, 5}, 2, None, None),
  ],
)
def test_a_task_on_one_core_has_two_inter_op_threads(monkeypatch, cores, tasks, given, expected):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
  environ = {} if given is None else {"TF_NUM_INTEROP_THREADS": given}
  monkeypatch.setattr(os, "environ", environ)
  train.set_environment(Recipe(), tasks)
  assert environ.get("TF_NUM_INTEROP_THREADS") == expected


def test_the_start_does_not_import_matplotlib():
  """Keras would, for two functions that draw; it can be imported afterwards."""
  loaded = run_program(
    "import json, sys; from absl import flags; from tf_largebatch import train;"
    "flags.FLAGS(['train']); train._import_trainer(); loaded = sorted(sys.modules);"
    "import matplotlib; print(json.dumps(loaded))"
  )
  assert "keras" in loaded and "matplotlib" not in loaded
