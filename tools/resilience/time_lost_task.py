r"""How long the tasks that are left take to end when one is lost, and what they say.

  python -m tools.resilience.time_lost_task --turns=10 --faults=kill,stop,cut

Starts `tf_largebatch.train` as several tasks on this machine, on a tiny recipe, and when they train
takes one away: the chief in every other turn, else another.

  kill  SIGKILL: its sockets close at once.
  stop  SIGSTOP: its sockets stay open and silent, as of a machine that hangs.
  cut   Its network is gone, without a word to either side, which both must end. Each task has a
        network namespace and an address of its own, a cable (veth) to a bridge in one more
        namespace, and the others' link addresses by heart. The cable's end is taken off the
        bridge, which then drops what comes; to set it down would take the carrier from the task,
        and a lost ARP would tell the others. Needs root, iproute2 and util-linux.

Every survivor must end in time, with status 138, as its last line name the lost task and the last
finished step (that of metrics.jsonl; but for the chief, which writes it, one more or less is right
too, as the tasks do not finish a step at the same moment), and leave no process behind. What does
not hold is told, and makes the exit status 1. Nothing outlives this program, even if it is killed:
the tasks are then killed by the kernel, and a namespace ends with its last process.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import tqdm
from absl import app, flags

from tf_largebatch.errors import LOST_TASK, UserError
from tf_largebatch.signals import next_signal

LIMITS = {"kill": 60.0, "stop": 120.0, "cut": 120.0}  # Seconds to end in, by fault.
_START_SECONDS = 180.0
_MOST_TASKS = 16
_ROOT = pathlib.Path(__file__).parents[2]
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAME = re.compile(r"task (\d+) \((\S+)\)")
_LINE = re.compile(
  rf"error: Lost ({_NAME.pattern}(?: and {_NAME.pattern})*), which ended or cannot be reached; "
  r"the last finished step is (\d+)\. The same command on all tasks goes on .*"
)


@dataclasses.dataclass
class Survivor:
  """A task after the fault: when and how it ended, what it said last, and what is wrong in that.

  Attributes:
    seconds: from the fault to its end; None if it did not end in time.
    named: whether it named the lost task, by rank and address, and no other.
  """

  rank: int
  seconds: float | None
  status: int | None
  line: str
  named: bool = False
  problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Turn:
  """A fault, once. `last_step` is that of metrics.jsonl; None where no fault came about."""

  fault: str
  victim: int
  last_step: int | None = None
  survivors: list[Survivor] = dataclasses.field(default_factory=list)
  problems: list[str] = dataclasses.field(default_factory=list)


def recipe_flags(num_tasks: int) -> list[str]:
  """Steps of milliseconds, 21 an epoch, for longer than any turn lasts."""
  return (
    f"--dataset=synthetic --train_split=train[:{num_tasks * 300}] --per_worker_batch_size=14"
    f" --workers={num_tasks} --validation_split=validation[:37] --evaluation_batch_size=10"
    " --network=resnet20 --image_size=8 --epochs=100000 --warmup_epochs=0 --decay_epochs="
    " --log_every_steps=1"
  ).split()


def lost_in(line: str) -> tuple[dict[int, str], int] | None:
  """The lost tasks' addresses by rank, and the last step, of a survivor's line; None of another."""
  match = _LINE.fullmatch(line)
  if not match:
    return None
  return {int(rank): address for rank, address in _NAME.findall(match[1])}, int(
    match[match.lastindex]
  )


def judge(survivor: Survivor, lost: dict[int, str], limit: float, last_step: int):
  """Sets `named` and `problems`; `lost` are the tasks it cannot reach, of which it names any."""
  say = survivor.problems.append
  if survivor.seconds is None:
    say(f"did not end in {limit:g} s")
  elif survivor.status != LOST_TASK:
    say(f"ended with status {survivor.status}, not {LOST_TASK}")
  told = lost_in(survivor.line)
  survivor.named = told is not None and told[0].items() <= lost.items()
  if not survivor.named:
    say(f"named no lost task of {lost}: {survivor.line!r}")
  elif abs(told[1] - last_step) > (survivor.rank != 0):
    say(f"says that step {told[1]} was the last; metrics.jsonl says {last_step}")


def last_step_in(work_dir: pathlib.Path) -> int:
  """The last step in metrics.jsonl, whose last line may be half there; 0 if it has none."""
  last = 0
  with contextlib.suppress(FileNotFoundError, ValueError):
    for line in (work_dir / "metrics.jsonl").read_text().splitlines():
      last = json.loads(line)["step"]
  return last


def summarise(turns: list[Turn]) -> list[dict]:
  """A row of the table for each fault, in order; the worst is infinite where one did not end."""
  rows = []
  for fault in dict.fromkeys(turn.fault for turn in turns):
    mine = [turn for turn in turns if turn.fault == fault]
    survivors = [survivor for turn in mine for survivor in turn.survivors]
    seconds = [math.inf if s.seconds is None else s.seconds for s in survivors] or [math.nan]
    rows.append(
      {
        "fault": fault,
        "turns": len(mine),
        "survivors": len(survivors),
        "median": statistics.median(seconds),
        "worst": max(seconds),
        "named": sum(survivor.named for survivor in survivors),
      }
    )
  return rows


def _pause():
  """Sleeps for a moment; SIGINT and SIGTERM, blocked elsewhere, end the program from here."""
  number = next_signal(_STOP_SIGNALS, 0.05)
  if number:
    sys.exit(128 + number)


def _ip(inside: list[str], *commands: str):
  text = "".join(f"{command}\n" for command in commands)
  done = subprocess.run(
    [*inside, "ip", "-batch", "-"], input=text, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise UserError(f"--faults=cut: ip refuses ({' '.join(done.stderr.split())})")


@contextlib.contextmanager
def cables(num_tasks: int):
  """Yields tasks' addresses, command prefixes that enter their namespaces, and what cuts one off.

  Raises:
    UserError: not as root, or without the programs.
  """
  missing = [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]
  if missing:
    raise UserError(f"--faults=cut needs {', '.join(missing)} (iproute2, util-linux); or leave out")
  with contextlib.ExitStack() as held:
    inside, holders = [], []
    for _ in range(num_tasks + 1):
      # `cat` ends with its input, so with this program, and the namespace with its processes.
      holder = subprocess.Popen(
        ["unshare", "--net", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
      held.callback(holder.communicate)  # Closes its input and waits.
      with contextlib.suppress(BrokenPipeError):
        holder.stdin.write(b"\n")
        holder.stdin.flush()
      if not holder.stdout.readline():
        raise UserError(
          "--faults=cut makes network namespaces, which needs root"
          f" ({holder.stderr.read().decode().strip()}); or leave it out"
        )
      holders.append(holder.pid)
      inside.append(["nsenter", f"--net=/proc/{holder.pid}/ns/net"])
    *tasks, bridge = inside
    macs = [f"02:00:00:00:00:{rank + 1:02x}" for rank in range(num_tasks)]
    hosts = [f"10.0.0.{rank + 1}" for rank in range(num_tasks)]
    _ip(bridge, "link add bridge type bridge", "link set bridge up")
    for rank, task in enumerate(tasks):
      _ip(
        bridge,
        f"link add port{rank} type veth peer name eth0 netns {holders[rank]}",
        f"link set port{rank} master bridge up",
      )
      _ip(
        task,
        "link set lo up",
        f"link set eth0 address {macs[rank]} up",
        f"address add {hosts[rank]}/24 dev eth0",
        *(
          f"neighbour add {hosts[other]} lladdr {macs[other]} dev eth0 nud permanent"
          for other in range(num_tasks)
          if other != rank
        ),
      )
    yield (
      [f"{host}:2222" for host in hosts],
      tasks,
      lambda rank: _ip(bridge, f"link set port{rank} nomaster"),
    )


def _free_addresses(count: int) -> list[str]:
  with contextlib.ExitStack() as held:
    listeners = [held.enter_context(socket.create_server(("", 0))) for _ in range(count)]
    return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


def _processes_of(sessions: set[int]) -> list[int]:
  """The processes in the sessions that the tasks began, zombies apart."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
      if state != "Z" and int(session) in sessions:
        found.append(int(path.parent.name))
  return found


