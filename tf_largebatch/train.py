"""The training binary: flags → `Recipe` → `train_and_evaluate`.

  python -m tf_largebatch.train --flagfile=flags/cifar10_resnet20.flags --work_dir=runs/cifar10

Every field of `Recipe` is a flag of the same name. On several machines the same command runs on
each with its own `TF_CONFIG`.
"""

import contextlib
import dataclasses
import io
import json
import logging as stdlib_logging
import math
import os
import shlex
import sys

from absl import app, flags, logging

from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.errors import InterruptedRunError, UserError, first_line
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest, end_process, print_line

_DEFINE = {
  bool: flags.DEFINE_boolean,
  int: flags.DEFINE_integer,
  int | None: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
  str | None: flags.DEFINE_string,
  tuple[float, ...]: flags.DEFINE_list,
  tuple[float, ...] | None: flags.DEFINE_list,
}
_FIELDS = dataclasses.fields(Recipe)
for _field in _FIELDS:
  _default = list(map(str, _field.default)) if isinstance(_field.default, tuple) else _field.default
  _DEFINE[_field.type](_field.name, _default, _field.metadata["help"])

_LONGEST_PATH = 3000  # Linux takes 4096 bytes, and files lie in it.

# What follows decides where and how a run goes on, never what it computes.
_RUN_FLAGS = (
  flags.DEFINE_string("work_dir", None, "Directory that the run leaves everything in."),
  flags.DEFINE_string(
    "data_dir", "~/tensorflow_datasets", "Directory of the prepared data sets (TFDS)."
  ),
  flags.DEFINE_string(
    "index_dir",
    "~/.cache/tf_largebatch",
    "Directory where it is kept from run to run at which offsets the records of a data set lie.",
  ),
  flags.DEFINE_boolean("cache", False, "Hold the data set's encoded images in memory."),
  flags.DEFINE_enum(
    "bad_examples",
    "fail",
    ["fail", "skip"],
    "What an example that cannot be read does: end the run, or be left out, which the metrics and "
    "bad_examples.jsonl tell.",
  ),
  flags.DEFINE_enum(
    "communication",
    "auto",
    ["auto", "nccl", "ring"],
    "Collectives between replicas; auto: NCCL where every replica is a GPU, else RING.",
  ),
  flags.DEFINE_float(
    "cluster_timeout_minutes",
    10.0,
    "How long the tasks may take to come up; then those that did end with status 138.",
    lower_bound=0.1,
  ),
  flags.DEFINE_integer(
    "log_every_steps",
    10,
    "Steps between two records of the training metrics, which are means over them.",
    lower_bound=1,
  ),
  flags.DEFINE_integer(
    "evaluation_batch_size",
    128,
    "Images that a device evaluates at once.",
    lower_bound=1,
    upper_bound=2**31 - 1,
  ),
  flags.DEFINE_integer(
    "checkpoint_every_steps",
    0,
    "Steps between two checkpoints within an epoch; 0: only as checkpoint_every_minutes says.",
    lower_bound=0,
  ),
  flags.DEFINE_float(
    "checkpoint_every_minutes",
    10.0,
    "Minutes between two checkpoints within an epoch; 0: only as checkpoint_every_steps says.",
    lower_bound=0,
  ),
  flags.DEFINE_string(
    "workers_per_pass",
    "auto",
    "g, workers that a device takes through the network at once; auto: 1 on a CPU, and on a GPU "
    "what is fastest there, measured at the start.",
  ),
  flags.DEFINE_enum(
    "jit_compile",
    "auto",
    ["auto", "true", "false"],
    "Whether XLA compiles the passes through the network and the update; auto: on GPUs.",
  ),
  flags.DEFINE_enum(
    "allreduce_dtype",
    "float32",
    ["float32", "bfloat16"],
    "bfloat16: gradients are rounded before they travel between devices, half the bytes; the one "
    "flag by which a run depends on its cluster.",
  ),
  flags.DEFINE_integer(
    "bytes_per_pack",
    2**24,
    "Bytes of gradients that travel together between devices, at least; 0: all of them.",
    lower_bound=0,
    upper_bound=2**31 - 1,
  ),
  flags.DEFINE_boolean(
    "deterministic",
    False,
    "The same bytes in every run on GPUs too, at some cost in speed; CPUs do so anyway.",
  ),
)


def recipe_from_flags(values: flags.FlagValues = flags.FLAGS) -> Recipe:
  """The recipe that the flags tell.

  Raises:
    UserError: a value is no number or out of range.
  """
  fields = {}
  for field in _FIELDS:
    value = values[field.name].value
    if isinstance(value, list):
      try:
        value = tuple(float(item) for item in value if item.strip())
      except ValueError as error:
        raise UserError(
          f"{field.name}={','.join(value)} is no list of numbers: {error}."
        ) from error
    fields[field.name] = value
  return Recipe(**fields)


def step_options_from_flags(values: flags.FlagValues = flags.FLAGS) -> dict:
  """The arguments of `step.StepOptions` that the flags tell.

  Raises:
    UserError: workers_per_pass is neither auto nor a number.
  """
  workers_per_pass = values.workers_per_pass
  if workers_per_pass == "auto":
    workers_per_pass = None
  elif not workers_per_pass.isdecimal() or not 1 <= int(workers_per_pass) < 2**31:
    raise UserError(
      f"--workers_per_pass={workers_per_pass} is refused; auto or a whole number would do."
    )
  else:
    workers_per_pass = int(workers_per_pass)
  return {
    "workers_per_pass": workers_per_pass,
    "jit_compile": {"auto": None, "true": True, "false": False}[values.jit_compile],
    "allreduce_dtype": values.allreduce_dtype,
    "bytes_per_pack": values.bytes_per_pack,
  }


