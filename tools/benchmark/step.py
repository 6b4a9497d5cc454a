r"""How fast a training step is, beside Keras and PyTorch, and how near to what the machine can do.

  python -m tools.benchmark.step --contenders=ours,keras,fit,torch --network=resnet50 \
    --image_size=224 --dtype=float32 --turns=5 --json=step.json

Every field of the recipe is a flag, and a flagfile of the trainer's will do. The contenders run in
turns, each in a process of its own that waits while another one works, on the same random images,
on the first GPU alone where there are several; a turn is a step that is not timed and then those
that are:

  ours            the compiled step of `step.make_train_step`, as the trainer calls it
  loop            the trainer's own loop around it, with its metrics, input from memory; compared
                  with the same process' bare step, bare, loop, loop, bare in each turn; and, on a
                  CPU, where a step is done when it returns, the share of the loop's time that its
                  steps take, which no change of the machine's speed can blur
  keras           the same network of stock Keras layers, Keras' SGD, in a plain compiled step
  fit             the same by `Model.fit`
  torch           the same network in PyTorch, eager, channels_last (autocast for 16 bits)
  torch_compiled  the same by `torch.compile`

A contender takes options of its own, `ours:workers=8:tasks=2`: fields of the recipe, the trainer's
workers_per_pass, jit_compile, allreduce_dtype and bytes_per_pack, variables of the environment
(TF_ENABLE_ONEDNN_OPTS=0), cores, the machine's first so many, and for ours tasks, which share the
cores evenly between them. Those that are not ours take the step's kn images of k workers in k
passes with gradients added up, as one would there (fit: in k updates).

FLOPs are those of convolutions and dense layers, 2 a multiply-add, and backprop twice the forward
pass (less the first layer's gradient of its input). A contender's ceiling is a large matrix product
of its dtype on its cores, in the turns too: on a CPU in float32 by NumPy's OpenBLAS, else by
TensorFlow's oneDNN or cuBLAS. --profile tells the operations that most of each one's step goes to
(not PyTorch's): on a CPU seconds of all threads, on a GPU of its kernels.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from absl import app, flags

from tf_largebatch import train
from tf_largebatch.errors import UserError, first_line
from tf_largebatch.recipe import Recipe
from tools.forecast import usual_classes
from tools.launch_local import free_addresses

_KINDS = ("ours", "loop", "keras", "fit", "torch", "torch_compiled")
_STEP_OPTIONS = ("workers_per_pass", "jit_compile", "allreduce_dtype", "bytes_per_pack")
_OPERATIONS = 12  # That the table tells; the JSON has all.
_START_SECONDS = 1200  # Compiling for a GPU takes minutes.
_PRODUCT_SIDE = {"cpu": 2048, "gpu": 8192}


def define_flags():
  flags.DEFINE_list("contenders", ["ours", "keras", "torch"], "See above; the first is compared.")
  flags.DEFINE_integer("turns", 5, "How often each is timed.", lower_bound=1)
  flags.DEFINE_integer("steps", 1, "Steps of each in a turn.", lower_bound=1)
  flags.DEFINE_string("json", None, "File for the figures.")
  flags.DEFINE_boolean("profile", False, "Tell the operations, too.")


@dataclasses.dataclass(frozen=True)
class Contender:
  """What is timed: a kind, the recipe's fields, how the step is computed, and on what."""

  name: str
  kind: str
  recipe: dict
  step_options: dict
  environment: dict
  tasks: int = 1
  cores: int | None = None  # None: all.


