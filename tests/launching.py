"""How tests start several tasks, or a program, from the repository's root."""

import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def launch(tasks, module, *arguments):
  """Runs a module as so many tasks on this machine; stderr goes with stdout."""
  command = [sys.executable, "-m", "tools.launch_local", f"--tasks={tasks}", f"--module={module}"]
  return subprocess.run(
    [*command, "--", *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=240,
    check=False,
  )