def set_environment(recipe: Recipe):
  """Tells TensorFlow, before it is imported, what its CPU kernels do (docs/speed.md)."""
  # TensorFlow's own choice on CPUs with AVX-512 alone, but faster with AVX2, too.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
  if (recipe.workers or 1) >= 2 and (os.cpu_count() or 1) <= 2:
    # Two workers' passes at once, a thread each, beat two threads for each op of one.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")


def main(argv):
  """Trains, and returns the process' exit status: 0, or as `errors` has them."""
  with StopRequest().watch_signals() as stop:
    try:
      return _train(argv, stop)
    except (UserError, InterruptedRunError) as error:
      print_line(f"error: {error}")
      if isinstance(error, InterruptedRunError):
        end_process(error.status)
      return error.status


def _train(argv, stop: StopRequest) -> int:
  if len(argv) > 1:
    raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
  recipe, cluster = recipe_from_flags(), read_cluster()
  if not flags.FLAGS.work_dir:
    raise UserError("No --work_dir was given; name a directory for what the run leaves.")
  for name in ("work_dir", "data_dir", "index_dir"):
    _check_path(name, flags.FLAGS[name].value)
  if not math.isfinite(flags.FLAGS.checkpoint_every_minutes):
    raise UserError(
      f"checkpoint_every_minutes={flags.FLAGS.checkpoint_every_minutes} is refused; it must be "
      "finite (0: no checkpoints by the clock)."
    )
  step_options = step_options_from_flags()
  set_environment(recipe)
  # Only now, for TensorFlow takes seconds to import and a user's mistake should not wait for it.
  from tf_largebatch.training import step, trainer

  work_dir = os.path.expanduser(flags.FLAGS.work_dir)
  result = trainer.train_and_evaluate(
    recipe,
    data_dir=os.path.expanduser(flags.FLAGS.data_dir),
    work_dir=work_dir,
    cluster=cluster,
    communication=flags.FLAGS.communication,
    cluster_timeout_minutes=flags.FLAGS.cluster_timeout_minutes,
    log_every_steps=flags.FLAGS.log_every_steps,
    evaluation_batch_size=flags.FLAGS.evaluation_batch_size,
    checkpoint_every_steps=flags.FLAGS.checkpoint_every_steps,
    checkpoint_every_minutes=flags.FLAGS.checkpoint_every_minutes,
    deterministic=flags.FLAGS.deterministic,
    index_dir=os.path.expanduser(flags.FLAGS.index_dir),
    cache=flags.FLAGS.cache,
    bad_examples=flags.FLAGS.bad_examples,
    step_options=step.StepOptions(**step_options),
    run_flags="".join(f"{flags.FLAGS[flag.name].serialize()}\n" for flag in _RUN_FLAGS),
    stop=stop,
  )
  if cluster.is_chief:
    told = (
      json.dumps(result, indent=2),
      f"Result: {os.path.join(work_dir, 'result.json')}",
      f"Curves: tensorboard --logdir {shlex.quote(os.path.join(work_dir, 'tensorboard'))}",
    )
    print_line("\n".join(told), to_stdout=True)
  return 0


def _check_path(name: str, path: str):
  """TensorFlow would take a path with a NUL for what stands before it: another directory."""
  surrogates = any("\ud800" <= character <= "\udfff" for character in path)  # It was not UTF-8.
  if not path or "\0" in path or surrogates or len(path) > _LONGEST_PATH:
    raise UserError(
      f"--{name}={path!r} can be no directory's name; give one in UTF-8 of 1 to {_LONGEST_PATH} "
      "characters."
    )


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses the flags and flagfiles; returns what is left of argv.

  Raises:
    UserError: one cannot be read, is unknown or has a bad value; a flagfile names itself.
  """
  flagfiles = " ".join(word for word in argv if "flagfile" in word)
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      left = values(argv)
  except flags.Error as error:
    raise UserError(f"{str(error).removeprefix('ERROR:: ')} (--helpfull tells all).") from error
  except ValueError as error:  # Of a flagfile alone: values that are wrong raise the other.
    raise UserError(f"{flagfiles}: no file of flags ({first_line(error)}).") from error
  if said.getvalue():  # Absl only warns of a flagfile that comes round to itself.
    raise UserError(said.getvalue().strip())
  return left


def _parse_or_exit(argv: list[str]) -> list[str]:
  try:
    return parse_flags(argv)
  except UserError as error:
    print_line(f"error: {error}")
    sys.exit(error.status)


def _is_ours_or_a_warning(record) -> bool:
  return record.levelno >= stdlib_logging.WARNING or "tensorflow_datasets" not in record.pathname


def run():
  """The entry point of the installed command."""
  logging.set_verbosity(logging.INFO)
  # TensorFlow Datasets tells each file it opens.
  logging.get_absl_handler().addFilter(_is_ours_or_a_warning)
  app.run(main, flags_parser=_parse_or_exit)


if __name__ == "__main__":
  run()
