"""Starts programs and tasks for the tests, from the repository's root."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


# Flags of a run that takes seconds.
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


def run_module(module, *arguments, cwd=ROOT, timeout=120, env=None):
  """Runs a module as a program and captures its output."""
  return subprocess.run(
    [sys.executable, "-m", module, *arguments],
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


def run_program(program):
  """Runs Python source and returns the JSON in the last line that it prints."""
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
  """Runs a module as several tasks on this machine; merges stderr into stdout."""
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
  """Stops and continues the process twice, as Ctrl-Z, Slurm's suspend and debuggers do."""
  for _ in range(2):
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.1)
