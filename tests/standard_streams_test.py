"""Closed standard streams, and lines that are dropped from standard error."""

import os
import subprocess
import sys

from tests.launching import ROOT


def run(program, *shell):
  """Runs Python source by a shell that redirects its streams."""
  command = ["sh", "-c", f'exec "$0" -c "$1" {" ".join(shell)}', sys.executable, program]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


_OPEN = """
import os, sys
from tf_largebatch.standard_streams import open_closed_streams
open_closed_streams()
first = os.open("/dev/null", os.O_RDONLY)
print("lost", file=sys.stderr, flush=True)
print("lost", flush=True)
assert sys.stdin.read() == ""
sys.exit(first)
"""


def test_the_next_file_does_not_take_the_place_of_a_closed_stream():
  for closed in ("2>&-", ">&-", "<&-", "<&- >&- 2>&-"):
    assert run(_OPEN, "</dev/null", closed).returncode >= 3, closed


def test_open_streams_stay():
  finished = run(_OPEN, "</dev/null")
  assert finished.stdout == finished.stderr == "lost\n"


_FILTER = """
import os, sys
from tf_largebatch.standard_streams import without_lines
os.write(2, b"noise before\\n")
with without_lines("^noise"):
  os.write(2, b"noise\\nkept noise\\n")
  print("noise of Python", file=sys.stderr)
  if len(sys.argv) > 1:
    os.write(2, b"F0000 what went wrong\\n")
    os.abort()
os.write(2, b"noise after\\n")
"""


def test_drops_matching_lines_inside_the_context_only():
  finished = run(_FILTER)
  assert finished.returncode == 0
  assert finished.stderr == "noise before\nkept noise\nnoise after\n"


def test_a_crash_loses_no_line():
  finished = run(_FILTER, "crash")
  assert finished.returncode == -6
  assert finished.stderr == "noise before\nkept noise\nF0000 what went wrong\n"


def test_without_grep_nothing_is_dropped(tmp_path):
  command = [sys.executable, "-c", _FILTER.replace("\\n", "\\n")]
  env = {**os.environ, "PATH": str(tmp_path)}
  finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
  assert "noise\nkept noise\nnoise of Python\n" in finished.stderr
