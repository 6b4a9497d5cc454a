r"""Injects faults into training runs at random moments and checks that the results do not change.

  python -m tools.resilience.chaos --faults=100 --tasks=1,2,3 --directory=runs/chaos
  python -m tools.resilience.chaos --elastic=2,1,4
  python -m tools.resilience.chaos --faults=8 --tasks=2 -- --flagfile=flags/… --data_dir=…

The first command trains once without faults for each number of tasks, then under
`tools.launch_local --max_restarts` with random faults during start-up, training and evaluation:

  kill       SIGKILL to a task.
  stop       SIGSTOP to a task; a single task gets SIGCONT later.
  terminate  SIGTERM to a task.
  corrupt    The newest checkpoint is damaged and a task killed.
  launcher   The launcher is killed, and the tasks with it, and started again.
  cut        The link between the tasks drops all packets for 0.2 to 40 s. Not with one task.
  disk       The disk that holds the work directory is full for some seconds.

For the last two, the runs get a private network and a small disk in memory (Linux namespaces, which
need root; `unshare --map-root-user` in front of the command also works on most systems). Data must
then be on this machine. Without the permission these kinds are left out.

Every run must end with the `weights_sha256`, losses and errors of the run without faults. With
--directory, the same command resumes a campaign that was interrupted; the faults that a run gets
depend on its number and --seed alone. The second command stops one run with SIGTERM and resumes it
on other numbers of tasks, and compares it with an undisturbed run. Arguments after `--` replace the
flags of the small synthetic recipe. The exit status is 1 if a run differs or does not recover; the
files of all runs are then kept.
"""

import collections
import json
import pathlib
import shutil
import statistics
import sys
import tempfile

from absl import flags

from tf_largebatch.errors import UserError
from tools import program
from tools.output import output_path, write_json
from tools.resilience import harness, namespaces
from tools.resilience.campaign import Campaign, Settings, locked
from tools.resilience.elastic import elastic
from tools.resilience.faults import ISOLATED_KINDS, KINDS, Fault, kinds_for

_TINY = (
  "--dataset=synthetic",
  "--train_split=train[:1296]",
  "--validation_split=validation[:200]",
  "--image_size=8",
  "--network=resnet20",
  "--dtype=float32",
  "--workers=12",  # 1, 2, 3, 4 and 6 tasks can share them equally.
  "--per_worker_batch_size=4",
  "--epochs=6",
  "--warmup_epochs=1",
  "--decay_epochs=3",
  "--evaluation_batch_size=20",
  "--checkpoint_every_steps=7",
  "--cluster_timeout_minutes=1",  # Ends the wait for a task that was stopped during start-up.
)


def define_flags():
  flags.DEFINE_integer("faults", 30, "Total number of faults.", lower_bound=0)
  flags.DEFINE_list("tasks", ["1", "2"], "Numbers of tasks, used in rotation.")
  flags.DEFINE_list(
    "kinds", [], f"Kinds of fault, out of {', '.join(KINDS)}; all that are permitted if empty."
  )
  flags.DEFINE_integer("faults_per_run", 4, "Most faults that one run gets.", lower_bound=1)
  flags.DEFINE_list("elastic", [], "Numbers of tasks to move one run through, instead of faults.")
  flags.DEFINE_integer("seed", 0, "Seed of the kinds, victims and moments of the faults.")
  flags.DEFINE_string(
    "directory", None, "Directory that keeps the campaign; the same command resumes it."
  )
  flags.DEFINE_string("json", None, "File to write the measurements to, as JSON.")


def _table(faults: list[Fault]) -> str:
  columns = (
    "tasks",
    "fault",
    "times",
    "lasted, s: median",
    "worst",
    "restarts",
    "recovery, s: median",
  )
  columns += ("worst", "steps repeated: median", "worst")
  lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
  groups = collections.defaultdict(list)
  for fault in faults:
    groups[fault.tasks, fault.kind].append(fault)
  for (tasks, kind), group in sorted(groups.items()):
    cells = [tasks, kind, len(group)]
    cells += _median_and_worst([fault.lasted for fault in group], ".1f")
    cells.append(sum(fault.launches > 0 for fault in group))
    cells += _median_and_worst([fault.seconds for fault in group], ".1f")
    cells += _median_and_worst([fault.steps_repeated for fault in group], "g")
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines)


