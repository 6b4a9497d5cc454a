"""How tests start several tasks, or a program, from the repository's root."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


# A run of seconds.
SMALL = (
  "--dataset=synthetic",
  "--train_split=train[:60]",
  "--validation_split=validation[:37]",
  "--image_size=8",
  "--network=resnet8",
  "--per_worker_batch_size=7",
  "--warmup_epochs=0",
  "--decay_epochs=",
  "--log_every_steps=1",
  "--evaluation_batch_size=10",
)


def run_module(module, *arguments, cwd=ROOT, timeout=120):
  """Runs a module as a program, with what it prints caught."""
  return subprocess.run(
    [sys.executable, "-m", module, *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


def run_program(program):
  """What the last line, JSON, of a Python program says."""
  result = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(result.stdout.splitlines()[-1])


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


def suspend(process, seconds=0.5):
  """Twice, as a terminal's Ctrl-Z, Slurm's suspend and a debugger do."""
  for _ in range(2):
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.1)
