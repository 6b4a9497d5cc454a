r"""Measures the step of several tasks on slow links, and compares it with its forecast.

  python -m tools.benchmark.slow_links --json=communication.json
  python -m tools.benchmark.slow_links --tasks=2 --networks=resnet20 --gigabits=1 --delays_ms=0,1 \
    --turns=1 --json=small.json

For claims (c) of docs/answers_claims.md. The tasks are processes with RING collectives and one
worker each, in network namespaces of this machine (root, iproute2 and util-linux). --gigabits
limits what each of them sends per second, by a token bucket; --delays_ms delays each packet, one
way, by a process that holds it that long. The links' real rate and round trip are measured too.

In each turn, for each link, the tasks time
  alone     the step without communication, of all tasks at once on the same cores;
  all-reduce what the step sends, in the same packs;
  step      both together;
and `alone` again. From the first two alone follows the forecast of the step, by the model of
`tools.forecast` (`links/judgement.py`). --seconds says how long the calls of each should take in a
turn; one that takes longer is made once. Images are random: CIFAR's size with n = 32 for its
networks, 64×64 with n = 8 for ImageNet's. One task has no links and no claims: it shows how far
equal steps differ.

The file of --json is written after each link of each turn. The same command continues from it.
"""

import itertools
import json
import pathlib
import platform
import sys
import time

from absl import flags

from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import NETWORKS
from tools import hardware, output, program
from tools.benchmark import harness
from tools.benchmark.links.cluster import Cluster, Link
from tools.benchmark.links.judgement import count_claims, judge
from tools.benchmark.links.plan import Group, Pace, estimate_seconds, plan, transfer_seconds
from tools.studies.output import write_all

_MOST_TASKS = 64
_LABEL, _CELL = 36, 10  # Widths in the table.


def define_flags():
  flags.DEFINE_list("tasks", ["1", "2", "4"], "Numbers of tasks.")
  flags.DEFINE_list("networks", ["resnet20", "resnet50"], "As in the recipe.")
  flags.DEFINE_list("gigabits", ["0.1", "1", "10"], "Gbit/s that a task may send.")
  flags.DEFINE_list("delays_ms", ["0", "0.1", "1", "10"], "Delays of a packet, one way.")
  packs = [str(RunOptions().bytes_per_pack), "0"]
  flags.DEFINE_list("bytes_per_pack", packs, "As in a run; 0: one pack, after backprop.")
  flags.DEFINE_integer("image_size", None, "Instead of the usual ones.", lower_bound=8)
  flags.DEFINE_integer("per_worker_batch_size", None, "Instead of the usual n.", lower_bound=1)
  flags.DEFINE_integer("turns", 5, "How often each setting is measured.", lower_bound=1)
  flags.DEFINE_float("seconds", 0.5, "That timed calls should take.", lower_bound=0)
  flags.DEFINE_string("json", None, "File for the results, as JSON; required.")


def measure(group: Group, turns: int, pace: Pace, results: "Results"):
  """Measures what is missing of a group."""
  turns_left = [
    (turn, link)
    for turn, link in harness.rotate(group.links, turns)
    if any(len(results.setting(group, link, pack)["turns"]) <= turn for pack in group.packs)
  ]
  if not turns_left:
    return
  with Cluster(group.recipe, group.packs) as cluster:
    for turn, link in turns_left:
      began = time.monotonic()
      with cluster.linked_by(link) as relay:
        facts = cluster.facts | {"relay": relay}
        settings = [results.setting(group, link, pack) for pack in group.packs]
        if any("link" not in setting for setting in settings):
          facts["link"] = cluster.check_link()
        times = measure_turn(cluster, group, link, pace)
      for index, setting in enumerate(settings):
        collectives = facts["collectives"][index] if facts["collectives"] else 0
        setting |= facts | {"collectives": collectives}
        setting["turns"].append(times[index])
      results.write(turns)
      name = f"{group.network}, {group.tasks} tasks, {link.gigabits} Gbit/s, {link.delay_ms} ms"
      seconds = time.monotonic() - began
      print(f"turn {turn + 1} of {turns}: {name}: {seconds:.1f} s", file=sys.stderr, flush=True)


def measure_turn(cluster: Cluster, group: Group, link: Link, pace: Pace) -> list[dict]:
  """Measures all packs on a link; returns {"alone": by task, "step", "reduce"} for each."""
  kind = (group.network, group.tasks)

  def time_alone() -> list[list[float]]:
    found = cluster.time_alone(*pace.calls((*kind, "alone"), pace.seconds))
    pace.learn((*kind, "alone"), [second for seconds in found for second in seconds])
    return found

  def time_calls(what: str, index: int, guess: float) -> list[float]:
    key = (*kind, link, index, what)
    untimed, timed = pace.calls(key, guess)
    found = cluster.time(what, index, untimed, timed)
    pace.learn(key, found)
    return found

  alone = time_alone()
  transfer = transfer_seconds(cluster.facts["bytes"], group.tasks, link)
  turns = []
  for index in range(len(group.packs)):
    # The all-reduce first: TCP adapts to the link before the steps begin.
    reduce = time_calls("reduce", index, transfer) if group.tasks > 1 else []
    turns.append({"step": time_calls("step", index, alone[0][0] + transfer), "reduce": reduce})
  alone = [before + after for before, after in zip(alone, time_alone(), strict=True)]
  return [{"alone": alone, **turn} for turn in turns]