def _median_and_worst(values: list[float], layout: str) -> list[str]:
  return [format(statistics.median(values), layout), format(max(values), layout)]


def _inject_faults(directory: pathlib.Path, settings: Settings, count: int) -> dict:
  """Runs the campaign to `count` faults; prints the measurements and returns them."""
  with locked(directory):
    campaign = Campaign(directory, settings)
    campaign.inject(count)
  runs = campaign.runs
  print(_table([Fault(**fault) for run in runs for fault in run["faults"]]))
  for run in runs:
    kinds = ", ".join(fault["kind"] for fault in run["faults"])
    print(
      f"{run['tasks']} tasks, {kinds or 'no fault'}: "
      f"{'equal' if run['equal'] else 'DIFFERS'} {(run['weights_sha256'] or '')[:12]}"
    )
  return {"runs": runs}


def _permitted_kinds(requested: list[str]) -> list[str]:
  """Returns the kinds to inject; isolates this process if some of them need that.

  Raises:
    UserError: a requested kind is unknown or not permitted.
  """
  unknown = set(requested) - set(KINDS)
  if unknown:
    raise UserError(f"--kinds={','.join(requested)}: expected some of {', '.join(KINDS)}")
  kinds = [kind for kind in KINDS if kind in (requested or KINDS)]
  isolated = [kind for kind in kinds if kind in ISOLATED_KINDS]
  if not isolated:
    return kinds
  try:
    namespaces.isolate()
    return kinds
  except OSError as error:
    reason = f"{' and '.join(isolated)}: creating namespaces needs root ({error.strerror})"
    if requested:
      raise UserError(f"--kinds: cannot inject {reason}; use other kinds") from error
    print(f"Leaving out {reason}.", file=sys.stderr)
    return [kind for kind in kinds if kind not in isolated]


def _settings(arguments: list[str]) -> Settings:
  """Returns the campaign's settings; isolates this process if some of its kinds need that."""
  values = flags.FLAGS
  tasks, kinds = _task_counts(values.tasks), _permitted_kinds(values.kinds)
  if not all(kinds_for(count, kinds) for count in tasks):
    raise UserError(f"--kinds={','.join(kinds)} needs --tasks of 2 or more, or other kinds")
  return Settings(arguments, tasks, kinds, values.faults_per_run, values.seed)


def _directory() -> pathlib.Path:
  value = flags.FLAGS.directory
  if value is None:
    return pathlib.Path(tempfile.mkdtemp(prefix="chaos"))
  if flags.FLAGS.elastic:
    raise UserError("--directory does not apply to --elastic, which cannot be resumed")
  directory = pathlib.Path(value).expanduser().resolve()  # The tasks run in another directory.
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--directory={value} cannot be used ({error.strerror})") from error
  return directory


def main(arguments: list[str]) -> int:
  values = flags.FLAGS
  arguments = arguments or list(_TINY)
  harness.prepare()
  json_path = output_path("--json", values.json)
  task_counts = _task_counts(values.elastic)
  settings = None if task_counts else _settings(arguments)
  directory, equal = _directory(), False
  try:
    if settings:
      measured = _inject_faults(directory, settings, values.faults)
    else:
      measured = elastic(directory, arguments, task_counts)
      print(json.dumps(measured, indent=2))
    if json_path:
      write_json("--json", json_path, measured)
    equal = all(run["equal"] for run in measured.get("runs", []))
  finally:
    if not equal:
      print(f"The files of the runs are in {directory}.", file=sys.stderr)
    elif not values.directory:
      shutil.rmtree(directory)
  return int(not equal)


def _task_counts(texts: list[str]) -> list[int]:
  for text in texts:
    if not text.strip().isdecimal() or not int(text):
      raise UserError(f"{text!r} is not a number of tasks; use 1 or more.")
  return [int(text) for text in texts]


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
