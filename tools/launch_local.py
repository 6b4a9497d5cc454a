r"""Starts several tasks on this machine, with `TF_CONFIG` set, as one program.

  python -m tools.launch_local --tasks=2 -- --flagfile=flags/… --work_dir=…
  python -m tools.launch_local --tasks=2 --module=tools.verify -- …

What follows `--` goes to every task. Each line of their output is printed behind
`[task r]`. If a task fails, the others are asked to end by SIGTERM (and killed
after --grace_seconds) and its status is returned, 128 + signal if a signal ended
it. With --max_restarts=R all tasks are then started again, up to R times, after 1,
2, 4, … 60 seconds; not if the status is 1 or 2, which a restart would not mend.
SIGINT and SIGTERM are passed on, and end the launcher with 130 or 143.

The tasks share the machine's cores, divided by TF_NUM_INTRAOP_THREADS,
TF_NUM_INTEROP_THREADS and OMP_NUM_THREADS unless these are set. GPUs are not
divided: on a machine with GPUs run one task, or set CUDA_VISIBLE_DEVICES=-1.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app, flags

from tf_largebatch.errors import UserError
from tf_largebatch.signals import next_signal

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NEED_THE_USER = (1, 2)  # Statuses of a mistake that the next start would make again.
_LONGEST_PAUSE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>.


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_integer("tasks", 2, "Number of tasks to start.")
  flags.DEFINE_string("module", "tf_largebatch.train", "Module that each task runs.")
  flags.DEFINE_integer(
    "max_restarts", 0, "Times that all tasks are started again after one failed.", lower_bound=0
  )
  flags.DEFINE_float(
    "grace_seconds", 30.0, "Seconds from SIGTERM, on which a task saves, to SIGKILL.", lower_bound=0
  )


def free_addresses(count: int) -> list[str]:
  """Returns addresses with different ports: all are held open until the last is chosen."""
  with contextlib.ExitStack() as stack:
    listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
    for listener in listeners:
      listener.bind(("", 0))  # All interfaces, as TensorFlow's server will.
    return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


def _start(module: str, arguments: list[str], addresses: list[str], index: int) -> subprocess.Popen:
  """Starts task `index` of a cluster of workers only."""
  threads = str(max(1, len(os.sched_getaffinity(0)) // len(addresses)))
  environ = {
    "TF_NUM_INTRAOP_THREADS": threads,
    "TF_NUM_INTEROP_THREADS": threads,
    "OMP_NUM_THREADS": threads,
    **os.environ,
    "PYTHONUNBUFFERED": "1",
    "TF_CONFIG": json.dumps(
      {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    ),
  }
  launcher, libc = os.getpid(), ctypes.CDLL(None)

  def prepare_task():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # The kernel kills the task when the launcher is gone, even by SIGKILL, where no
    # code of the launcher's runs; the launcher may have died before this line.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
      os._exit(1)

  return subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    env=environ,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    # Universal newlines: a progress bar's "\r" ends a line too.
    encoding="utf-8",
    errors="replace",
    # A process group of its own: a terminal's Ctrl-C reaches the launcher alone, and
    # the task is ended together with the processes it started.
    start_new_session=True,
    preexec_fn=prepare_task,
  )


def _print_lines(task: subprocess.Popen, index: int, lock: threading.Lock) -> None:
  """Prints the task's output until it ends; closes the pipe if nobody is left to read it."""
  with task.stdout:
    for line in task.stdout:
      try:
        with lock:
          print(f"[task {index}]", line.removesuffix("\n"), flush=True)
      except BrokenPipeError:
        return
      except OSError:
        pass  # A full disk: the line is lost, the task is not.


