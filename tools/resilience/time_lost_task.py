r"""Measures how fast the remaining tasks end when one is lost, and checks what they report.

  python -m tools.resilience.time_lost_task --repeats=10 --faults=kill,stop,cut

Trains a tiny recipe as several tasks on this machine and injects a fault into one of them: into the
chief in every other trial, else into another task.

  kill  SIGKILL: its sockets close at once.
  stop  SIGSTOP: its sockets stay open and silent, like those of a machine that hangs.
  cut   Its network is gone, and neither side is notified; both must end. Needs root, iproute2 and
        util-linux (see `network`).

Every survivor must end in time with status 138, name the lost task and the last finished step in
its last line, and leave no process behind. The step must be that of metrics.jsonl; for tasks other
than the chief, which writes that file, it may differ by one, because the tasks do not finish a step
at the same moment. The program prints every violation and then exits with status 1. Nothing that it
starts outlives it, even if it is killed.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import tqdm
from absl import flags

from tf_largebatch.errors import LOST_TASK, UserError
from tools import launch_local, program
from tools.output import output_path, write_json
from tools.resilience import harness
from tools.resilience.network import Network, isolated_network

LIMITS = {"kill": 60.0, "stop": 120.0, "cut": 120.0}  # Seconds by fault.
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_START_SECONDS = 180.0
_MOST_TASKS = 16
_NAME = re.compile(r"task (\d+) \((\S+)\)")
_LINE = re.compile(
  rf"error: Lost ({_NAME.pattern}(?: and {_NAME.pattern})*), which ended or cannot be reached; "
  r"the last finished step is (\d+)\. \S.*"
)


def define_flags():
  flags.DEFINE_integer("repeats", 10, "Trials of each fault.", lower_bound=1)
  flags.DEFINE_list("faults", list(LIMITS), f"Faults to inject, out of {', '.join(LIMITS)}.")
  flags.DEFINE_integer("tasks", 2, "Tasks of a run.", lower_bound=2, upper_bound=_MOST_TASKS)
  flags.DEFINE_string("json", None, "File to write the measurements to, as JSON.")


@dataclasses.dataclass
class Survivor:
  """A task after the fault: when and how it ended, and what is wrong with that.

  Attributes:
    rank: of the task.
    seconds: from the fault to its end; None if it did not end in time.
    status: its exit status; None if it did not end in time.
    line: the last line of its log.
    named: whether the line names lost tasks, by rank and address, and no others.
    problems: what `judge` found.
  """

  rank: int
  seconds: float | None
  status: int | None
  line: str
  named: bool = False
  problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Trial:
  """One fault. `last_step` is that of metrics.jsonl; None if the fault could not be injected."""

  fault: str
  victim: int
  last_step: int | None = None
  survivors: list[Survivor] = dataclasses.field(default_factory=list)
  problems: list[str] = dataclasses.field(default_factory=list)


def recipe_flags(num_tasks: int) -> list[str]:
  """Returns flags for steps of milliseconds, 21 an epoch, in a run longer than any trial."""
  return (
    f"--dataset=synthetic --train_split=train[:{num_tasks * 300}] --per_worker_batch_size=14"
    f" --workers={num_tasks} --validation_split=validation[:37] --evaluation_batch_size=10"
    " --network=resnet20 --image_size=8 --epochs=100000 --warmup_epochs=0 --decay_epochs="
    " --log_every_steps=1"
  ).split()


def parse_report(line: str) -> tuple[dict[int, str], int] | None:
  """Returns the lost tasks' addresses by rank and the last step; None for any other line."""
  match = _LINE.fullmatch(line)
  if not match:
    return None
  lost = {int(rank): address for rank, address in _NAME.findall(match[1])}
  return lost, int(match[match.lastindex])


def judge(survivor: Survivor, lost: dict[int, str], limit: float, last_step: int):
  """Sets `named` and `problems`.

  Args:
    survivor: without them.
    lost: addresses, by rank, of the tasks that it cannot reach. It must name some of them.
    limit: seconds within which it must end.
    last_step: last step in metrics.jsonl.
  """
  add = survivor.problems.append
  if survivor.seconds is None:
    add(f"did not end in {limit:g} s")
  elif survivor.status != LOST_TASK:
    add(f"ended with status {survivor.status}, not {LOST_TASK}")
  report = parse_report(survivor.line)
  survivor.named = report is not None and report[0].items() <= lost.items()
  if not survivor.named:
    add(f"did not name the lost task, one of {lost}: {survivor.line!r}")
  elif abs(report[1] - last_step) > (survivor.rank != 0):
    add(f"names step {report[1]} as the last; metrics.jsonl has {last_step}")


def summarise(trials: list[Trial]) -> list[dict]:
  """Returns a row for each fault, in order; its worst is infinite if a task did not end in time."""
  rows = []
  for fault in dict.fromkeys(trial.fault for trial in trials):
    of_fault = [trial for trial in trials if trial.fault == fault]
    survivors = [survivor for trial in of_fault for survivor in trial.survivors]
    seconds = [math.inf if s.seconds is None else s.seconds for s in survivors] or [math.nan]
    rows.append(
      {
        "fault": fault,
        "trials": len(of_fault),
        "survivors": len(survivors),
        "median": statistics.median(seconds),
        "worst": max(seconds),
        "named": sum(survivor.named for survivor in survivors),
      }
    )
  return rows


