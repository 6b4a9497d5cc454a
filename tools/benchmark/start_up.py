"""Measures how long the trainer takes from its command to the end of its first step, by phase.

  python -m tools.benchmark.start_up --starts=5 --json=start_up.json -- \
    --flagfile=flags/cifar10_resnet20.flags --data_dir=data

Starts the trainer with the flags after `--`, in new work directories, and ends it after its first
step. The first start, which fills caches and indexes the data, is not counted. Times are wall-clock
seconds, except for the last line, `processor`: the CPU seconds of all threads.
"""

import statistics
import tempfile

from absl import flags

from tools import hardware, output, program
from tools.benchmark import harness
from tools.benchmark.start_up_phases import ROWS, serve

_SECONDS = 600.0  # That a start may take.


def define_flags():
  flags.DEFINE_integer("starts", 5, "How often the trainer is started.", lower_bound=1)
  flags.DEFINE_string("json", None, "File for the results, as JSON.")


def measure(arguments: list[str], starts: int) -> list[dict[str, float]]:
  """The seconds of each phase, for each counted start.

  Args:
    arguments: flags of the trainer, without work_dir and index_dir.
    starts: how often the trainer is started.

  Raises:
    UserError: the trainer refuses its flags.
  """
  found = []
  with tempfile.TemporaryDirectory() as scratch:
    for number in range(starts + 1):
      directories = [f"--work_dir={scratch}/run{number}", f"--index_dir={scratch}/index"]
      with harness.Process("The trainer", serve, scratch, {}) as process:
        process.send({"arguments": [*arguments, *directories]})
        found.append(process.receive(_SECONDS)["seconds"])
  return found[1:]


def main(arguments: list[str]):
  path = output.output_path("--json", flags.FLAGS.json)
  found = measure(arguments, flags.FLAGS.starts)
  print(output.table_line("seconds", 26, ("median", "least", "most"), 10))
  for row in ROWS:
    values = [each.get(row, 0.0) for each in found]
    cells = [f"{statistic(values):.2f}" for statistic in (statistics.median, min, max)]
    print(output.table_line(row, 26, cells, 10))
  if path is not None:
    facts = {"arguments": arguments, "hardware": hardware.describe()}
    output.write_json("--json", path, facts | {"starts": found})


if __name__ == "__main__":
  harness.exit_on_sigterm()
  program.run(main, define_flags, takes_arguments=True)
