r"""Runs a program as several tasks on this machine and sets `TF_CONFIG` for each of them.

  python -m tools.launch_local --tasks=2 -- --flagfile=flags/… --work_dir=…
  python -m tools.launch_local --tasks=2 --module=tools.verify -- …

Every task gets the arguments after `--`. Each line of its output is printed with the
prefix `[task r]`. If a task fails, the launcher sends SIGTERM to the others (SIGKILL
after --grace_seconds) and exits with the failed task's status, or 128 + signal if a
signal ended it. With --max_restarts=R it then restarts all tasks, up to R times, after
1, 2, 4, … 60 seconds; not after status 1 or 2, which a restart cannot fix. The launcher
forwards SIGINT, SIGTERM and SIGHUP to the tasks and then exits with 130, 143 or 129.

The tasks share the machine's cores equally through TF_NUM_INTRAOP_THREADS,
TF_NUM_INTEROP_THREADS (at least 2) and OMP_NUM_THREADS, unless these are set. They do not share
GPUs: on a machine with GPUs run one task, or set CUDA_VISIBLE_DEVICES=-1.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

from absl import flags

from tf_largebatch.errors import UserError
from tf_largebatch.machine import thread_settings, usable_cores
from tf_largebatch.signals import next_signal, stop_signals
from tools import program

_NEED_THE_USER = (1, 2)  # Exit statuses of errors that a restart would repeat.
_LONGEST_PAUSE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>.


def define_flags():
  flags.DEFINE_integer("tasks", 2, "Number of tasks to start.")
  flags.DEFINE_string("module", "tf_largebatch.train", "Module that each task runs.")
  flags.DEFINE_integer(
    "max_restarts", 0, "How often to restart all tasks after one fails.", lower_bound=0
  )
  flags.DEFINE_float(
    "grace_seconds",
    30.0,
    "Seconds that a task has to save after SIGTERM, before SIGKILL.",
    lower_bound=0,
  )


def free_addresses(count: int) -> list[str]:
  """Returns addresses on 127.0.0.1 with different unused ports."""
  with contextlib.ExitStack() as stack:
    # All stay open until the last is chosen, so that no port is returned twice.
    listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
    for listener in listeners:
      listener.bind(("", 0))  # All interfaces, like TensorFlow's server.
    return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


def task_environment(addresses: list[str], index: int) -> dict[str, str]:
  """Returns the environment of task `index` of a cluster of workers, with its share of cores."""
  threads = max(1, usable_cores() // len(addresses))
  return {
    **thread_settings(threads),
    "OMP_NUM_THREADS": str(threads),
    **os.environ,
    "PYTHONUNBUFFERED": "1",
    "TF_CONFIG": json.dumps(
      {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    ),
  }


def start_process(
  command: list[str],
  environment: dict[str, str],
  stdout: int | IO = subprocess.PIPE,
  cwd: pathlib.Path | None = None,
) -> subprocess.Popen:
  """Starts a process, in its own session, that the kernel kills when this program ends.

  This program must not have other threads at that moment: they and preexec_fn may deadlock.
  """
  parent, libc, stops = os.getpid(), ctypes.CDLL(None), stop_signals()

  def prepare():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    # Unlike clean-up code, this also works when SIGKILL ends the parent.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # The parent ended before the call of prctl.
      os._exit(1)

  return subprocess.Popen(
    command,
    env=environment,
    cwd=cwd,
    stdin=subprocess.DEVNULL,
    stdout=stdout,
    stderr=subprocess.STDOUT,
    # Universal newlines: a progress bar's "\r" also ends a line.
    encoding="utf-8",
    errors="replace",
    # A terminal's Ctrl-C then reaches this program alone, and the process can be
    # signalled together with the processes it started.
    start_new_session=True,
    preexec_fn=prepare,
  )


def _print_lines(task: subprocess.Popen, index: int, lock: threading.Lock) -> None:
  """Prints the task's output until it ends; stops if the launcher's own stdout is closed."""
  with task.stdout:
    for line in task.stdout:
      try:
        with lock:
          print(f"[task {index}]", line.removesuffix("\n"), flush=True)
      except BrokenPipeError:
        return
      except OSError:
        pass  # The disk is full: lose the line, not the task.


def _ended(task: subprocess.Popen) -> os.waitid_result | None:
  """Returns how the task ended, or None while it runs.

  Leaves the task a zombie, so that the kernel does not reuse its process group's id
  before `_end` signals the group.
  """
  return os.waitid(os.P_PID, task.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _wait(tasks: list[subprocess.Popen]) -> tuple[int, bool]:
  """Waits until all tasks succeed, one fails or the launcher gets a signal.

  Returns:
    The exit status, and whether a signal to the launcher ended the wait.
  """
  while True:
    results = [_ended(task) for task in tasks]
    for index, result in enumerate(results):
      if result and result.si_status:
        # If a signal ended the task, si_status is the signal's number.
        exited = result.si_code == os.CLD_EXITED
        how = f"status {result.si_status}" if exited else f"signal {result.si_status}"
        print(
          f"error: task {index} ended with {how}; ending the others", file=sys.stderr, flush=True
        )
        return (result.si_status if exited else 128 + result.si_status), False
    if all(results):
      return 0, False
    stop = next_signal(stop_signals(), 0.05)
    if stop:
      return 128 + stop, True


def _end(tasks: list[subprocess.Popen], number: int) -> None:
  """Sends signal `number` to the tasks' process groups, and SIGKILL after the grace period.

  Forwards further signals meanwhile, because a second one ends a trainer at once.
  """
  _signal(tasks, number)
  deadline = time.monotonic() + flags.FLAGS.grace_seconds
  while time.monotonic() < deadline and not all(_ended(task) for task in tasks):
    again = next_signal(stop_signals(), 0.05)
    if again:
      _signal(tasks, again)
  for task in tasks:
    os.killpg(task.pid, signal.SIGKILL)  # Includes processes that an ended task left running.
    task.wait()


def _signal(tasks: list[subprocess.Popen], number: int) -> None:
  for task in tasks:
    os.killpg(task.pid, number)
    os.killpg(task.pid, signal.SIGCONT)  # A stopped task would not handle the signal.


def _run_once(num_tasks: int, module: str, arguments: list[str]) -> tuple[int, bool]:
  """Starts the tasks and waits for them; returns what `_wait` does."""
  addresses = free_addresses(num_tasks)
  lock = threading.Lock()
  tasks, printers = [], []
  number, stopped = signal.SIGTERM, False
  try:
    # `start_process` wants no threads: the printers of an earlier start have ended.
    for index in range(num_tasks):
      command = [sys.executable, "-m", module, *arguments]
      tasks.append(start_process(command, task_environment(addresses, index)))
    for index, task in enumerate(tasks):
      printers.append(threading.Thread(target=_print_lines, args=(task, index, lock), daemon=True))
      printers[-1].start()
    status, stopped = _wait(tasks)
    if stopped:
      number = status - 128
    return status, stopped
  finally:
    _end(tasks, number)
    for printer in printers:
      printer.join(5.0)  # A process that left the task's session may still hold the pipe open.


def main(arguments: list[str]) -> int:
  """Runs the tasks, restarts them where that helps, and returns the exit status.

  Raises:
    UserError: the number of tasks is below 1, or the module does not exist.
  """
  num_tasks, module = flags.FLAGS.tasks, flags.FLAGS.module
  if num_tasks < 1:
    raise UserError(f"--tasks={num_tasks}: expected at least 1")
  try:
    found = importlib.util.find_spec(module)
  except (ImportError, ValueError):  # Its package does not exist; the name is empty.
    found = None
  if not found:
    raise UserError(f"--module={module}: no such module; write it as for `python -m`")

  # Blocked from here on and received by `next_signal`, so that no handler interrupts `_end`.
  signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
  max_restarts = flags.FLAGS.max_restarts
  for restart in itertools.count():
    status, stopped = _run_once(num_tasks, module, arguments)
    if stopped or not status or status in _NEED_THE_USER or restart == max_restarts:
      return status
    pause = min(2.0**restart, _LONGEST_PAUSE_SECONDS)
    print(f"Restart {restart + 1} of {max_restarts} in {pause:g} s.", file=sys.stderr, flush=True)
    stop = next_signal(stop_signals(), pause)
    if stop:
      return 128 + stop


if __name__ == "__main__":
  program.run(
    main,
    define_flags,
    takes_arguments=True,
    unknown_flag_hint="; flags of the tasks go after `--`.",
  )
