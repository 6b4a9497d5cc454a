"""Tests of `tools.compare_runs` on small work directories with known curves."""

import json
import os
import re
import struct
import subprocess
import sys

import pytest

from tests.launching import ROOT
from tests.tools.studies.made_up_runs import make_run
from tf_largebatch.errors import UserError
from tools import compare_runs
from tools.studies import curve_report


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
  """Skips drawing, which takes most of the time; the tests of the picture undo this."""
  monkeypatch.setattr(curve_report, "draw", lambda *_: b"")


def _compare(root, *work_dirs, tolerance=0.01, baseline=None):
  """Returns what is printed and what the JSON file holds."""
  text = compare_runs.compare_runs(list(work_dirs), str(root / "out"), tolerance, baseline)
  return text, json.loads((root / "out" / "compare_runs.json").read_text())


def _verdict(tmp_path, differences, **options):
  """Compares a group that differs by these points from a baseline of 30 %."""
  base = make_run(tmp_path, "base", [0.3] * len(differences))
  other = [0.3 + each / 100 for each in differences]
  other = make_run(tmp_path, "other", other, workers=16, **options)
  text, numbers = _compare(tmp_path, base, other)
  return text, numbers["groups"][1]["against_baseline"]


def test_final_error_is_the_median_of_the_last_five_epochs(tmp_path):
  seven = make_run(tmp_path, "seven", [0.9, 0.8, 0.21, 0.25, 0.22, 0.24, 0.20])
  four = make_run(tmp_path, "four", [0.5, 0.3, 0.1, 0.4], seed=1, epochs=7)
  text, numbers = _compare(tmp_path, seven, four)
  runs = numbers["groups"][0]["runs"]
  assert runs[0]["final_error"] == 0.22
  assert runs[0]["final_epochs"] == [3, 4, 5, 6, 7]
  assert runs[1]["final_error"] == pytest.approx(0.35)
  assert runs[1]["final_epochs"] == [1, 2, 3, 4]
  assert re.search(r"seven +0 +7 of 7 +22\.00 % +epochs 3 to 7", text)
  assert re.search(r"four +1 +4 of 7 +35\.00 % +epochs 1 to 4", text)


def test_groups_final_error_is_mean_and_sample_standard_deviation(tmp_path):
  runs = [
    make_run(tmp_path, f"seed{seed}", [error], seed=seed)
    for seed, error in enumerate((0.20, 0.22, 0.27))
  ]
  text, numbers = _compare(tmp_path, *runs)
  final = numbers["groups"][0]["final_error"]
  # ((3² + 1² + 4²) / 2)^½ = 13^½; over 3 it would be 2.94.
  assert final == pytest.approx({"mean": 0.23, "standard_deviation": 0.0360555, "seeds": 3})
  assert "23.00 ± 3.61 %" in text
  assert "All runs have one recipe" in text
  assert "±" not in _compare(tmp_path, runs[0])[0]


def test_groups_final_error_is_of_complete_runs_alone(tmp_path):
  done = make_run(tmp_path, "done", [0.4, 0.2])
  running = make_run(tmp_path, "running", [0.4], seed=1, epochs=2, complete=False)
  text, numbers = _compare(tmp_path, done, running)
  assert numbers["groups"][0]["final_error"]["seeds"] == 1
  assert re.search(r"kn 256 \(k=8, n=32\) +1 seed +30\.00 %\n", text)
  assert re.search(r"running +1 +1 of 2 +40\.00 %, incomplete", text)
  text, _ = _compare(tmp_path, running)
  assert re.search(r"1 seed +40\.00 %, so far", text)


