"""`tools.verify` under the launcher, and the mistakes that it catches."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT, launch, run_module
from tools.conformance.mutations import MUTATIONS
from tools.conformance.negative_controls import make_copy
from tools.conformance.properties.checks import CHECKS, SLOW, not_covered
from tools.conformance.properties.result import Result

NAMES = [name for name in CHECKS if name not in SLOW]


# These check the network on one device; a second task would only repeat the work.
_NETWORK = ["network", "variables", "initial γ", "initial kernels"]


def test_every_property_of_a_cluster_holds_on_two_tasks(tmp_path):
  flags = ("--network=resnet20", f"--output={tmp_path / 'report.json'}")
  finished = launch(2, "tools.verify", *flags)
  assert finished.returncode == 0, finished.stdout
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["status"] == "verified" and report["cluster"]["tasks"] == 2
  names = [name for name in NAMES if name not in _NETWORK]
  assert [line["name"] for line in report["properties"]] == names
  for line in report["properties"]:
    assert line["holds"] and 0 <= line["deviation"] <= line["limit"]
  assert list(report["not_checked"]) == _NETWORK
  assert f"(of ResNet-50, not of resnet20): {', '.join(_NETWORK)}." in finished.stdout
  # Only the chief prints.
  assert finished.stdout.count(f"All {len(names)} properties hold") == 1
  assert finished.stdout.count("[task 1] property") == 0


def test_the_networks_properties_hold():
  finished = run_module("tools.verify", f"--only={','.join(_NETWORK)}", "--output=")
  assert finished.returncode == 0, finished.stdout
  assert "All 4 properties hold" in finished.stdout


@pytest.mark.parametrize("deviation, holds", [(1.0, True), (1.1, False), (np.nan, False)])
def test_a_property_holds_up_to_its_limit(deviation, holds):
  assert Result("x", deviation, 1.0, "").holds == holds


def test_other_recipes_name_what_says_nothing_about_them():
  assert not_covered("resnet50", "steps", "momentum_corrected_sgd") == {}
  for fields, expected in (
    (("resnet50", "cosine", "momentum_corrected_sgd"), {"step decay"}),
    (("resnet50", "steps", "lars"), {"weight decay", "momentum correction", "whole step"}),
    (
      ("EfficientNetV2B0", "steps", "momentum_corrected_sgd"),
      {"network", "variables", "initial γ", "initial kernels", *SLOW},
    ),
  ):
    assert not_covered(*fields).keys() == expected <= CHECKS.keys()


@pytest.mark.parametrize(
  "module, flag, expected",
  [
    (
      "tools.verify",
      "--only=aggregatoin",
      "error: --only=aggregatoin: there is no such property; use any of paper defaults",
    ),
    (
      "tools.verify",
      "--output=/nowhere/report.json",
      "error: --output=/nowhere/report.json cannot be written",
    ),
    ("tools.verify", "--decay=linear", "error: decay='linear' is unknown; use one of steps"),
    ("tools.verify", "aggregation", "error: Unexpected argument 'aggregation'"),
    (
      "tools.conformance.negative_controls",
      "--only=warmup",
      "error: --only=warmup: there is no such mistake; use any of loss over n instead of kn",
    ),
    (
      "tools.conformance.negative_controls",
      "--output=/nowhere/table.json",
      "error: --output=/nowhere/table.json cannot be written",
    ),
  ],
)
def test_a_users_mistake_gets_one_line(module, flag, expected):
  finished = run_module(module, flag)
  assert finished.returncode == 1
  assert finished.stderr.startswith(expected) and finished.stderr.count("\n") == 1


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_mistake_can_still_be_made(mutation, tmp_path):
  """The text that it replaces occurs in the package once, and the result is valid Python."""
  package = make_copy(tmp_path, mutation) / "tf_largebatch"
  for module, _, new in mutation.edits:
    source = (package / f"{module}.py").read_text()
    assert new in source
    compile(source, module, "exec")
  assert mutation.caught_by in NAMES


def test_mistakes_are_caught():
  """Two of them; `python -m tools.conformance.negative_controls` makes all."""
  names = ["decoupled decay", "shuffle per worker"]
  finished = subprocess.run(
    [
      sys.executable,
      "-m",
      "tools.conformance.negative_controls",
      "--quick",
      f"--only={','.join(names)}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  assert finished.returncode == 0, finished.stdout + finished.stderr
  for name in names:
    assert f"\n{name}" in finished.stdout
  assert "Every mistake was caught." in finished.stdout
