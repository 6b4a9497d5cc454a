"""The training binary: flags → `Recipe` and `RunOptions` → `train_and_evaluate`.

  python -m tf_largebatch.train --flagfile=flags/cifar10_resnet20.flags --work_dir=runs/cifar10

Every field of `Recipe` and of `RunOptions` is a flag of the same name. On several machines the same
command runs on each with its own `TF_CONFIG`.
"""

import contextlib
import json
import os
import shlex
import sys
import tempfile
import warnings

from absl import app, flags, logging

from tf_largebatch import command_line, foreign_settings, standard_streams
from tf_largebatch.distributed.cluster import read_cluster
from tf_largebatch.errors import InterruptedRunError, UserError
from tf_largebatch.machine import thread_settings, usable_cores
from tf_largebatch.recipe import Recipe
from tf_largebatch.signals import StopRequest, end_process, print_line

command_line.define_flags()

# Lines that TensorFlow logs at each start and that help nobody: INFO and, on a machine without a
# GPU, the failed search for one.
_NOISE = (
  r"^I0000 00:00:|^WARNING: All log messages before absl::InitializeLog|"
  r"^To enable the following instructions:"
)
_NO_GPU_NOISE = r"|^E0000 00:00:.* failed call to cuInit: "


def set_environment(recipe: Recipe, num_tasks: int = 1):
  """Configures TensorFlow, before it is imported (docs/benchmarks.md).

  Args:
    recipe: of the run.
    num_tasks: that train together, on any machines.

  Raises:
    UserError: Keras could not be imported because of `keras.json`.
  """
  ignored = foreign_settings.ignore()
  if ignored:
    logging.warning("Ignored %s, which would change what is computed.", ", ".join(ignored))
  if not flags.FLAGS["verbosity"].present:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # No INFO lines.
  # TensorFlow itself uses oneDNN only on CPUs with AVX-512, but it is faster with AVX2 too.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
  cores = usable_cores()
  if (recipe.workers or 1) >= 2 and cores <= 2:
    # Two workers' passes at once, one thread each, beat two threads for each op of one pass.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
  # TensorFlow would start a thread for each core of the machine: it does not see a quota.
  if cores < len(os.sched_getaffinity(0)) or (cores == 1 and num_tasks > 1):
    for name, value in thread_settings(cores).items():
      os.environ.setdefault(name, value)


def adapt_to_surroundings():
  """Adapts this process where TensorFlow would fail or leave something behind.

  Raises:
    UserError: no directory takes temporary files.
  """
  if any(action == "error" for action, *_ in warnings.filters):
    warnings.simplefilter("default")  # `python -W error` would stop the libraries anywhere.
  if os.path.expanduser("~") == "~":
    # The user has no home directory: TensorFlow would make one named ~ here.
    os.environ.setdefault("KERAS_HOME", os.devnull)
  try:
    tempfile.gettempdir()
  except FileNotFoundError as error:
    raise UserError(
      f"TensorFlow needs a directory for temporary files ({error.strerror}); set TMPDIR to a "
      "directory that can be written."
    ) from error


def main(argv: list[str]) -> int:
  """Trains, and returns the exit status: 0, or that of the error (see `errors`)."""
  with StopRequest().watch_signals() as stop:
    try:
      return _train(argv, stop)
    except (UserError, InterruptedRunError) as error:
      print_line(f"error: {error}")
      if isinstance(error, InterruptedRunError):
        end_process(error.status)
      return error.status


def _train(argv: list[str], stop: StopRequest) -> int:
  if len(argv) > 1:
    raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
  recipe, options = command_line.recipe_from_flags(), command_line.options_from_flags()
  cluster = read_cluster()
  adapt_to_surroundings()
  if not options.work_dir:
    raise UserError("No --work_dir was given; name a directory for what the run leaves.")
  if not (cluster.is_chief or flags.FLAGS["verbosity"].present):
    logging.set_verbosity(logging.WARNING)  # The chief logs the same lines.
  set_environment(recipe, cluster.num_tasks)
  train_and_evaluate = _import_trainer()
  result = train_and_evaluate(recipe, options, cluster, stop)
  if cluster.is_chief:
    tensorboard = shlex.quote(os.path.join(options.work_dir, "tensorboard"))
    lines = (
      json.dumps(result, indent=2),
      f"Result: {os.path.join(options.work_dir, 'result.json')}",
      f"Curves: tensorboard --logdir {tensorboard}",
    )
    print_line("\n".join(lines), to_stdout=True)
  return 0


@contextlib.contextmanager
def _without_matplotlib():
  """Lets Keras do without Matplotlib, which it would import for two functions that draw."""
  if "matplotlib" in sys.modules:
    yield
    return
  sys.modules["matplotlib"] = None  # Importing it raises ImportError, which Keras expects.
  try:
    yield
  finally:
    del sys.modules["matplotlib"]


def _import_trainer():
  """Imports late: TensorFlow takes seconds, and a user's mistake should not wait for it."""
  has_gpu = os.path.exists("/dev/nvidiactl")
  noise = _NOISE if has_gpu else _NOISE + _NO_GPU_NOISE
  loud, quiet = contextlib.nullcontext(), standard_streams.without_lines(noise)
  with _without_matplotlib(), loud if flags.FLAGS["verbosity"].present else quiet:
    import tensorflow as tf

    from tf_largebatch.training.trainer import train_and_evaluate

    tf.config.list_physical_devices()  # The first call logs.
  return train_and_evaluate


def _parse_or_exit(argv: list[str]) -> list[str]:
  try:
    return command_line.parse_flags(argv)
  except UserError as error:
    print_line(f"error: {error}")
    sys.exit(error.status)


def run():
  """Runs the installed command."""
  standard_streams.open_closed_streams()
  logging.get_absl_handler().python_handler.setStream(sys.stderr)  # It was None if closed.
  logging.set_verbosity(logging.INFO)
  standard_streams.drop_library_logs(logging.get_absl_handler())
  app.run(main, flags_parser=_parse_or_exit)


if __name__ == "__main__":
  run()