@pytest.mark.parametrize(
  ("differences", "verdict", "from_epoch", "words"),
  [
    ([0.5, 0, -0.8], "follows", 1, "follows its baseline kn 256 (k=8): its validation error "
     "matches at every epoch, 1 to 3 (within 0.80 points; tolerance 1)."),
    ([5, 0, 3, -1, 1], "follows", 4, "matches from epoch 4 on (within 1.00 points; tolerance 1)."),
    ([5, 4, 1.01, 1], "follows", 4, "meets its baseline kn 256 (k=8): its validation error matches "
     "only at epoch 4, the last compared (within 1.00 points; tolerance 1)."),
    ([5, 4, 1.01, 1.01], "never matches", None, "never matches its baseline kn 256 (k=8): its "
     "validation error is above by at least 1.01 points (1.01 at epoch 4; tolerance 1)."),
    ([-5, -4], "never matches", None, "is below by at least 4.00 points (4.00 at epoch 2;"),
    ([-5, 4], "never matches", None, "sometimes above, sometimes below, by at least 4.00 points"),
    ([0, 1, 14.2, 3], "leaves", None, "leaves its baseline kn 256 (k=8): its validation error "
     "matched through epoch 2, and from epoch 3 on is above by up to 14.20 points (3.00 at epoch"),
    ([0, -3], "leaves", None, "matched through epoch 1, and at epoch 2 is below by "
     "3.00 points (tolerance 1)."),
    ([9, 0, -3, -2], "leaves", None, "matched at 1 of 4 epochs, last 2, and from epoch 3 on is"),
  ],
)  # fmt: skip
def test_verdict(tmp_path, differences, verdict, from_epoch, words):
  text, comparison = _verdict(tmp_path, differences)
  for kind in ("validation", "training"):
    assert comparison[kind]["verdict"] == verdict
    assert comparison[kind]["matches_from_epoch"] == from_epoch
    found = [100 * each["difference"] for each in comparison[kind]["differences"]]
    assert found == pytest.approx(differences)
  assert words in text
  assert "Its training error" in text and "But" not in text


def test_a_difference_of_the_tolerance_matches_and_a_little_more_does_not(tmp_path):
  base = make_run(tmp_path, "base", [0.30, 0.30])
  other = make_run(tmp_path, "other", [0.31, 0.31001], workers=16)
  _, numbers = _compare(tmp_path, base, other)
  rows = numbers["groups"][1]["against_baseline"]["validation"]["differences"]
  assert [row["match"] for row in rows] == [True, False]
  assert [row["band"] for row in rows] == [None, None]
  _, numbers = _compare(tmp_path, base, other, tolerance=0.0101)
  rows = numbers["groups"][1]["against_baseline"]["validation"]["differences"]
  assert [row["match"] for row in rows] == [True, True]


def test_a_difference_within_the_seeds_band_or_the_tolerance_matches(tmp_path):
  # At epoch 1 the band is 2 (0.0002 (1/2 + 1/1))^½ = 0.0346, at epoch 2 a hundredth of that.
  base = [
    make_run(tmp_path, "b0", [0.300, 0.3000]),
    make_run(tmp_path, "b1", [0.320, 0.3002], seed=1),
  ]
  near = make_run(tmp_path, "near", [0.344, 0.3100], workers=16)
  far = make_run(tmp_path, "far", [0.346, 0.3102], workers=32)
  text, numbers = _compare(tmp_path, *base, near, far)
  near, far = (each["against_baseline"]["validation"] for each in numbers["groups"][1:])
  assert [each["band"] for each in near["differences"]] == pytest.approx([0.0346410, 0.000346410])
  assert [each["match"] for each in near["differences"]] == [True, True]
  assert [each["match"] for each in far["differences"]] == [False, False]
  assert "(within 3.40 points; tolerance 1, seeds' band up to 3.46)" in text


def test_a_mean_is_over_the_seeds_that_have_the_epoch(tmp_path):
  first = make_run(tmp_path, "first", [0.3, 0.2])
  second = make_run(tmp_path, "second", [0.5], seed=1, epochs=2, complete=False)
  _, numbers = _compare(tmp_path, first, second)
  curve = numbers["groups"][0]["curves"]["validation"]
  assert [each["mean"] for each in curve] == pytest.approx([0.4, 0.2])
  assert [each["seeds"] for each in curve] == [2, 1]


def test_training_and_validation_may_disagree(tmp_path):
  base = make_run(tmp_path, "base", [0.3, 0.2])
  other = make_run(tmp_path, "other", [0.4, 0.3], [0.3, 0.2], workers=16)
  text, _ = _compare(tmp_path, base, other)
  assert "never matches its baseline" in text
  assert "But its training error matches at every epoch, 1 to 2 (within 0.00" in text


