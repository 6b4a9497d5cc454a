"""Tests of `tools.replication` on made-up results."""

import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from tests.launching import ROOT
from tests.tools.studies.made_up_results import (
  GROUPS,
  KN,
  make_recipe,
  read,
  write_all,
  write_result,
)
from tf_largebatch.errors import UserError
from tools import replication
from tools.studies import claims, figures


def test_report_and_pictures(tmp_path, monkeypatch):
  results = str(write_all(tmp_path / "results", GROUPS))
  replication.replicate(results, str(tmp_path / "one/report.md"))
  # Drawing takes most of the time: the second report draws one picture again.
  drawn = {path.stem: path.read_bytes() for path in (tmp_path / "one/report").iterdir()}
  again = figures.draw_figure_1(read(results))
  monkeypatch.setattr(figures, "draw", lambda _: {**drawn, "figure1": again})
  replication.replicate(results, str(tmp_path / "two/report.md"))
  report = (tmp_path / "one/report.md").read_text()
  rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| **")]
  verdicts = {row[0].split("**")[1]: row[-1].strip(" |*") for row in rows}
  assert verdicts == {
    **dict.fromkeys(("a1", "a2", "a3", "a4", "a5", "d1", "d2", "d3", "f2", "e"), "reproduced"),
    "f1": "not reproduced",
  }
  assert claims.__doc__[claims.__doc__.index("equal(A, B)") :].strip() in report
  assert "our break lies in (512, 1024], that is (32, 64] times the baseline's" in report
  assert "resnet20 on fashion_mnist (60000 training images of 28×28) with n = 16" in report
  assert "kn = 512, the peak rate is 3.2 (" in report
  assert "| table1/fashion_mnist_kn64_seed1.json | 10.10 % | 100 | `0123456789ab` |" in report
  pictures = ("correction", "figure1", "figure3", "known_number", "table1")
  names = sorted(["report.md", *(f"report/{name}.png" for name in pictures)])
  for folder in (tmp_path / "one", tmp_path / "two"):
    files = (path for path in folder.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder).as_posix() for path in files) == names
  for name in names:
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    if name.endswith(".png"):
      assert f"]({name})" in report
      picture = image.imread(tmp_path / "one" / name)
      assert picture.shape[1] >= 1200
      assert 0.02 < np.mean(picture[..., :3].min(axis=2) < 0.9) < 0.5  # Neither blank nor filled.


def test_a_damaged_file_gets_one_line_and_nothing_is_written(tmp_path):
  path = write_result(tmp_path, make_recipe(f"{KN}16"), f"{KN}16", 0.1)
  path.write_text(path.read_text()[:-9])
  done = subprocess.run(
    [sys.executable, "-m", "tools.replication", f"--results_dir={tmp_path}", "--output=new/r.md"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {path} cannot be read (")
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "new").exists()
  with pytest.raises(UserError, match="holds no STUDY/"):
    replication.replicate(str(tmp_path / "nothing"), str(tmp_path / "r.md"))
  with pytest.raises(UserError, match=r"ends in \.md"):
    replication.replicate(str(tmp_path), str(tmp_path / "r.html"))


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, "draw", lambda groups: {"figure1": b""})
  write_result(tmp_path / "results", make_recipe(f"{KN}16"), f"{KN}16", 0.1)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--output=.* cannot be written"):
    replication.replicate(str(tmp_path / "results"), str(tmp_path / "file" / "r.md"))