def parse_contender(text: str, recipe: dict, step_options: dict) -> Contender:
  """A contender from `KIND:name=value:…`; what it does not say is as given.

  Raises:
    UserError: the kind, a name or a value is unknown.
  """
  kind, *settings = text.split(":")
  if kind not in _KINDS:
    raise UserError(f"--contenders={text}: {kind!r} is none of {', '.join(_KINDS)}.")
  recipe, step_options, environment = dict(recipe), dict(step_options), {}
  own = {"tasks": 1, "cores": len(os.sched_getaffinity(0))}
  for setting in settings:
    name, _, value = setting.partition("=")
    if name.isupper():
      environment[name] = value
      continue
    with contextlib.suppress(ValueError):
      value = json.loads(value)
    if name in own:
      own[name] = value
      most = len(os.sched_getaffinity(0)) if name == "cores" else 1000
      if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"--contenders={text}: {setting!r} must be a whole number, 1 to {most}.")
    elif name in _STEP_OPTIONS:
      step_options[name] = value
    elif name in recipe:
      recipe[name] = value
    else:
      raise UserError(f"--contenders={text}: {setting!r} is no option of a contender.")
  recipe = Recipe(**recipe).to_dict()  # Raises where a value is out of range.
  if (recipe["workers"] or 1) % own["tasks"]:
    raise UserError(f"--contenders={text}: tasks={own['tasks']} must divide the workers.")
  if kind.startswith("torch") and recipe["network"] != "resnet50":
    raise UserError(f"--contenders={text}: of PyTorch's networks only resnet50 is here.")
  if recipe["dtype"] == "float64" and kind not in ("ours", "loop"):
    raise UserError(f"--contenders={text}: dtype=float64 is for ours and loop alone.")
  if own["tasks"] > 1 and kind != "ours":
    raise UserError(f"--contenders={text}: several tasks are for ours alone.")
  return Contender(text, kind, recipe, step_options, environment, **own)


# What each contender's process does: builds a function that takes a step and returns its loss.


def _source(recipe: Recipe, size: int):
  import numpy as np

  rng = np.random.default_rng(0)
  side, channels = recipe.image_size, len(recipe.channel_mean)
  images = rng.integers(0, 256, (size, side, side, channels), dtype=np.uint8)
  return images, rng.integers(0, usual_classes(recipe.network), size, dtype=np.int32)


