r"""Trains on a Ray cluster: one task of the trainer in each of Ray Train's workers.

  python -m tools.ray_train --ray_workers=2 --gpus_per_ray_worker=8 \
    --flagfile=flags/imagenet_resnet50_table1_kn8192_gradual.flags \
    --data_dir=/shared/data --work_dir=/shared/run

Takes the trainer's flags, with directories that all of Ray's nodes share. Needs Ray
(`pip install "ray[train]"`), and this package on every node. Ray names the tasks through
`TF_CONFIG`. If it loses a worker it starts all of them again, and they continue from the newest
checkpoint; a user's mistake ends the job.
"""

import dataclasses
import json
import os

from absl import flags

from tf_largebatch import command_line
from tf_largebatch.errors import UserError
from tools import program


def define_flags():
  command_line.define_flags()
  flags.DEFINE_integer("ray_workers", 2, "Ray's workers, each of which is a task.", lower_bound=1)
  flags.DEFINE_integer("gpus_per_ray_worker", 0, "GPUs of each of them.", lower_bound=0)
  flags.DEFINE_integer("max_restarts", 20, "How often Ray starts them again.", lower_bound=0)


class Mailbox:
  """An actor that brings a task's result to the driver; Ray's own result needs a checkpoint."""

  def __init__(self):
    self._result = {"error": "No task has ended."}

  def put(self, result: dict):
    self._result = result

  def get(self) -> dict:
    return self._result


def train_task(settings: dict) -> None:
  """In a worker of Ray's: trains, and mails the result, or a user's mistake as "error"."""
  import ray

  # Also defines the flags, which only the driver parses; the worker gets the settings.
  from tf_largebatch import train
  from tf_largebatch.distributed.cluster import read_cluster

  recipe = settings["recipe"]
  try:
    train.adapt_to_surroundings()
    cluster = read_cluster()
    train.set_environment(recipe, cluster.num_tasks)
    from tf_largebatch.training.trainer import train_and_evaluate

    result = train_and_evaluate(recipe, settings["options"], cluster)
  except UserError as error:
    result = {"error": str(error)}  # Ray would start the workers again after an exception.
  ray.get(settings["mailbox"].put.remote(result))


def _absolute(path: str) -> str:
  """Returns the path as Ray's workers, which start in other directories, can use it."""
  return path if "://" in path or path.startswith("~") else os.path.abspath(path)


def main():
  recipe, options = command_line.recipe_from_flags(), command_line.options_from_flags()
  if not options.work_dir:
    raise UserError("No --work_dir was given; name a directory that all of Ray's nodes share.")
  try:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer
  except ImportError as error:
    raise UserError(f'Ray is not installed ({error}); run pip install "ray[train]".') from error
  directories = {n: _absolute(getattr(options, n)) for n in ("work_dir", "data_dir", "index_dir")}
  gpus = flags.FLAGS.gpus_per_ray_worker
  mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
  options = dataclasses.replace(options, **directories)
  trainer = TensorflowTrainer(
    train_task,
    train_loop_config={"recipe": recipe, "options": options, "mailbox": mailbox},
    scaling_config=ScalingConfig(
      num_workers=flags.FLAGS.ray_workers,
      use_gpu=gpus > 0,
      resources_per_worker={"GPU": gpus} if gpus else None,
    ),
    run_config=RunConfig(failure_config=FailureConfig(max_failures=flags.FLAGS.max_restarts)),
  )
  trainer.fit()
  result = ray.get(mailbox.get.remote())
  if "error" in result:
    raise UserError(result["error"])
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  program.run(main, define_flags)
