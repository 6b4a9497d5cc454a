r"""Runs studies: flagfiles × seeds, in any number of sessions and on any number of machines.

  python -m tools.study table1 figure1 correction --jobs=2

A STUDY is a TOML file, given by its path or by its name in `tools/studies/`:

  title = "The question that it answers"
  flags = ["--log_every_steps=50"]       # For every run.
  [[runs]]
  flagfile = "flags/fashion_mnist_kn512.flags"
  seeds = 5                              # 0 to 4.
  first_seed = 0
  flags = ["--workers_per_pass=8"]       # For these runs; none of the recipe's.
  name = "kn512_n4"                      # Optional: the runs have the flagfile's recipe with these
  recipe = ["--workers=128", "--per_worker_batch_size=4"]  # changes, and this name in its place.

Each run is a process of `tf_largebatch.train` with the work directory RUNS_DIR/FLAGFILE_seedN. All
runs of seed 0 come first, then those of seed 1, and so on. A complete run leaves
RESULTS_DIR/STUDY/FLAGFILE_seedN.json: its recipe, curves by epoch, result, versions and hardware. A
run that has this file, in the folder of any study, is not repeated, because a run is a function of
its recipe. On SIGINT or SIGTERM, and if this program ends in any other way, the runs save, and the
same command continues them. A run that diverges is a result too. A run that the machine ended is
restarted from its checkpoint, up to three times.

With --jobs=J, J runs train at once, each on its own share of this process' cores: several small
networks keep a CPU busier than one. Flags of the trainer that are not part of the recipe, such as
--data_dir, are passed on to the runs.
"""

import dataclasses
import sys

from absl import flags

from tf_largebatch.errors import UserError, summary
from tf_largebatch.options import RunOptions
from tools import program
from tools.studies.plan import RECIPE_FLAGS, read_study
from tools.studies.scheduler import Scheduler

_RUN_FLAGS = tuple(field.name for field in dataclasses.fields(RunOptions))


def define_flags():
  """Defines this program's own flags; importing `tf_largebatch.train` defines the trainer's."""
  flags.DEFINE_string("runs_dir", "runs/studies", "Directory of the runs' work directories.")
  flags.DEFINE_string("results_dir", "docs/results", "Directory of the studies' results.")
  flags.DEFINE_integer("jobs", 1, "Runs that train at once, each on its share of the cores.", 1)


def main(studies: list[str]) -> int:
  """Runs the studies and returns the exit status."""
  values = flags.FLAGS
  if not studies:
    raise UserError("No study was given; name one or more, such as table1.")
  given = [values[name] for name in (*RECIPE_FLAGS, *_RUN_FLAGS) if values[name].present]
  refused = [flag.name for flag in given if flag.name in (*RECIPE_FLAGS, "work_dir")]
  if refused:
    raise UserError(f"--{refused[0]} is refused for studies; their flagfiles define the runs.")
  passed_on = [flag.serialize() for flag in given]
  try:
    runs = [run for name in studies for run in read_study(name)]
    scheduler = Scheduler(runs, values.runs_dir, values.results_dir, passed_on)
    stopped = scheduler.train_all(values.jobs)
  except OSError as error:
    raise UserError(summary(error)) from error
  if stopped:
    print("Stopped; the same command continues the runs.", file=sys.stderr)
    return 128 + stopped
  return 0


if __name__ == "__main__":
  program.run(main, define_flags, takes_arguments=True)
