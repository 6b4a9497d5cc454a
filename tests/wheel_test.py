"""The wheel, installed into a fresh environment with nothing but what it declares, trains."""

import email
import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement

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


def closure(wheel):
  """Returns what pip would install for the wheel, at this environment's versions."""
  declared = email.message_from_bytes(
    next(
      archive.read(name)
      for archive in [zipfile.ZipFile(wheel)]
      for name in archive.namelist()
      if name.endswith(".dist-info/METADATA")
    )
  ).get_all("Requires-Dist")
  found, visited, left = {}, set(), [(each, "") for each in declared]
  while left:
    line, extra = left.pop()
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
      continue
    distribution = metadata.distribution(requirement.name)
    assert distribution.version in requirement.specifier, line
    for needed in ("", *requirement.extras):
      if (distribution.name, needed) not in visited:
        visited.add((distribution.name, needed))
        left += [(each, needed) for each in distribution.requires or []]
    found[distribution.name] = distribution
  return found.values()


def link(distribution, site_packages):
  """Puts links to a distribution's files, and to what Python compiled of them, into a directory."""
  for file in distribution.files:
    source, target = file.locate(), site_packages / file
    if ".." in file.parts or target.exists():
      continue  # A program of the environment's bin/, or a file that two distributions share.
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)
    compiled = source.parent / "__pycache__"
    if file.suffix == ".py" and compiled.exists() and not (target.parent / compiled.name).exists():
      (target.parent / compiled.name).symlink_to(compiled)


def test_a_fresh_environment_trains(wheel, tmp_path):
  environment = tmp_path / "environment"
  venv.create(environment, with_pip=False)
  python = environment / "bin" / "python"
  (site_packages,) = environment.glob("lib/python*/site-packages")
  # Links to installed packages instead of a minute of pip: which ones, the wheel alone says.
  for distribution in closure(wheel):
    link(distribution, site_packages)
  pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-compile"]
  run(*pip, "--no-deps", "--no-index", wheel, cwd=tmp_path)
  command = environment / "bin" / "tf-largebatch-train"
  flags = (*SMALL, "--workers=2", "--epochs=1", f"--work_dir={tmp_path / 'run'}")
  run(command, *flags, cwd=tmp_path)
  assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4
  missing = subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False)
  assert b"No module named 'pytest'" in missing.stderr


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
