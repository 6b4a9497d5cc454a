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
  "affinity, quota, workers, tasks, given, intra, inter",
  [
    # TensorFlow would start one inter-op thread, which the all-reduce blocks.
    (1, 1, 1, 2, None, "1", "2"),
    (1, 1, 1, 2, "1", "1", "1"),  # The user's.
    (1, 1, 1, 1, None, None, None),
    (2, 2, 1, 2, None, None, None),
    (2, 2, 2, 1, None, "1", None),  # Two passes at once.
    (8, 8, 2, 1, None, None, None),
    # TensorFlow would start 8 of each.
    (8, 3, 2, 1, None, "3", "3"),
    (8, 2, 2, 1, None, "1", "2"),
  ],
)
def test_threads_fit_the_cores(monkeypatch, affinity, quota, workers, tasks, given, intra, inter):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
  monkeypatch.setattr(train, "usable_cores", lambda: quota)
  environ = {} if given is None else {"TF_NUM_INTEROP_THREADS": given}
  monkeypatch.setattr(os, "environ", environ)
  train.set_environment(Recipe(workers=workers), tasks)
  found = [environ.get(f"TF_NUM_{kind}_THREADS") for kind in ("INTRAOP", "INTEROP")]
  assert found == [intra, inter]


def test_the_start_does_not_import_matplotlib():
  """Keras would, for two functions that draw; it can be imported afterwards."""
  loaded = run_program(
    "import json, sys; from absl import flags; from tf_largebatch import train;"
    "flags.FLAGS(['train']); train._import_trainer(); loaded = sorted(sys.modules);"
    "import matplotlib; print(json.dumps(loaded))"
  )
  assert "keras" in loaded and "matplotlib" not in loaded