def test_groups_are_recipes_but_for_the_seed_labelled_by_what_differs(tmp_path):
  runs = [
    make_run(tmp_path, "a", [0.3]),
    make_run(tmp_path, "b", [0.3], workers=16),
    make_run(tmp_path, "c", [0.3], seed=1),
    make_run(tmp_path, "d", [0.3], workers=16, momentum=0.0, decay_epochs=(0.5, 0.75)),
  ]
  _, numbers = _compare(tmp_path, *runs)
  labels = [group["label"] for group in numbers["groups"]]
  assert labels == [
    "kn 256 (k=8)",
    "kn 512 (k=16)",
    "kn 512 (k=16, decay_epochs=0.5,0.75, momentum=0.0)",
  ]
  assert [run["seed"] for run in numbers["groups"][0]["runs"]] == [0, 1]

  _, numbers = _compare(tmp_path, *runs, baseline=f"{runs[1]}/")
  assert [group["label"] for group in numbers["groups"]] == [
    "kn 512 (k=16)",
    "kn 256 (k=8)",
    "kn 512 (k=16, decay_epochs=0.5,0.75, momentum=0.0)",
  ]
  _, numbers = _compare(tmp_path, runs[3], runs[1])
  labels = [group["label"] for group in numbers["groups"]]
  assert labels == ["decay_epochs=0.5,0.75, momentum=0.0", "decay_epochs=30,60,80, momentum=0.9"]


def test_what_was_compared_of_a_run_that_still_trains(tmp_path):
  base = make_run(tmp_path, "base", [0.6, 0.5, 0.4, 0.3])
  running = {"epochs": 4, "complete": False, "warmup": "gradual"}
  warm = make_run(tmp_path, "warm", [0.7, 0.6], workers=16, warmup_epochs=2.0, **running)
  text, numbers = _compare(tmp_path, base, warm)
  assert "Only epochs 1 to 2 of 4 could be compared." in text
  assert "That is within the warmup (2 epochs), during which curves may differ." in text
  assert f"Note: {warm} is incomplete: epoch 2 of 4." in text
  assert "Final error" not in text
  assert numbers["groups"][1]["warmup_ends"] == 2

  past = make_run(tmp_path, "past", [0.7, 0.6], workers=32, warmup_epochs=1.9, **running)
  assert "within the warmup" not in _compare(tmp_path, base, past)[0]
  # A minibatch of 256, the reference's, takes no warmup.
  small = make_run(tmp_path, "small", [0.7, 0.6], momentum=0.0, warmup_epochs=3.0, **running)
  assert "within the warmup" not in _compare(tmp_path, base, small)[0]


def test_final_errors_of_complete_runs_are_stated(tmp_path):
  text, _ = _verdict(tmp_path, [0, 2])
  assert "Final error 31.00 % against 30.00 %." in text


def test_other_tasks_are_compared_with_a_warning(tmp_path):
  base = make_run(tmp_path, "base", [0.3])
  other = make_run(tmp_path, "other", [0.3], network="resnet20", validation_split="test")
  text, _ = _compare(tmp_path, base, other)
  assert "Note: The runs differ in network (resnet50, resnet20)" in text
  assert "Note: The runs differ in validation_split (None, test)" in text


def test_page_is_self_contained_and_picture_is_a_png(tmp_path, monkeypatch):
  monkeypatch.undo()
  base = make_run(tmp_path, "base", [0.9, 0.3])
  other = make_run(tmp_path, "other", [0.9, 0.4], dataset="<script>&$x")
  _compare(tmp_path, base, other)
  assert {each.name for each in (tmp_path / "out").iterdir()} == {
    f"compare_runs.{suffix}" for suffix in ("png", "html", "json")
  }
  picture = (tmp_path / "out" / "compare_runs.png").read_bytes()
  assert picture[:8] == b"\x89PNG\r\n\x1a\n"
  assert all(800 <= side <= 3000 for side in struct.unpack(">II", picture[16:24]))
  assert len(picture) > 20_000  # Blank, it would have a few thousand bytes.

  page, images = re.subn(
    r'src="data:image/png;base64,[\w+/=]{20000,}"',
    "",
    (tmp_path / "out" / "compare_runs.html").read_text(),
  )
  assert images == 1
  for external in ("http", "//", "src", "href", "url(", "@import", "<script", "<link"):
    assert external not in page
  assert "<title>Training curves: dataset=imagenet2012; dataset=&lt;script&gt;&amp;$x<" in page
  assert "never matches" in page or "leaves" in page
  assert "<td>40.00 %" not in page and "<td>65.00 %" in page  # (0.9 + 0.4) / 2.