def _ended(task: subprocess.Popen) -> os.waitid_result | None:
  """Returns how the task ended, None while it runs.

  The task stays a zombie, so that its process group's id is not given away before
  `_end` has used it.
  """
  return os.waitid(os.P_PID, task.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _wait(tasks: list[subprocess.Popen]) -> tuple[int, bool]:
  """Waits for all to succeed, one to fail or a signal to stop.

  Returns:
    The status, and whether a signal to the launcher stopped the waiting.
  """
  while True:
    results = [_ended(task) for task in tasks]
    for index, result in enumerate(results):
      if result and result.si_status:
        # si_status is the signal's number if a signal ended the task.
        exited = result.si_code == os.CLD_EXITED
        how = f"status {result.si_status}" if exited else f"signal {result.si_status}"
        print(
          f"error: task {index} ended with {how}; ending the others", file=sys.stderr, flush=True
        )
        return (result.si_status if exited else 128 + result.si_status), False
    if all(results):
      return 0, False
    stop = next_signal(_STOP_SIGNALS, 0.05)
    if stop:
      return 128 + stop, True


def _end(tasks: list[subprocess.Popen], number: int) -> None:
  """Ends the tasks' process groups: the signal, some seconds, SIGKILL.

  A signal that comes meanwhile is passed on too: asked twice, a trainer ends at once.
  """
  _signal(tasks, number)
  deadline = time.monotonic() + flags.FLAGS.grace_seconds
  while time.monotonic() < deadline and not all(_ended(task) for task in tasks):
    again = next_signal(_STOP_SIGNALS, 0.05)
    if again:
      _signal(tasks, again)
  for task in tasks:
    os.killpg(task.pid, signal.SIGKILL)  # Also what a task started and left behind.
    task.wait()


def _signal(tasks: list[subprocess.Popen], number: int) -> None:
  for task in tasks:
    os.killpg(task.pid, number)
    os.killpg(task.pid, signal.SIGCONT)  # One that was stopped would not hear it.


def _run_once(num_tasks: int, module: str, arguments: list[str]) -> tuple[int, bool]:
  """Runs the tasks to their end; the status, and whether a signal to the launcher stopped them."""
  addresses = free_addresses(num_tasks)
  lock = threading.Lock()
  tasks, printers = [], []
  number, stopped = signal.SIGTERM, False
  try:
    # The printers of an earlier start have ended: threads and preexec_fn do not go together.
    for index in range(num_tasks):
      tasks.append(_start(module, arguments, addresses, index))
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
      printer.join(5.0)  # Not forever, should the pipe be held by a stranger.


def _launch(num_tasks: int, module: str, arguments: list[str]) -> int:
  """Runs the tasks to their end, again where that helps, and returns the status.

  Raises:
    UserError: the number of tasks or the module will not do.
  """
  if num_tasks < 1:
    raise UserError(f"--tasks={num_tasks}: expected at least 1")
  try:
    found = importlib.util.find_spec(module)
  except (ImportError, ValueError):  # Of its package; of an empty name.
    found = None
  if not found:
    raise UserError(f"--module={module}: no such module; give it as `python -m` would take it")

  # Blocked from here on and fetched by `_wait`, so that no handler breaks into `_end`.
  signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
  max_restarts = flags.FLAGS.max_restarts
  for restart in itertools.count():
    status, stopped = _run_once(num_tasks, module, arguments)
    if stopped or not status or status in _NEED_THE_USER or restart == max_restarts:
      return status
    pause = min(2.0**restart, _LONGEST_PAUSE_SECONDS)
    print(f"Restart {restart + 1} of {max_restarts} in {pause:g} s.", file=sys.stderr, flush=True)
    stop = next_signal(_STOP_SIGNALS, pause)
    if stop:
      return 128 + stop


def _parse_or_exit(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    unknown = isinstance(error, flags.UnrecognizedFlagError)
    hint = "; what is for the tasks goes behind `--`." if unknown else ""
    print(f"error: {error}{hint}", file=sys.stderr)
    sys.exit(1)


def main(argv: list[str]) -> int:
  try:
    return _launch(flags.FLAGS.tasks, flags.FLAGS.module, argv[1:])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=_parse_or_exit)