def time_trial(
  fault: str, victim: int, first_step: int, num_tasks: int = 2, options: tuple[str, ...] = ()
) -> Trial:
  """Starts the tasks, injects the fault after `first_step` steps and waits for the survivors.

  Args:
    fault: one of `LIMITS`.
    victim: rank of the task that gets the fault.
    first_step: steps before the fault.
    num_tasks: how many tasks there are.
    options: further flags of the trainer.
  """
  arguments = [*recipe_flags(num_tasks), *options]
  trial = Trial(fault, victim)
  with contextlib.ExitStack() as stack:
    directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if fault == "cut":
      network = stack.enter_context(isolated_network(num_tasks))
    else:
      network = Network(launch_local.free_addresses(num_tasks), [[]] * num_tasks, [])
    tasks = stack.enter_context(
      harness.trainer_tasks(network.addresses, network.prefixes, arguments, directory)
    )
    problem = _wait_for_step(first_step, tasks, directory)
    if problem:
      trial.problems.append(problem)
      return trial

    begun = time.monotonic()
    if fault == "cut":
      network.disconnect(victim)
    else:
      tasks[victim].send_signal(_SIGNALS[fault])
    ranks = [rank for rank in range(num_tasks) if fault == "cut" or rank != victim]
    seconds = _time_ends({rank: tasks[rank] for rank in ranks}, begun, LIMITS[fault])

    left = {process.pid for process in harness.processes_of(tasks)}
    left -= {task.pid for task in tasks if task.poll() is None}
    if left:
      trial.problems.append(f"left {len(left)} processes behind")
    trial.last_step = harness.last_step(directory / "run")
    for rank in ranks:
      line = harness.last_line(directory / f"{rank}.log")
      status = tasks[rank].poll() if rank in seconds else None
      survivor = Survivor(rank, seconds.get(rank), status, line)
      lost = set(range(num_tasks)) - {victim} if rank == victim else {victim}
      judge(survivor, {r: network.addresses[r] for r in lost}, LIMITS[fault], trial.last_step)
      trial.survivors.append(survivor)
  return trial


def _wait_for_step(step: int, tasks: list[subprocess.Popen], directory: pathlib.Path) -> str:
  """Waits until metrics.jsonl has the step; returns the problem if it does not come, else ""."""

  def ended() -> list[int]:
    return [rank for rank, task in enumerate(tasks) if task.poll() is not None]

  def reached() -> bool:
    return harness.last_step(directory / "run") >= step

  harness.wait_until(lambda: reached() or ended(), _START_SECONDS)
  if reached():
    return ""
  rank = next(iter(ended()), None)
  what = f"no step {step} in {_START_SECONDS:g} s" if rank is None else f"task {rank} ended"
  return f"{what} before the fault: {harness.last_line(directory / f'{rank or 0}.log')!r}"


def _time_ends(tasks: dict[int, subprocess.Popen], begun: float, limit: float) -> dict[int, float]:
  """Waits for the tasks; returns the seconds from `begun` to the end of each that ends in time."""
  seconds = {}

  def all_ended() -> bool:
    for rank, task in tasks.items():
      if rank not in seconds and task.poll() is not None:
        seconds[rank] = time.monotonic() - begun
    return len(seconds) == len(tasks)

  harness.wait_until(all_ended, limit)
  return seconds


def _run_trials(faults: list[str], repeats: int, num_tasks: int) -> tuple[list[Trial], bool]:
  """Runs all trials and prints their problems; returns them, and whether there was a problem."""
  plan = [fault for _ in range(repeats) for fault in faults]
  trials, failed = [], False
  with tqdm.tqdm(plan, "faults", unit="trial", disable=None) as bar:
    for index, fault in enumerate(bar):
      victim = 1 + index // 2 % (num_tasks - 1) if index % 2 else 0
      # An epoch has 21 steps: every trial injects its fault at another place in the epoch.
      trial = time_trial(fault, victim, 20 + 5 * index, num_tasks)
      trials.append(trial)
      problems = list(trial.problems)
      problems += (f"task {s.rank} {problem}" for s in trial.survivors for problem in s.problems)
      for problem in problems:
        bar.write(f"{fault}, trial {index + 1}, task {victim} lost: {problem}", file=sys.stderr)
      failed |= bool(problems)
  return trials, failed


def main() -> int:
  values = flags.FLAGS
  num_tasks, faults = values.tasks, list(dict.fromkeys(values.faults))
  if not faults or set(faults) - set(LIMITS):
    raise UserError(f"--faults={','.join(faults)}: expected one or more of {', '.join(LIMITS)}")
  harness.prepare()
  json_path = output_path("--json", values.json)
  if "cut" in faults:
    with isolated_network(num_tasks):  # Fails now rather than in a later trial.
      pass
  trials, failed = _run_trials(faults, values.repeats, num_tasks)
  print("fault  trials  survivors' exit: median   worst  lost task named")
  for row in summarise(trials):
    exits = f"{row['median']:21.1f} s {row['worst']:5.1f} s"
    print(f"{row['fault']:5}  {row['trials']:6}  {exits}  {row['named']:4} of {row['survivors']}")
  if json_path:
    measured = {"tasks": num_tasks, "trials": [dataclasses.asdict(trial) for trial in trials]}
    write_json("--json", json_path, measured)
  return int(failed)


if __name__ == "__main__":
  program.run(main, define_flags)