def make_ours(contender: Contender, cluster) -> Callable[[int], float]:
  import tensorflow as tf

  from tf_largebatch.distributed.cluster import make_strategy
  from tf_largebatch.optim.loss_scale import LossScale
  from tf_largebatch.training import step, trainer

  strategy = make_strategy(cluster)
  recipe, options = Recipe(**contender.recipe), step.StepOptions(**contender.step_options)
  replicas = strategy.num_replicas_in_sync
  with strategy.scope():
    model = trainer.build_model(recipe, usual_classes(recipe.network))
    optimizer = trainer.build_optimizer(recipe, 1_281_167, options.jit)
    optimizer.build(model.trainable_variables)
    loss_scale = LossScale() if recipe.dtype == "float16" else None
  options = trainer.with_workers_per_pass(options, strategy, model, recipe)
  train_step = step.make_train_step(strategy, model, optimizer, recipe, options, loss_scale)
  images, labels = _source(recipe, recipe.global_batch_size // replicas)
  shape = (recipe.workers // replicas, recipe.per_worker_batch_size)
  batch = (images.reshape(*shape, *images.shape[1:]), labels.reshape(shape))
  if replicas > 1:
    batch = tuple(
      strategy.experimental_distribute_values_from_function(lambda _, x=x: tf.constant(x))
      for x in batch
    )
  else:
    batch = tuple(tf.constant(x) for x in batch)
  stop = tf.constant(0.0)  # As the trainer asks, or the step would be traced twice.

  def bare(steps: int) -> float:
    return [float(train_step(batch, stop)["loss"]) for _ in range(steps)][-1]

  loop = contender.kind == "loop"
  steps = _make_loop(model, optimizer, recipe, train_step, batch, bare) if loop else bare
  steps.passes = shape[0] // options.workers_per_pass
  return steps


def _make_loop(model, optimizer, recipe, train_step, batch, bare):
  from tf_largebatch.signals import StopRequest
  from tf_largebatch.training import trainer
  from tf_largebatch.training.metrics import MetricsWriter

  def timed_step(*arguments):
    began = time.perf_counter()
    scalars = train_step(*arguments)
    steps.within += time.perf_counter() - began
    return scalars

  work_dir = tempfile.mkdtemp()  # The process' own, in a directory that its parent removes.
  run = trainer.Run(
    recipe=recipe,
    steps_per_epoch=1000,
    train_step=timed_step,
    batches=itertools.repeat(batch),
    stop=StopRequest(),
    alone=True,
    log_every_steps=10,
    checkpoint_every_steps=0,
    checkpoint_every_minutes=0,
    bad=None,
    checkpoints=trainer.Checkpoints(work_dir, model, optimizer),
    metrics=MetricsWriter(work_dir, recipe.to_dict(), 0, 10**6, evaluated_epochs=0),
  )

  def steps(count: int) -> float:
    steps.within = 0.0
    trainer.train_to(run, run.done + count)
    return float(run.done)

  steps.bare = bare
  return steps


def _make_keras(contender: Contender):
  import keras

  from tf_largebatch.models import resnet

  recipe = Recipe(**contender.recipe)
  policy = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
  model = resnet.build(
    recipe.network,
    input_shape=(recipe.image_size, recipe.image_size, len(recipe.channel_mean)),
    num_classes=usual_classes(recipe.network),
    normalization=functools.partial(
      keras.layers.BatchNormalization,
      momentum=recipe.batch_norm_momentum,
      epsilon=recipe.batch_norm_epsilon,
    ),
    channel_mean=recipe.channel_mean,
    channel_std=recipe.channel_std,
    dtype=policy[recipe.dtype],
  )
  optimizer = keras.optimizers.SGD(0.1, momentum=recipe.momentum, nesterov=recipe.nesterov)
  return recipe, model, optimizer


def make_keras(contender: Contender, cluster) -> Callable[[int], float]:
  import keras
  import tensorflow as tf

  recipe, model, optimizer = _make_keras(contender)
  images, labels = (tf.constant(x) for x in _source(recipe, recipe.per_worker_batch_size))
  crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

  def gradients():
    with tf.GradientTape() as tape:
      loss = crossentropy(labels, model(images, training=True))
    return loss, tape.gradient(loss, model.trainable_variables)

  @tf.function(jit_compile=contender.step_options.get("jit_compile") or False)
  def step():
    loss, total = gradients()
    for _ in range(recipe.workers - 1):
      loss, more = gradients()
      total = [a + b for a, b in zip(total, more, strict=True)]
    optimizer.apply([gradient / recipe.workers for gradient in total], model.trainable_variables)
    return loss

  return lambda steps: [float(step()) for _ in range(steps)][-1]


def make_fit(contender: Contender, cluster) -> Callable[[int], float]:
  import keras
  import tensorflow as tf

  recipe, model, optimizer = _make_keras(contender)
  jit = contender.step_options.get("jit_compile")
  model.compile(
    optimizer,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    jit_compile="auto" if jit is None else jit,
  )
  batch = tuple(tf.constant(x) for x in _source(recipe, recipe.per_worker_batch_size))
  data = tf.data.Dataset.from_tensors(batch).cache().repeat()

  def steps(count: int) -> float:
    history = model.fit(data, epochs=1, steps_per_epoch=count * recipe.workers, verbose=0)
    return history.history["loss"][-1]

  return steps


def make_torch(contender: Contender, cluster) -> Callable[[int], float]:
  import numpy as np
  import torch

  recipe = Recipe(**contender.recipe)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.backends.cudnn.benchmark = True
  model = _torch_resnet50(torch.nn).to(device).to(memory_format=torch.channels_last)
  if contender.kind == "torch_compiled":
    model = torch.compile(model)
  optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
  images, labels = _source(recipe, recipe.per_worker_batch_size)
  images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
  labels = torch.from_numpy(labels.astype(np.int64)).to(device)
  mean, std = (
    torch.tensor(values, device=device, dtype=torch.float32).reshape(1, -1, 1, 1)
    for values in (recipe.channel_mean, recipe.channel_std)
  )
  dtype = getattr(torch, recipe.dtype)
  scaler = torch.amp.GradScaler(device, enabled=recipe.dtype == "float16")

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    for _ in range(recipe.workers):
      with torch.autocast(device, dtype=dtype, enabled=recipe.dtype != "float32"):
        loss = torch.nn.functional.cross_entropy(model((images - mean) / std), labels)
      scaler.scale(loss / recipe.workers).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss

  return lambda steps: [float(step()) for _ in range(steps)][-1]


def _torch_resnet50(nn):
  """ResNet-50 as torchvision has it, which has no CPU build here: stride on the 3×3, no biases."""

  class Bottleneck(nn.Module):
    def __init__(self, inputs: int, filters: int, stride: int):
      super().__init__()
      outputs = 4 * filters
      self.body = nn.Sequential(
        *_torch_unit(nn, inputs, filters, 1, 1),
        nn.ReLU(inplace=True),
        *_torch_unit(nn, filters, filters, 3, stride),
        nn.ReLU(inplace=True),
        *_torch_unit(nn, filters, outputs, 1, 1),
      )
      self.shortcut = nn.Identity()
      if inputs != outputs:
        self.shortcut = nn.Sequential(*_torch_unit(nn, inputs, outputs, 1, stride))
      self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
      return self.relu(self.body(x) + self.shortcut(x))

  layers = [*_torch_unit(nn, 3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
  inputs = 64
  for stage, blocks in enumerate((3, 4, 6, 3)):
    for block in range(blocks):
      filters = 64 * 2**stage
      layers.append(Bottleneck(inputs, filters, 2 if stage and not block else 1))
      inputs = 4 * filters
  head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, usual_classes("resnet50"))]
  return nn.Sequential(*layers, *head)


def _torch_unit(nn, inputs: int, outputs: int, size: int, stride: int):
  convolution = nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=False)
  return convolution, nn.BatchNorm2d(outputs)


def make_product(contender: Contender, cluster) -> Callable[[int], float]:
  """A matrix product of as many FLOPs as `product_flops` says, by the fastest way at hand."""
  import tensorflow as tf

  on = "gpu" if tf.config.get_visible_devices("GPU") else "cpu"
  side = _PRODUCT_SIDE[on]
  if on == "cpu" and contender.recipe["dtype"] == "float32":
    import numpy as np

    # OpenBLAS, which is faster than TensorFlow's with oneDNN, let alone without.
    matrix = np.random.default_rng(0).standard_normal((side, side), np.float32)
    return lambda steps: [float((matrix @ matrix).max()) for _ in range(8 * steps)][-1]
  a = tf.random.normal([side, side], dtype=tf.float32)
  a = tf.cast(a, contender.recipe["dtype"])
  tf.config.experimental.enable_tensor_float_32_execution(False)
  product = tf.function(lambda: tf.cast(tf.reduce_max(tf.matmul(a, a)), tf.float32))
  return lambda steps: [float(product()) for _ in range(8 * steps)][-1]


def ceiling_of(contender: Contender) -> Contender:
  """What it is held against: the product in its dtype on its cores."""
  dtype, cores = contender.recipe["dtype"], contender.cores
  name = f"a matrix product, {dtype}, by {cores} cores or a GPU"
  return Contender(name, "product", contender.recipe, {}, {}, cores=cores)


def product_flops(gpu: bool) -> float:
  """Of one turn's step of `make_product`."""
  return 8 * 2 * _PRODUCT_SIDE["gpu" if gpu else "cpu"] ** 3


@functools.cache  # Contenders often differ in how alone.
def count_work(recipe: Recipe) -> dict[str, int]:
  """ "flops" of one image's forward and backward pass, "parameters" that are trained."""
  import keras

  from tf_largebatch.training import trainer

  forward, first = 0, None
  model = trainer.build_model(recipe, usual_classes(recipe.network), "export")
  for layer in model.layers:
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
      positions = 1
      for side in layer.output.shape[1:-1]:
        positions *= side
      flops = 2 * positions * layer.kernel.shape.num_elements()
      first = flops if first is None else first
      forward += flops
  parameters = sum(variable.shape.num_elements() for variable in model.trainable_variables)
  return {"flops": 3 * forward - first, "parameters": parameters}


_MAKERS = {
  "ours": make_ours,
  "loop": make_ours,
  "keras": make_keras,
  "fit": make_fit,
  "torch": make_torch,
  "torch_compiled": make_torch,
  "product": make_product,
}


def work():
  """The program of such a process: told a contender, then numbers of steps, on stdin."""
  message = json.loads(sys.stdin.readline())
  contender = Contender(**message["contender"])
  cores = sorted(os.sched_getaffinity(0))[: contender.cores]
  share, task = len(cores) // contender.tasks, message["task"]
  os.sched_setaffinity(0, cores[task * share :][:share] if share else cores)
  if message["tf_config"]:
    os.environ["TF_CONFIG"] = message["tf_config"]
  if contender.kind in ("ours", "loop"):  # The others run as they come.
    train.set_environment(Recipe(**contender.recipe))
  elif contender.kind == "product":  # All threads for its one operation.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
  from tf_largebatch.distributed.cluster import read_cluster

  try:
    take_steps = _MAKERS[contender.kind](contender, read_cluster())
    take_steps(1)
    take_steps(1)
    report = {"passes": getattr(take_steps, "passes", contender.recipe["workers"])}
  except (UserError, ImportError) as error:
    report = {"error": first_line(error)}
  _say(report)
  for line in sys.stdin:
    if line.strip() == "profile":
      _say({"operations": _profile(take_steps) if _is_tensorflow(contender) else {}})
      continue
    take_steps(1)  # Not timed: what it needs was moved out of caches and memory by the others.
    steps, report = int(line), {}
    if contender.kind == "loop":  # In an order that a machine growing slower or faster spares.
      parts = [_timed(f, steps) for f in (take_steps.bare, take_steps, take_steps, take_steps.bare)]
      report["bare_seconds"] = (parts[0]["seconds"] + parts[3]["seconds"]) / 2
      parts = parts[1:3]
      # Of the second of the two alone: each begins anew.
      report["share_within_steps"] = take_steps.within / parts[1]["seconds"]
    else:
      parts = [_timed(take_steps, steps)]
    report |= {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
    _say(report | _memory(contender))
  os._exit(0)  # Without the destructors of the libraries' threads, some of which wait.


def _timed(take_steps: Callable, steps: int) -> dict[str, float]:
  began, cpu = time.perf_counter(), time.process_time()
  last = take_steps(steps)
  seconds = time.perf_counter() - began
  return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "last": last}


def _is_tensorflow(contender: Contender) -> bool:
  return not contender.kind.startswith("torch")


def _profile(take_steps: Callable) -> dict[str, float]:
  """Seconds of a step by operation, of a GPU's kernels or else of the CPU's threads."""
  import tensorflow as tf
  from tensorflow.tsl.profiler.protobuf import xplane_pb2

  with tempfile.TemporaryDirectory() as directory:
    with tf.profiler.experimental.Profile(directory):
      take_steps(1)
    (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
  planes = [plane for plane in space.planes if "device:GPU" in plane.name]
  found = collections.Counter()
  for plane in planes or [plane for plane in space.planes if "host:CPU" in plane.name]:
    for line in plane.lines:
      for event in line.events:
        name = plane.event_metadata[event.metadata_id].name
        # On the CPU an operation is "its name:its type"; what calls it ("A::B") is there, too.
        owner, colon, kind = name.rpartition(":")
        if planes or (colon and kind.isidentifier() and not owner.endswith(":")):
          found[name if planes else kind] += event.duration_ps / 1e12
  return dict(found.most_common())


def _memory(contender: Contender) -> dict:
  """The process' largest resident set so far, and the GPU's largest use, in bytes."""
  found = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  if not _is_tensorflow(contender):
    import torch

    if torch.cuda.is_available():
      found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
  else:
    import tensorflow as tf

    if tf.config.get_visible_devices("GPU"):
      found["gpu_peak_bytes"] = tf.config.experimental.get_memory_info("GPU:0")["peak"]
  return found


def _say(report: dict):
  print(f"\n{json.dumps(report)}", flush=True)


# What the parent does.


class Processes:
  """The processes of a contender, one a task."""

  def __init__(self, contender: Contender, scratch: str):
    self.contender = contender
    self._log = pathlib.Path(scratch) / f"{len(os.listdir(scratch))}.log"
    tf_config = [None]
    if contender.tasks > 1:
      workers = free_addresses(contender.tasks)
      tf_config = [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
        for index in range(contender.tasks)
      ]
    self._processes = []
    with open(self._log, "ab") as log:
      for task, config in enumerate(tf_config):
        process = subprocess.Popen(
          [sys.executable, "-c", "from tools.benchmark import step; step.work()"],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=log,
          text=True,
          env={
            **os.environ,
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            "TMPDIR": scratch,
            **contender.environment,
          },
          start_new_session=True,
        )
        self._processes.append(process)
        message = {"contender": dataclasses.asdict(contender), "task": task, "tf_config": config}
        self._tell(process, json.dumps(message))

  def _tell(self, process, line: str):
    with contextlib.suppress(BrokenPipeError):  # `_hear` tells why.
      process.stdin.write(f"{line}\n")
      process.stdin.flush()

  def _hear(self, process) -> dict:
    """The next report.

    Raises:
      UserError: the process said that it cannot, failed, or was silent for too long.
    """
    timer = threading.Timer(_START_SECONDS, process.kill)
    timer.start()
    try:
      for line in process.stdout:
        if line.startswith("{"):
          report = json.loads(line)
          if "error" in report:
            raise UserError(f"{self.contender.name}: {report['error']}")
          return report
    finally:
      timer.cancel()
    print(self._log.read_text(errors="replace")[-4000:], file=sys.stderr)
    raise UserError(f"{self.contender.name} failed with status {process.wait()}.")

  def ready(self) -> dict:
    """Waits until all tasks have compiled and warmed up; the first one's report."""
    reports = [self._hear(process) for process in self._processes]
    return reports[0]

  def take(self, steps: int) -> dict:
    """The first task's report of so many steps; memory is all tasks'."""
    for process in self._processes:
      self._tell(process, str(steps))
    reports = [self._hear(process) for process in self._processes]
    for name in ("cpu_seconds", "peak_bytes", "gpu_peak_bytes"):
      if name in reports[0]:
        reports[0][name] = sum(report[name] for report in reports)
    return reports[0]

  def profile(self) -> dict[str, float]:
    """The first task's operations; the others take the step with it."""
    for process in self._processes:
      self._tell(process, "profile")
    reports = [self._hear(process) for process in self._processes]
    return reports[0]["operations"]

  def end(self):
    for process in self._processes:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      process.stdout.close()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def run_in_turns(contenders: list[Contender], turns: int, steps: int, profile: bool) -> dict:
  """The reports of each contender's turns by name, and those of its `ceiling_of`.

  Raises:
    UserError: none of them could be measured.
  """
  products = {product.name: product for product in map(ceiling_of, contenders)}
  results, running = {}, []
  with contextlib.ExitStack() as held:
    scratch = held.enter_context(tempfile.TemporaryDirectory())
    for contender in [*contenders, *products.values()]:
      processes = Processes(contender, scratch)
      held.callback(processes.end)
      try:  # One after another, for compiling keeps all cores busy.
        results[contender.name] = {"ready": processes.ready(), "turns": []}
        running.append(processes)
      except UserError as error:
        if contender.kind == "product":
          raise
        print(f"not measured: {error}", file=sys.stderr, flush=True)
        processes.end()
    for turn in range(turns):
      begin = turn % len(running)
      for processes in running[begin:] + running[:begin]:
        report = processes.take(steps)
        name = processes.contender.name
        results[name]["turns"].append(report)
        seconds = report["seconds"] / steps
        print(f"turn {turn + 1} of {turns}: {name}: {seconds:.3f} s", file=sys.stderr, flush=True)
    if profile:
      for processes in running:
        results[processes.contender.name]["operations"] = processes.profile()
  if not set(results) - set(products):
    raise UserError("None of the contenders could be measured.")
  return results


def summarize(contenders: list[Contender], results: dict, steps: int, work: dict) -> dict:
  """The figures by contender's name; ratios are of medians, to the first contender.

  Args:
    contenders, results, steps: those of `run_in_turns`.
    work: `count_work` of each that was measured, by name.
  """
  rows, ceilings = {}, {}
  for name in dict.fromkeys(ceiling_of(contender).name for contender in contenders):
    turns = results[name]["turns"]
    seconds = statistics.median(turn["seconds"] for turn in turns)
    ceilings[name] = product_flops("gpu_peak_bytes" in turns[0]) * steps / seconds
  for contender in contenders:
    if contender.name not in results:
      continue
    found = results[contender.name]
    recipe = Recipe(**contender.recipe)
    each = [turn["seconds"] / steps for turn in found["turns"]]
    seconds = statistics.median(each)
    images = recipe.global_batch_size
    flops = images * work[contender.name]["flops"] / seconds
    rows[contender.name] = {
      "kind": contender.kind,
      "network": recipe.network,
      "image_size": recipe.image_size,
      "per_worker_batch_size": recipe.per_worker_batch_size,
      "workers": recipe.workers,
      "passes": found["ready"]["passes"],
      "tasks": contender.tasks,
      "cores": contender.cores,
      "dtype": recipe.dtype,
      "step_options": contender.step_options,
      "gradient_bytes": 4 * work[contender.name]["parameters"],
      "steps": steps,
      "step_seconds": seconds,
      "step_seconds_each": each,
      "images_per_second": images / seconds,
      "cpu_seconds": statistics.median(turn["cpu_seconds"] / steps for turn in found["turns"]),
      "flops_per_second": flops,
      "share_of_ceiling": flops / ceilings[ceiling_of(contender).name],
      "peak_bytes": found["turns"][-1]["peak_bytes"],
      "gpu_peak_bytes": found["turns"][-1].get("gpu_peak_bytes"),
      "operations": found.get("operations", {}),
    }
    if contender.kind == "loop":
      shares = [turn["bare_seconds"] / turn["seconds"] for turn in found["turns"]]
      rows[contender.name]["share_of_bare_step"] = statistics.median(shares)
      rows[contender.name]["share_of_bare_step_each"] = shares
      shares = [turn["share_within_steps"] for turn in found["turns"]]
      on_gpu = "gpu_peak_bytes" in found["turns"][-1]  # Its steps go on when they have returned.
      rows[contender.name]["share_within_steps"] = None if on_gpu else statistics.median(shares)
  base = next(iter(rows.values()))["images_per_second"]
  for row in rows.values():
    row["ratio"] = base / row["images_per_second"]
  return {"contenders": rows, "ceilings_flops_per_second": ceilings}


def to_table(summary: dict) -> list[str]:
  """Lines for people."""
  rows = summary["contenders"]
  width = max(map(len, ["contender", *rows]))
  heading = ("images/s", "[min–max]", "first/this", "GFLOP/s", "of ceiling", "peak MiB")
  lines = [f"{'contender':<{width}}" + "".join(f"{cell:>16}" for cell in heading)]
  for name, row in rows.items():
    images = row["images_per_second"] * row["step_seconds"]
    slowest, fastest = (images / pick(row["step_seconds_each"]) for pick in (max, min))
    cells = (
      f"{row['images_per_second']:.2f}",
      f"[{slowest:.2f}–{fastest:.2f}]",
      f"{row['ratio']:.3f}",
      f"{row['flops_per_second'] / 1e9:.1f}",
      f"{row['share_of_ceiling']:.0%}",
      f"{(row['gpu_peak_bytes'] or row['peak_bytes']) / 2**20:.0f}",
    )
    lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
  for name, row in rows.items():
    if "share_of_bare_step" in row:
      shares = row["share_of_bare_step_each"]
      share = f"{row['share_of_bare_step']:.1%} [{min(shares):.1%}–{max(shares):.1%}]"
      lines.append(f"{name}: {share} of its own bare step's images/s")
      if row["share_within_steps"]:
        lines.append(f"{name}: {row['share_within_steps']:.2%} of the loop's time is its steps'")
    operations = list(row["operations"].items())[:_OPERATIONS]
    if operations:
      total = sum(row["operations"].values())
      shares = (f"{kind} {seconds / total:.1%}" for kind, seconds in operations)
      lines.append(f"{name}: {total:.3f} s: {', '.join(shares)}")
  for name, ceiling in summary["ceilings_flops_per_second"].items():
    lines.append(f"ceiling: {name} at {ceiling / 1e9:.1f} GFLOP/s")
  return lines


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  try:
    if argv[1:]:
      raise UserError(f"Unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
    path = pathlib.Path(values.json).expanduser() if values.json else None
    if path and not path.parent.is_dir():
      raise UserError(f"--json={values.json}: there is no such directory; make it first.")
    recipe = train.recipe_from_flags().to_dict()
    recipe["workers"] = recipe["workers"] or 1
    recipe["image_size"] = recipe["image_size"] or 224
    for name, default in (
      ("channel_mean", (123.675, 116.28, 103.53)),
      ("channel_std", (58.395, 57.12, 57.375)),
    ):
      recipe[name] = recipe[name] or default
    options = train.step_options_from_flags()
    contenders = [parse_contender(text, recipe, options) for text in values.contenders]
    results = run_in_turns(contenders, values.turns, values.steps, values.profile)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.status
  # Here and now, where TensorFlow takes none of the contenders' memory, nor a GPU's.
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")
  measured = [contender for contender in contenders if contender.name in results]
  work = {contender.name: count_work(Recipe(**contender.recipe)) for contender in measured}
  summary = summarize(contenders, results, values.steps, work)
  print("\n".join(to_table(summary)))
  if path:
    packages = ("tensorflow", "keras", "torch", "numpy")
    summary["versions"] = {"python": platform.python_version()}
    for package in packages:
      with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        summary["versions"][package] = importlib.metadata.version(package)
    summary["hardware"] = {"machine": platform.processor(), "cores": len(os.sched_getaffinity(0))}
    path.write_text(json.dumps(summary, indent=2))
  return 0


if __name__ == "__main__":
  define_flags()
  app.run(main)
