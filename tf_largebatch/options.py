"""Run options: where and how a run goes. The recipe decides what it computes."""

import dataclasses
import os

from tf_largebatch import fields
from tf_largebatch.errors import UserError
from tf_largebatch.fields import declare

_LONGEST_PATH = 3000  # Linux allows 4096 bytes, and the directories hold files.
_PATHS = ("work_dir", "data_dir", "index_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
  """What may differ between two runs of one recipe without changing what they compute.

  `allreduce_dtype=bfloat16` is the one exception. A leading ~ in a directory is expanded. If it
  stands for no known home directory, it stays in data_dir and index_dir, which not every run needs.

  Raises:
    UserError: a value has the wrong type or is out of range, or work_dir is in an unknown home
      directory.
  """

  work_dir: str = declare("", "Directory that receives everything the run leaves. Required.")
  data_dir: str = declare("~/tensorflow_datasets", "Directory of the prepared data sets (TFDS).")
  index_dir: str = declare(
    "~/.cache/tf_largebatch", "Directory that keeps the record offsets of each data set."
  )
  cache: bool = declare(False, "Keep the data set's encoded images in memory.")
  bad_examples: str = declare(
    "fail",
    "What to do with an example that cannot be read. fail: end the run. skip: use another example "
    "and list the bad one in the metrics and in bad_examples.jsonl.",
    choices=("fail", "skip"),
  )
  communication: str = declare(
    "auto",
    "Collectives between replicas. auto: NCCL if every replica is a GPU, else RING.",
    choices=("auto", "nccl", "ring"),
  )
  cluster_timeout_minutes: float = declare(
    10.0,
    "Minutes to wait for all tasks at the start; then those that are up exit with status 138.",
    at_least=0.1,
  )
  heartbeat_timeout_seconds: float = declare(
    10.0,
    "Seconds that a task may be silent before the others count it as lost. On a slow network, "
    "where gradients delay the heartbeats, give more.",
    at_least=1,
    below=86400,
  )
  log_every_steps: int = declare(
    10,
    "Steps between two training records, which hold means over these steps. An epoch's end and a "
    "checkpoint end a record early.",
    at_least=1,
  )
  curvature_every_steps: int = declare(
    0,
    "Steps between two measurements of the loss's curvature, each of which multiplies the Hessian "
    "by up to 100 vectors (docs/metrics.md). 0: none.",
    at_least=0,
  )
  evaluation_batch_size: int = declare(
    128, "Images that a device evaluates at once.", at_least=1, below=2**31
  )
  checkpoint_every_steps: int = declare(
    0,
    "Steps between two checkpoints within an epoch. 0: only checkpoint_every_minutes counts.",
    at_least=0,
  )
  checkpoint_every_minutes: float = declare(
    10.0,
    "Minutes between two checkpoints within an epoch. 0: only checkpoint_every_steps counts.",
    at_least=0,
  )
  workers_per_pass: int | None = declare(
    None,
    "g, workers that a device takes through the network at once. auto (the default): 1 on a CPU; "
    "on a GPU the fastest, measured at the first start and kept in work_dir.",
    at_least=1,
    below=2**31,
  )
  jit_compile: bool | None = declare(
    None,
    "Whether XLA compiles the passes through the network and the update. auto (the default): only "
    "on GPUs.",
  )
  allreduce_dtype: str = declare(
    "float32",
    "bfloat16: round the gradients before they travel between devices, which halves the bytes; the "
    "one option that makes a run depend on its cluster.",
    choices=("float32", "bfloat16"),
  )
  bytes_per_pack: int = declare(
    2**24,
    "Minimum bytes of gradients that travel between devices together. 0: one pack.",
    at_least=0,
    below=2**31,
  )
  deterministic: bool = declare(
    False, "Compute the same bytes in every run on GPUs too, more slowly; CPUs always do."
  )

  def __post_init__(self):
    fields.convert_and_check(self)
    for name in _PATHS:
      path = getattr(self, name)
      if path or name != "work_dir":  # The run itself requires a work_dir.
        _check_path(name, path)
      object.__setattr__(self, name, expand_home(path))
    require_home("work_dir", self.work_dir)


def expand_home(path: str) -> str:
  """Expands a leading ~, unless it stands for no known home directory.

  In a container, the user often has no entry in /etc/passwd, and HOME is not set.
  """
  ours = path == "~" or path.startswith("~/")
  return path if ours and os.environ.get("HOME") == "" else os.path.expanduser(path)


def require_home(name: str, path: str) -> None:
  """Raises a UserError if `expand_home` did not expand a leading ~.

  Args:
    name: of the option.
    path: that `expand_home` returned.
  """
  if path.startswith("~"):
    raise UserError(
      f"--{name}={path!r} is in a home directory that is not known; set HOME or name a directory "
      "without ~."
    )


def _check_path(name: str, path: str):
  """Refuses a path with control characters: TensorFlow cuts at a NUL, `flags.txt` at a newline."""
  surrogates = any("\ud800" <= character <= "\udfff" for character in path)  # It was not UTF-8.
  control = any(character < " " for character in path)
  if not path or control or surrogates or len(path) > _LONGEST_PATH:
    raise UserError(
      f"--{name}={path!r} cannot be a directory's name; give 1 to {_LONGEST_PATH} characters of "
      "UTF-8 without control characters."
    )
