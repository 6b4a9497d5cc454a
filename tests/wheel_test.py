"""The wheel, installed into a fresh environment with nothing but what it declares, trains."""

import json
import os
import subprocess
import sys
import venv
import zipfile

import pytest

from tests.launching import ROOT, SMALL, run_program

pytestmark = pytest.mark.xdist_group("wheel")


def run(*command, cwd):
  finished = subprocess.run(
    [*map(str, command)],
    cwd=cwd,
    # Neither the repository nor the packages of this environment.
    env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert finished.returncode == 0, finished.stderr[-3000:]
  return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  directory = tmp_path_factory.mktemp("wheel")
  pip = [sys.executable, "-m", "pip", "--quiet"]
  # From a copy of what git tracks: setuptools builds in the source directory.
  source = directory / "source"
  source.mkdir()
  for name in ("pyproject.toml", "README.md", "LICENSE", "tf_largebatch"):
    run("cp", "-r", ROOT / name, source, cwd=directory)
  run(*pip, "wheel", "--no-deps", "--wheel-dir", directory, source, cwd=directory)
  (path,) = directory.glob("*.whl")
  return path


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
  package = ROOT / "tf_largebatch"
  expected = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
  names = zipfile.ZipFile(wheel).namelist()
  assert {name for name in names if ".dist-info/" not in name} == {
    *expected,
    "tf_largebatch/py.typed",
  }


def test_a_fresh_environment_trains(wheel, tmp_path):
  environment = tmp_path / "environment"
  venv.create(environment, with_pip=True)
  python = environment / "bin" / "python"
  # Constraints choose versions; which packages there are, the wheel alone says.
  constraints = ["--constraint", ROOT / "requirements.txt"]
  run(python, "-m", "pip", "install", "--quiet", "--no-compile", *constraints, wheel, cwd=tmp_path)
  command = environment / "bin" / "tf-largebatch-train"
  flags = (*SMALL, "--workers=2", "--epochs=1", f"--work_dir={tmp_path / 'run'}")
  run(command, *flags, cwd=tmp_path)
  assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


def test_public_names_are_importable_from_the_top():
  found = run_program(
    "import json, sys, tf_largebatch\n"
    "from tf_largebatch import Recipe, RunOptions\n"
    "light = 'tensorflow' not in sys.modules and 'keras' not in sys.modules\n"
    "names = [getattr(tf_largebatch, name).__name__ for name in tf_largebatch.__all__]\n"
    "try:\n  tf_largebatch.Receipt\nexcept AttributeError as error:\n  wrong = str(error)\n"
    "print(json.dumps([light, names, tf_largebatch.__all__, wrong]))"
  )
  light, names, public, wrong = found
  assert light and names == public and {"Recipe", "MomentumCorrectedSGD"} <= set(public)
  assert "Receipt" in wrong