def test_invalid_arguments_are_refused(tmp_path):
  base = make_run(tmp_path, "base", [0.5])
  twin = make_run(tmp_path, "twin", [0.5])
  nowhere = str(tmp_path / "nowhere")
  for arguments, options, message in (
    ((), {}, "No run was given"),
    ((base, nowhere), {}, f"{nowhere} is not a directory"),
    ((base, f"{base}/"), {}, "are the same run twice (recipe and seed 0)"),
    ((base, twin), {}, f"{base} and {twin} are the same run twice"),
    ((base,), {"baseline": twin}, f"--baseline={twin} is not one of the runs; give one of {base}."),
    ((base,), {"tolerance": 1.0}, "--tolerance=1.0 is refused"),
    ((base,), {"tolerance": -0.1}, "--tolerance=-0.1 is refused"),
    ((base,), {"tolerance": float("nan")}, "--tolerance=nan is refused"),
  ):
    with pytest.raises(UserError, match=re.escape(message)):
      _compare(tmp_path, *arguments, **options)
  assert not (tmp_path / "out").exists()


def test_the_last_line_of_a_run_that_still_trains_may_be_half_written(tmp_path):
  base = make_run(tmp_path, "base", [0.5], epochs=2, complete=False)
  with open(tmp_path / "base" / "metrics.jsonl", "a") as file:
    file.write('{"kind": "train", "st')
  assert "1 of 2" in _compare(tmp_path, base)[0]
  (tmp_path / "base" / "result.json").write_text('{"status": "complete"}')
  with pytest.raises(UserError, match="damaged in line 4 of 4"):
    _compare(tmp_path, base)


def test_an_output_directory_that_cannot_be_written_is_refused(tmp_path):
  base = make_run(tmp_path, "base", [0.5])
  (tmp_path / "file").write_text("")
  for output_dir in ("file", "file/below"):
    with pytest.raises(UserError, match=f"{output_dir} cannot be written .*; give another"):
      compare_runs.compare_runs([base], str(tmp_path / output_dir), 0.01, None)
  # A file that cannot be replaced stays as it is, and nothing partial is left beside it.
  (tmp_path / "out" / "compare_runs.png").mkdir(parents=True)
  with pytest.raises(UserError, match="cannot be written"):
    _compare(tmp_path, base)
  assert [each.name for each in (tmp_path / "out").iterdir()] == ["compare_runs.png"]


def _run_program(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, "-m", "tools.compare_runs", *arguments],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_program_prints_the_verdict(tmp_path):
  base = make_run(tmp_path, "base", [0.5, 0.3])
  other = make_run(tmp_path, "other", [0.51, 0.31], workers=16)
  done = _run_program("base", "other", f"--baseline={other}", "--tolerance=0.005", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  words = "kn 256 (k=8) never matches its baseline kn 512 (k=16): its validation error is below"
  assert done.stdout.startswith(words)
  assert done.stdout.endswith("Curves: compare_runs/compare_runs.png, .html and .json\n")
  assert (tmp_path / "compare_runs" / "compare_runs.png").exists()
  assert base not in done.stdout  # Paths are printed as they were given.


def test_program_reports_a_mistake_in_one_line_before_anything_is_imported(tmp_path):
  done = _run_program(str(tmp_path))
  assert done.returncode == 1
  assert done.stderr == f"error: {tmp_path} has no recipe.json; give the --work_dir of a run.\n"