@contextlib.contextmanager
def _tasks(addresses: list[str], inside: list[list[str]], folder: pathlib.Path):
  """Yields the processes of the tasks, which write into RANK.log; none is left afterwards."""
  threads = str(max(1, len(os.sched_getaffinity(0)) // len(addresses)))
  shared = {name: threads for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
  processes = []
  try:
    for rank, prefix in enumerate(inside):
      task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
      command = [sys.executable, "-m", "tf_largebatch.train", *recipe_flags(len(addresses))]
      with open(folder / f"{rank}.log", "w") as log:
        processes.append(
          subprocess.Popen(
            # The kernel kills it when this program is gone, even by SIGKILL.
            ["setpriv", "--pdeathsig", "KILL", *prefix, *command, f"--work_dir={folder}/run"],
            cwd=_ROOT,
            env={
              **os.environ,
              **shared,
              "CUDA_VISIBLE_DEVICES": "-1",  # Tasks of one machine cannot share its GPUs.
              "TMPDIR": str(folder),  # What a task that is killed leaves there goes with it.
              "TF_CONFIG": json.dumps(task),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Whose processes are this task's.
          )
        )
    yield processes
  finally:
    for pid in _processes_of({process.pid for process in processes}):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for process in processes:
      process.wait()


def _last_line(log: pathlib.Path) -> str:
  lines = log.read_text(errors="replace").splitlines()
  return next((line for line in reversed(lines) if line.strip()), "")


def time_turn(fault: str, victim: int, first_step: int, num_tasks: int = 2) -> Turn:
  """Starts tasks, does `fault` to one after `first_step` steps, and waits for the others' end."""
  turn = Turn(fault, victim)
  with contextlib.ExitStack() as held:
    folder = pathlib.Path(held.enter_context(tempfile.TemporaryDirectory()))
    addresses, inside = _free_addresses(num_tasks), [[]] * num_tasks
    if fault == "cut":
      addresses, inside, cut = held.enter_context(cables(num_tasks))
    processes = held.enter_context(_tasks(addresses, inside, folder))
    begun = time.monotonic()
    while last_step_in(folder / "run") < first_step:
      ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
      if ended or time.monotonic() - begun > _START_SECONDS:
        rank = ended[0] if ended else 0
        what = f"task {rank} ended" if ended else f"no step {first_step} in {_START_SECONDS:g} s"
        turn.problems.append(f"{what} before the fault: {_last_line(folder / f'{rank}.log')!r}")
        return turn
      _pause()

    begun = time.monotonic()
    if fault == "cut":
      cut(victim)
    else:
      processes[victim].send_signal({"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
    ranks = [rank for rank in range(num_tasks) if fault == "cut" or rank != victim]
    seconds = {}
    while len(seconds) < len(ranks) and time.monotonic() - begun < LIMITS[fault]:
      for rank in ranks:
        if rank not in seconds and processes[rank].poll() is not None:
          seconds[rank] = time.monotonic() - begun
      _pause()

    alive = set(_processes_of({process.pid for process in processes}))
    left = alive - {process.pid for process in processes if process.poll() is None}
    if left:
      turn.problems.append(f"left {len(left)} processes behind")
    turn.last_step = last_step_in(folder / "run")
    for rank in ranks:
      line = _last_line(folder / f"{rank}.log")
      status = processes[rank].poll() if rank in seconds else None
      survivor = Survivor(rank, seconds.get(rank), status, line)
      lost = set(range(num_tasks)) - {victim} if rank == victim else {victim}
      judge(survivor, {r: addresses[r] for r in lost}, LIMITS[fault], turn.last_step)
      turn.survivors.append(survivor)
  return turn


def _run() -> int:
  values = flags.FLAGS
  num_tasks, faults = values.tasks, list(dict.fromkeys(values.faults))
  if not faults or set(faults) - set(LIMITS):
    raise UserError(f"--faults={','.join(faults)}: expected one or more of {', '.join(LIMITS)}")
  if not shutil.which("setpriv"):
    raise UserError("setpriv (util-linux 2.33 or later) is missing")
  if values.json:
    try:
      open(values.json, "a").close()  # Told now, not when all is measured.
    except OSError as error:
      raise UserError(f"--json={values.json} cannot be written ({error.strerror})") from error
  if "cut" in faults:
    with cables(num_tasks):  # Tells at once if it will not do.
      pass
  plan = [(turn, fault) for turn in range(values.turns) for fault in faults]
  turns, wrong = [], 0
  with tqdm.tqdm(plan, "faults", unit="turn", disable=None) as bar:
    for index, fault in bar:
      victim = 1 + index // 2 % (num_tasks - 1) if index % 2 else 0
      # From turn to turn at another place of the epoch of 21 steps.
      turn = time_turn(fault, victim, 20 + 5 * index, num_tasks)
      turns.append(turn)
      problems = list(turn.problems)
      problems += (f"task {s.rank} {problem}" for s in turn.survivors for problem in s.problems)
      for problem in problems:
        bar.write(f"{fault}, turn {index + 1}, task {victim} lost: {problem}", file=sys.stderr)
      wrong += bool(problems)
  rows = summarise(turns)
  print("fault  turns  survivors' exit: median   worst  named rightly")
  for row in rows:
    exits = f"{row['median']:21.1f} s {row['worst']:5.1f} s"
    print(f"{row['fault']:5}  {row['turns']:5}  {exits}  {row['named']:4} of {row['survivors']}")
  if values.json:
    facts = {"tasks": num_tasks, "turns": [dataclasses.asdict(turn) for turn in turns]}
    pathlib.Path(values.json).write_text(json.dumps(facts, indent=2) + "\n")
  return int(wrong > 0)


def main(argv: list[str]) -> int:
  # Blocked, and fetched by `_pause` alone, so that they break into no start and no clean-up.
  signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
  try:
    if len(argv) > 1:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
    return _run()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def define_flags():
  """Not at the module's top, so that it can be imported beside other programs."""
  flags.DEFINE_integer("turns", 10, "How often each fault is made.", lower_bound=1)
  flags.DEFINE_list("faults", list(LIMITS), f"Of {', '.join(LIMITS)}.")
  flags.DEFINE_integer("tasks", 2, "Tasks of a run.", lower_bound=2, upper_bound=_MOST_TASKS)
  flags.DEFINE_string("json", "", "File for what was measured, as JSON.")


if __name__ == "__main__":
  define_flags()
  app.run(main)
