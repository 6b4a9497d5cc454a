"""Programs whose user, directory, environment and limits are unlike a developer's."""

import io
import json
import os
import stat
import subprocess
import sys

import pytest

from tests.launching import ROOT, SMALL, run_module
from tf_largebatch.signals import print_line

_LINK = "ein Lauf η [b]*?{c} %s #1,2=3 ~"
# On any number of cores, which otherwise decides in which order floats are summed.
_THREADS = {"TF_NUM_INTRAOP_THREADS": "1"}
_RUN = (*SMALL, "--workers=2", "--epochs=1")
# A user without an entry in /etc/passwd; without privileges, where the kernel allows it.
_NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
_ODD = {
  "LC_ALL": "POSIX",
  "PYTHONOPTIMIZE": "2",  # No assertions and no docstrings.
  "PYTHONDONTWRITEBYTECODE": "1",
  "PYTHONHASHSEED": "7",
  "PYTHONWARNINGS": "error",
  "PYTHONSAFEPATH": "1",  # Modules in the current directory shadow no others.
  "TMPDIR": "/nonexistent",
  "XDG_CACHE_HOME": "/nonexistent",
  "TZ": "nonsense",
  "OMP_NUM_THREADS": "many",
  "TF_NUM_INTEROP_THREADS": "-3",
  "TF_FORCE_GPU_ALLOW_GROWTH": "true",
  "CUDA_VISIBLE_DEVICES": "",
}


def _digest(work_dir):
  return json.loads((work_dir / "result.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def usual_digest(tmp_path_factory):
  work_dir = tmp_path_factory.mktemp("usual") / "run"
  env = {**os.environ, **_THREADS}
  finished = run_module("tf_largebatch.train", *_RUN, f"--work_dir={work_dir}", env=env)
  assert finished.returncode == 0, finished.stderr
  return _digest(work_dir)


_LIMITED = 'umask 077; ulimit -n 32; exec nice -n 19 "$@" <&- >/dev/full'


def test_a_run_in_unusual_surroundings_ends_with_the_same_bytes(usual_digest, tmp_path):
  for name in ("random.py", "types.py", "recipe.py", "data", "tools"):  # Not what we import.
    path = tmp_path / name
    path.write_text("raise SystemExit('shadowed')") if "." in name else path.mkdir()
  (tmp_path / "real").mkdir()
  (tmp_path / _LINK).symlink_to("real")
  work_dir = _LINK + "/" + "x" * 200 + "/run"
  run = [sys.executable, "-m", "tf_largebatch.train", *_RUN, f"--work_dir={work_dir}"]
  allowed = subprocess.run([*_NOBODY, "true"], check=False, capture_output=True).returncode == 0
  command = [*(_NOBODY if allowed else ()), "sh", "-c", _LIMITED, "sh", *run]
  environment = {name: value for name, value in os.environ.items() if name != "HOME"}
  cores = os.sched_getaffinity(0)
  os.sched_setaffinity(0, list(cores)[:1])  # A process inherits it.
  finished = subprocess.run(
    command,
    cwd=tmp_path,
    env={**environment, **_ODD, **_THREADS, "PYTHONPATH": str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
    timeout=120,
    check=False,
  )
  os.sched_setaffinity(0, cores)
  assert finished.returncode == 0, finished.stderr
  assert _digest(tmp_path / work_dir) == usual_digest
  left = list((tmp_path / work_dir).parent.rglob("*"))
  assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in left} == {0}
  names = {"random.py", "types.py", "recipe.py", "data", "tools", "real", _LINK}
  assert set(os.listdir(tmp_path)) == names


_FIRST_PROCESS = """
import os, signal, time
from tf_largebatch.signals import StopRequest
with StopRequest().watch_signals() as stop, stop.deferring_signals():
  os.kill(os.getpid(), signal.SIGTERM)
  deadline = time.monotonic() + 10
  while stop.signal is None and time.monotonic() < deadline:
    time.sleep(0.05)
print(os.getpid(), stop.signal)
"""


def test_the_first_process_of_a_container_receives_signals():
  """The kernel drops signals that process 1 neither handles nor blocks."""
  container = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
  if subprocess.run([*container, "true"], check=False, capture_output=True).returncode:
    pytest.skip("this user may not make namespaces")
  command = [*container, sys.executable, "-c", _FIRST_PROCESS]
  assert subprocess.check_output(command, cwd=ROOT, text=True, timeout=60) == "1 15\n"


@pytest.mark.parametrize("to_stdout", [False, True])
def test_a_line_that_the_terminal_cannot_show_is_escaped(monkeypatch, to_stdout):
  """Instead of being dropped: the result, whose path may have any letters, in ASCII."""
  shown = io.BytesIO()
  terminal = io.TextIOWrapper(shown, encoding="ascii")
  monkeypatch.setattr(sys, "stdout" if to_stdout else "stderr", terminal)
  print_line("Result: η/result.json", to_stdout)
  assert shown.getvalue() == b"Result: \\u03b7/result.json\n"