class Results:
  """The file of --json."""

  def __init__(self, path: pathlib.Path, run: dict):
    """Reads the file if it is there.

    Args:
      path: of the file.
      run: facts about this start of the program, of which the file keeps those of every start.

    Raises:
      UserError: it is not a file of this program.
    """
    self._path, self.found = path, {"complete": False, "claims": {}, "runs": [], "settings": []}
    if path.exists():
      self.found = _read(path)
    self.found["runs"].append(run)

  def setting(self, group: Group, link: Link, pack: int) -> dict:
    """The entry of a setting; a new one if there is none."""
    wanted = group.setting(link, pack)
    for setting in self.found["settings"]:
      if wanted.items() <= setting.items():
        return setting
    self.found["settings"].append(wanted | {"turns": []})
    return self.found["settings"][-1]

  def write(self, turns: int):
    """Judges what was measured and writes the file, which is complete after so many turns each.

    Raises:
      UserError: it cannot be written.
    """
    settings = self.found["settings"]
    measured = [setting for setting in settings if setting["turns"]]
    for setting in measured:
      setting["judged"] = judge(setting)
    self.found["claims"] = count_claims(measured)
    self.found["complete"] = all(len(setting["turns"]) >= turns for setting in settings)
    text = json.dumps(self.found, indent=1) + "\n"
    write_all(f"--json={self._path}", {str(self._path): text.encode()})


def _read(path: pathlib.Path) -> dict:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    found["runs"].extend([])
    for setting in found["settings"]:
      setting["turns"].extend([])
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f"--json={path} is not a file of this program ({summary(error)}); give another."
    ) from error
  return found


def to_table(settings: list[dict]) -> list[str]:
  """The lines to print of what was measured, in milliseconds."""
  heading = (
    "Gbit/s",
    "RTT ms",
    "alone",
    "reduce",
    "step",
    "forecast",
    "longer",
    "hides",
    "c1",
    "c2",
  )
  lines = [output.table_line("network, tasks, pack, Gbit/s, delay", _LABEL, heading, _CELL)]
  for setting in settings:
    if "judged" not in setting:
      continue
    judged, link = setting["judged"], setting.get("link")
    names = ("network", "tasks", "bytes_per_pack", "gigabits", "delay_ms")
    label = ", ".join(str(setting[name]) for name in names)
    cells = ["-", "-"]
    if link:
      cells = [f"{link['bits_per_second'] / 1e9:.3f}", f"{1e3 * link['round_trip_seconds']:.2f}"]
    seconds = ("alone_seconds", "reduce_seconds", "step_seconds", "forecast_seconds")
    cells += [f"{1e3 * judged[name]:.1f}" for name in seconds]
    cells.append(f"{judged['longer']:+.0%}")
    cells += ["yes" if judged[name] else "no" for name in ("hides", "c1", "c2")]
    lines.append(output.table_line(label, _LABEL, cells, _CELL))
  return lines


def _claim_lines(found: dict) -> list[str]:
  """The claims' counts; c1_by_tenth decides nothing."""
  lines = [] if found["complete"] else ["Not complete: the counts are preliminary."]
  for name, claim in found["claims"].items():
    if claim["settings"]:
      share = f"{claim['share']:.1%}"
      lines.append(f"{name}: holds in {claim['holds']} of {claim['settings']} settings ({share})")
  return lines


def _groups(values: flags.FlagValues) -> list[Group]:
  """What the flags ask for.

  Raises:
    UserError: a flag is refused.
  """
  unknown = [network for network in values.networks if network not in NETWORKS]
  if unknown or not values.networks:
    raise UserError(
      f"--networks={','.join(values.networks)} is refused; use some of {', '.join(NETWORKS)}."
    )
  links = [
    Link(gigabits, delay)
    for gigabits in _numbers("gigabits", values.gigabits, float, 1e-3, 100)
    for delay in _numbers("delays_ms", values.delays_ms, float, 0, 1000)
  ]
  return plan(
    values.networks,
    _numbers("tasks", values.tasks, int, 1, _MOST_TASKS),
    links,
    _numbers("bytes_per_pack", values.bytes_per_pack, int, 0, 2**40),
    values.image_size,
    values.per_worker_batch_size,
  )


def _numbers(name: str, words: list[str], kind: type, least: float, most: float) -> list:
  """The numbers of a flag, each once."""
  try:
    numbers = list(dict.fromkeys(kind(word) for word in words))
  except ValueError:
    numbers = []
  if not numbers or not all(least <= number <= most for number in numbers):
    what = "whole numbers" if kind is int else "numbers"
    raise UserError(
      f"--{name}={','.join(words)} is refused; give {what} from {least:g} to {most:g}."
    )
  return numbers


def main():
  values = flags.FLAGS
  harness.exit_on_sigterm()
  groups = _groups(values)
  path = output.output_path("--json", values.json)
  if path is None:
    raise UserError("Give --json=FILE; the same command continues from it.")
  run = {
    "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    "commit": hardware.commit(),
    "hardware": hardware.describe() | {"kernel": platform.release()},
    "versions": hardware.versions("tensorflow", "keras", "numpy"),
    "seconds": values.seconds,
  }
  results = Results(path, run)
  for group in groups:  # All at once, so that the file shows what is missing.
    for link, pack in itertools.product(group.links, group.packs):
      results.setting(group, link, pack)
  minutes = estimate_seconds(groups, values.turns, values.seconds) / 60
  print(f"About {minutes:.0f} minutes on two free cores, without what was measured before.")
  for group in groups:
    measure(group, values.turns, Pace(values.seconds), results)
  results.write(values.turns)
  print("\n".join([*to_table(results.found["settings"]), *_claim_lines(results.found)]))


if __name__ == "__main__":
  program.run(main, define_flags)
