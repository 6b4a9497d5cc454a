"""Bad TF_CONFIGs, flags, flagfiles and directories: one clear line each, and nothing overwritten.

What is found before the slow import of TensorFlow is tried with the program itself, and one of the
others; the rest call its `main` in this process. What the one line of each kind of mistake says in
detail, the tests of the modules hold.
"""

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest.mock as mock

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags
from absl.testing import flagsaver
from hypothesis import strategies as st

from tests.launching import ROOT
from tf_largebatch import command_line, train
from tf_largebatch.data import sources
from tf_largebatch.distributed.cluster import Cluster, read_cluster
from tf_largebatch.errors import UserError
from tf_largebatch.models.networks import build_model
from tf_largebatch.optim.optimizers import build_optimizer
from tf_largebatch.optim.sgd import MomentumCorrectedSGD
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import resolution, work_directory
from tf_largebatch.training.bad_examples import BadExamples
from tf_largebatch.training.checkpoint import Checkpoints, Manifest
from tf_largebatch.training.metrics import MetricsWriter, read_metrics

_SMALL = (
  "--dataset=synthetic",
  "--train_split=train[:40]",
  "--validation_split=validation[:20]",
  "--image_size=8",
  "--network=resnet8",
  "--workers=2",
  "--per_worker_batch_size=10",
  "--epochs=1",
  "--warmup_epochs=0",
  "--decay_epochs=",
)
_LONG = "x" * 10_000


def contents(directory):
  """All that lies in a directory, the digest of each file; not .lock, which tells who came last."""
  return {
    path.relative_to(directory): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
    for path in directory.rglob("*")
    if path.name != ".lock"
  }


def check_line(errors, names):
  """One line that names what is wrong, of a length that can be read."""
  (line,) = errors
  assert line.startswith("error: ") and names in line
  assert line.isprintable() and len(line) < 2500


def run_program(*arguments, **environment):
  """The program's status and the lines of its standard error."""
  finished = subprocess.run(
    [sys.executable, "-m", "tf_largebatch.train", *arguments],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    encoding="utf-8",
    timeout=120,
    check=False,
  )
  return finished.returncode, finished.stderr.splitlines()


def check_program(directory, names, *arguments, **environment):
  """It refuses at once, whatever run the work directory holds, and leaves that alone."""
  work_dir = directory / "run"
  work_dir.mkdir()
  for name in ("recipe.json", "result.json", "metrics.jsonl", "flags.txt", "model.keras"):
    (work_dir / name).write_text("precious")
  before = contents(directory)
  status, errors = run_program(f"--work_dir={work_dir}", *_SMALL, *arguments, **environment)
  assert status == 1
  check_line(errors, names)  # TensorFlow, had it been imported, would have said more.
  assert contents(directory) == before


def check_main(capfd, work_dir, names, *arguments, watched=None):
  """The same of `main`, in this process, where any other exception would fail the test.

  Args:
    watched: the directory that is to hold what it held, where it is not work_dir; something new
      may be there too.
  """
  before = contents(watched or work_dir)
  # The thread that waits for signals is slow to end, and no matter of these tests.
  calm = mock.patch.object(train.StopRequest, "watch_signals", contextlib.nullcontext)
  with calm, flagsaver.flagsaver():
    argv = command_line.parse_flags(["train", f"--work_dir={work_dir}", *arguments])
    assert train.main(argv) == 1
  lines = capfd.readouterr().err.splitlines()
  check_line([line for line in lines if line.startswith("error: ")], names)
  assert not any("Traceback" in line for line in lines)
  after = contents(watched or work_dir)
  assert before == ({path: after.get(path) for path in before} if watched else after)


def config(cluster, index=0):
  return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


TF_CONFIGS = {
  "empty": ("", "not JSON"),
  "cut off": (config({"worker": ["a:1"]})[:-9], "not JSON"),
  "no JSON, 10 kB": (_LONG, "xxxx"),
  "not UTF-8": (b"\xff{}", "not JSON"),
  "a list": ("[1, 2]", "[1, 2]"),
  "nested too deep": ("[" * 100_000, "[[[["),
  "nested too deep where an address was expected": (
    '{"cluster": {"worker": [%s]}, "task": {}}' % ("[" * 900 + "]" * 900),
    "[[[[",
  ),
  "no task": ('{"cluster": {"worker": ["a:1"]}}', '"task" is missing'),
  "parameter servers": (config({"ps": ["a:1"], "worker": ["b:1"]}), '"ps"'),
  "a port too high": (config({"worker": ["a:65536"]}), "a:65536"),
  "no port, of many tasks": (config({"worker": [f"a{i}:1" for i in range(999)] + ["b"]}), '"b"'),
  "a host with a newline": (config({"worker": ["a\nb:1"]}), r"a\nb:1"),
  "a host that no network knows": (config({"worker": ["\ud800:1", "ü:1"]}), r"\ud800:1"),
  "an address twice": (config({"worker": ["a:1", "a:1"]}), '["a:1"]'),
  "an index too high": (config({"worker": ["a:1", "b:1"]}, 2), "given 2"),
  "an index of text": (config({"worker": ["a:1", "b:1"]}, "1"), 'given "1"'),
}


@pytest.mark.parametrize("case", TF_CONFIGS)
def test_tf_config(case, tmp_path):
  text, names = TF_CONFIGS[case]
  check_program(tmp_path, names, TF_CONFIG=text)


FLAGS = {
  "unknown": (["--wokers=8"], "wokers"),
  "no value": (["--workers"], "workers"),
  "no flag": (["workers=8"], "workers=8"),
  "a newline and a page of text": ([f"--dtype=float\n{_LONG}"], r"float\nxxx"),
  "a newline in a number": (["--workers=8\n9"], r"8\n9"),
  "text for a number": (["--workers=many"], "many"),
  "a number of 5000 digits": (["--workers=" + "9" * 5000], "--workers=999"),
  "a fraction of a worker": (["--workers=1.5"], "1.5"),
  "text for a boolean": (["--nesterov=perhaps"], "perhaps"),
  "a list that is none": (['--decay_epochs="1'], '"1'),
  "a list of text": (["--decay_epochs=1,x"], "decay_epochs=1,x"),
  "n = 0": (["--per_worker_batch_size=0"], "per_worker_batch_size=0"),
  "k below 0": (["--workers=-8"], "workers=-8"),
  "epochs beyond all": (["--epochs=1" + "0" * 400], "epochs=100"),
  "k beyond all": (["--workers=1" + "0" * 400], "workers=100"),
  "n beyond all": (["--per_worker_batch_size=4294967296"], "per_worker_batch_size=4294967296"),
  "decays out of order": (["--epochs=9", "--decay_epochs=5,3"], "decay_epochs=(5.0, 3.0)"),
  "a warmup longer than the run": (["--workers=64", "--warmup_epochs=4"], "warmup_epochs=4.0"),
  "a warmup too long for any k": (["--warmup_epochs=inf"], "warmup_epochs=inf"),
  "a reference beyond all": (["--reference_batch_size=1" + "0" * 400], "reference_batch_size=100"),
  "images beyond all": (["--image_size=1000000000"], "image_size=1000000000"),
  "a decay beyond all": (["--epochs=9", "--decay_epochs=1,1e308"], "1e+308"),
  "a rate that is none": (["--reference_learning_rate=nan"], "reference_learning_rate=nan"),
  "a rate beyond all": (["--reference_learning_rate=1e999"], "reference_learning_rate=inf"),
  "a rate below 0": (["--reference_learning_rate=-0.1"], "reference_learning_rate=-0.1"),
  "a peak rate beyond all": (
    ["--reference_learning_rate=1e308", "--reference_batch_size=1"],
    "reference_learning_rate=1e+308",
  ),
  "momentum 1": (["--momentum=1"], "momentum=1.0"),
  "weight decay without bounds": (["--weight_decay=inf"], "weight_decay=inf"),
  "a factor of 0": (["--decay_factor=0"], "decay_factor=0.0"),
  "an epsilon of 0": (["--batch_norm_epsilon=0"], "batch_norm_epsilon=0.0"),
  "a deviation of 0": (["--channel_std=1,0,1"], "channel_std=(1.0, 0.0, 1.0)"),
  "a seed below 0": (["--seed=-1"], "seed=-1"),
  "a dtype unknown": (["--dtype=float8"], "float8"),
  "a network unknown": (["--network="], "network=''"),
  "nothing evaluated at once": (
    ["--evaluation_batch_size=0"],
    "evaluation_batch_size=0 is out of range",
  ),
  "logged every -1 steps": (["--log_every_steps=-1"], "log_every_steps=-1 is out of range"),
  "no number of minutes": (["--checkpoint_every_minutes=nan"], "checkpoint_every_minutes=nan"),
  "collectives unknown": (["--communication=mpi"], "mpi"),
  "workers_per_pass no number": (["--workers_per_pass=all"], "workers_per_pass=all"),
  "workers_per_pass of zero": (["--workers_per_pass=0"], "workers_per_pass=0"),
  "jit_compile unknown": (["--jit_compile=maybe"], "maybe"),
  "bad examples mended": (["--bad_examples=mend"], "mend"),
  "a work_dir without a name": (["--work_dir="], "--work_dir"),
  "a work_dir of 10 kB": ([f"--work_dir={_LONG}"], "--work_dir='xxx"),
  "an index_dir of 10 kB": ([f"--index_dir={_LONG}"], "--index_dir='xxx"),
  "a work_dir that is not UTF-8": ([b"--work_dir=a\xff"], r"--work_dir='a\udcff'"),
  "a data_dir without a name": (["--dataset=cifar10", "--data_dir="], "--data_dir"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, tmp_path):
  arguments, names = FLAGS[case]
  check_program(tmp_path, names, *arguments)


# The first file is the one that is given.
FLAGFILES = {
  "missing": ({}, "bad.flags"),
  "a directory": ({"bad.flags/notes": b""}, "bad.flags"),
  "in itself": ({"bad.flags": b"--flagfile={}/bad.flags\n"}, "bad.flags"),
  "in one that is in it": (
    {"bad.flags": b"--flagfile={}/b.flags\n", "b.flags": b"--flagfile={}/bad.flags\n"},
    "bad.flags",
  ),
  "one in it is missing": ({"bad.flags": b"--flagfile={}/gone.flags\n"}, "gone.flags"),
  "not UTF-8": ({"bad.flags": b"--workers=8\n\xff\xfe\n"}, "bad.flags"),
  "binary": ({"bad.flags": random.Random(0).randbytes(100_000)}, "bad.flags"),
  "bytes that are text": ({"bad.flags": bytes(range(128)) * 100}, r"'\x00\x01"),
  "an unknown flag": ({"bad.flags": b"--workers=8\n--no_such_flag=1\n"}, "no_such_flag"),
  "a bad value": ({"bad.flags": b"--workers=8\n--epochs=x\n"}, "--epochs=x"),
  "a bad recipe": ({"bad.flags": b"--epochs=0\n"}, "epochs=0"),
  "no dashes": ({"bad.flags": b"workers=8\n"}, "workers=8"),
  "JSON": ({"bad.flags": b'{"workers": 8}\n'}, '{"workers": 8}'),
  "a name that no file can have": ({"bad.flags": b"--flagfile=a\0b\n"}, "bad.flags"),
  "a work_dir that no directory can be": ({"bad.flags": b"--work_dir=a\0b\n"}, r"'a\x00b'"),
  "a data_dir that no directory can be": ({"bad.flags": b"--data_dir=a\0b\n"}, r"'a\x00b'"),
}


@pytest.mark.parametrize("case", FLAGFILES)
def test_flagfiles(case, tmp_path):
  files, names = FLAGFILES[case]
  for name, content in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.replace(b"{}", os.fsencode(tmp_path)))
  check_program(tmp_path, names, f"--flagfile={tmp_path / 'bad.flags'}")


def recipe_of(*arguments):
  with flagsaver.flagsaver():
    flags.FLAGS(["train", *arguments])
    return command_line.recipe_from_flags()


def tiny(units=3):
  """Variables to save and to restore."""
  model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units)])
  optimizer = MomentumCorrectedSGD(0.1)
  optimizer.build(model.trainable_variables)
  return model, optimizer


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """A work directory as the small recipe leaves it, but that another network was saved there."""
  directory = tmp_path_factory.mktemp("runs") / "whole"
  directory.mkdir()
  recipe = resolution.resolve(recipe_of(*_SMALL), 1, "")
  (directory / "recipe.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
  (directory / "flags.txt").write_text(command_line.to_flagfile(recipe))
  records = [
    {"kind": "train", "step": 1, "epoch": 0.5, "loss": 2.0, "error": 0.5},
    {"kind": "train", "step": 2, "epoch": 1.0, "loss": 1.5, "error": 0.25},
    {"kind": "eval", "step": 2, "epoch": 1, "loss": 1.75, "error": 0.5},
  ]
  (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  checkpoints = Checkpoints(str(directory / "checkpoints"), *tiny())
  checkpoints.save(1, 0.5)
  checkpoints.save(2, 1.0)
  checkpoints.evaluated(2, 0.5)
  checkpoints.wait()
  result = {"status": "complete", "steps": 2, "val_error": 0.5}
  (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
  return directory


@pytest.fixture
def run_dir(whole_run, tmp_path):
  """A copy of it, not complete."""
  directory = tmp_path / "run"
  shutil.copytree(whole_run, directory)
  (directory / "result.json").unlink()
  return directory


def replace(name, content):
  """Puts a file into the work directory, or a directory (None)."""

  def change(directory):
    path = directory / name
    if path.is_dir():
      shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content is None:
      path.mkdir(parents=True)
      (path / "notes.txt").write_text("precious")
    else:
      path.write_bytes(content)

  return change


def edit(**fields):
  """Changes fields of the recipe that is there, or takes them away (None)."""

  def change(directory):
    facts = json.loads((directory / "recipe.json").read_text())
    recipe = facts["recipe"] | fields
    facts["recipe"] = {name: recipe[name] for name in recipe if fields.get(name, 0) is not None}
    (directory / "recipe.json").write_text(json.dumps(facts))

  return change


def without_a_recipe(directory):
  (directory / "recipe.json").unlink()


DEEP = b"[" * 100_000
# What is wrong with the work directory of a run that is to be continued, and what the line names.
WORK_DIRS = {
  "another recipe": (edit(seed=7), "seed is 7 there and 0 now"),
  "an older schema": (edit(epochs=None), "epochs is 90 there and 1 now"),
  "a newer schema": (edit(shoe_size=_LONG), "'shoe_size'"),
  "k of text": (edit(workers="many"), "workers='many'"),
  "recipe.json empty": (replace("recipe.json", b""), "recipe.json does not hold the recipe"),
  "recipe.json cut off": (
    replace("recipe.json", b'{"recipe": {"work'),
    "recipe.json does not hold the recipe",
  ),
  "recipe.json of a list": (
    replace("recipe.json", b'{"recipe": [1]}'),
    "recipe.json does not hold the recipe",
  ),
  "recipe.json of another program": (replace("recipe.json", b'{"cake": 1}'), "'recipe'"),
  "recipe.json not UTF-8": (
    replace("recipe.json", b"\xff\xfe{}"),
    "recipe.json does not hold the recipe",
  ),
  "recipe.json nested too deep": (replace("recipe.json", DEEP), "nested too deep"),
  "recipe.json a directory": (replace("recipe.json", None), "recipe.json does not hold the recipe"),
  "no recipe.json": (without_a_recipe, "flags.txt and metrics.jsonl and checkpoints"),
  "result.json empty": (replace("result.json", b""), "result.json is not the result"),
  "result.json cut off": (
    replace("result.json", b'{"status": "comp'),
    "result.json is not the result",
  ),
  "result.json of a list": (replace("result.json", b"[[1, 2]]"), "result.json is not the result"),
  "result.json of another program": (
    replace("result.json", b"{}"),
    "result.json is not the result",
  ),
  "result.json not UTF-8": (replace("result.json", b"\xff"), "result.json is not the result"),
  "result.json nested too deep": (replace("result.json", DEEP), "nested too deep"),
  "result.json a directory": (replace("result.json", None), "result.json is not the result"),
  ".lock a directory": (replace(".lock", None), "cannot be written"),
  "another network's checkpoint": (lambda directory: None, "step-0000000002.json holds other"),
  "checkpoints a file": (replace("checkpoints", b"mine"), "checkpoints cannot be listed"),
}


@pytest.mark.parametrize("case", WORK_DIRS)
def test_work_directories(case, run_dir, capfd):
  change, names = WORK_DIRS[case]
  change(run_dir)
  check_main(capfd, run_dir, names, *_SMALL)


ELSEWHERE = {
  "a file": ("{}/file", "file is not a directory"),
  "under a file": ("{}/file/run", "file is not a directory"),
  "a device": ("/dev/null", "work_dir=/dev/null cannot be written"),
  "where nobody writes": ("/proc/run", "work_dir=/proc/run cannot be written"),
  "a name too long": ("{}/" + "x" * 300, "too long"),
  "a newline": ("{}/file/a\nb", r"file/a\nb cannot be written"),
  "a scheme unknown": ("foo://x/run", "scheme 'foo' not implemented"),
  "a scheme that TensorFlow lost": ("s3://x/run", "scheme 's3' not implemented"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_work_directories_that_cannot_be(case, tmp_path, capfd):
  name, names = ELSEWHERE[case]
  (tmp_path / "file").write_text("precious")
  check_main(capfd, name.format(tmp_path), names, *_SMALL, watched=tmp_path)


@contextlib.contextmanager
def mounted(directory, options):
  if os.geteuid() != 0:
    pytest.skip("only root can mount a small disk")
  directory.mkdir()
  (directory / "notes.txt").write_text("precious")  # Under the disk, and not seen.
  if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]).returncode:
    pytest.skip("this sandbox lets nobody mount")
  try:
    yield
  finally:
    subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("options", ["ro", "size=4k", "size=12k"])
def test_a_disk_that_is_read_only_or_full(options, tmp_path, capfd):
  """The last has room for the probe, but not for recipe.json beside the lock."""
  disk = tmp_path / "disk"
  with mounted(disk, options):
    if options == "size=12k":
      (disk / "notes.txt").write_text("precious")
    check_main(capfd, disk / "run", "cannot be written", *_SMALL, watched=disk)


def test_a_work_directory_in_use(run_dir, capfd):
  with open(run_dir / ".lock", "wb") as lock:
    lock.write(b"\xff\nme")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    check_main(capfd, run_dir, r"in use by a run (�\nme)", *_SMALL)


class FewPictures(tfds.core.GeneratorBasedBuilder):
  """Of no fixed size, so that they are read by an index of their records."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for index in range(count):
      yield index, {"image": np.zeros((8 + index, 9, 3), np.uint8), "label": index % 5}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("pictures") / "data"
  FewPictures(data_dir=data_dir).download_and_prepare()
  return data_dir


_VERSION = "few_pictures/1.0.0"
_SHARD = f"{_VERSION}/few_pictures-train.tfrecord-00000-of-00001"
# What is wrong with the data, the flags beside, and what the line names.
DATA = {
  "a file": (None, [f"--data_dir={__file__}"], __file__),
  "a set's directory a file": (replace("few_pictures", b""), [], "few_pictures"),
  "a version's directory a file": (replace(_VERSION, b""), [], "few_pictures"),
  "what is not prepared": (replace(_VERSION, None), [], "few_pictures"),
  "dataset_info.json junk": (replace(f"{_VERSION}/dataset_info.json", b"{"), [], "few_pictures"),
  "dataset_info.json binary": (
    replace(f"{_VERSION}/dataset_info.json", b"\xff\0"),
    [],
    "few_pictures",
  ),
  "a shard cut off": (replace(_SHARD, b"\0" * 30), [], _SHARD),
  "a shard empty": (replace(_SHARD, b""), [], _SHARD),
  "a shard a directory": (replace(_SHARD, None), [], _SHARD),
  "an unknown version": (None, ["--dataset=few_pictures:9.9.9"], "few_pictures:9.9.9"),
  "an unknown config": (None, ["--dataset=few_pictures/blue"], "few_pictures/blue"),
  "an unknown set, nearly": (None, ["--dataset=cifar11"], "did you mean cifar10"),
  "no name": (None, ["--dataset="], "dataset ''"),
  "a name that is a path": (None, ["--dataset=../data"], "../data"),
  "a name of 10 kB": (None, [f"--dataset={_LONG}"], "xxx"),
  "a name of two lines": (None, ["--dataset=few\npictures"], r"few\npictures"),
  "a split unknown": (None, ["--train_split=training"], "'training'"),
  "a split of no name": (None, ["--train_split="], "split ''"),
  "a slice not closed": (None, ["--train_split=train[:5"], "'train[:5'"),
  "a slice of words": (None, ["--train_split=train[a:b]"], "'train[a:b]'"),
  "a slice backwards": (None, ["--train_split=train[9:5]"], "train[9:5]"),
  "a slice backwards by one": (None, ["--train_split=train[9:8]"], "train[9:8]"),
  "a slice backwards behind another": (
    None,
    ["--train_split=train[:9]+train[8:5]"],
    "train[:9]+train[8:5]",
  ),
  "a slice of all": (None, ["--train_split=all[:5]"], "'all[:5]'"),
  "a slice of 200 %": (None, ["--train_split=train[:200%]"], "train[:200%]"),
  "a slice of nothing": (None, ["--validation_split=test[:0]"], "test[:0]"),
  "a split of 10 kB": (None, [f"--validation_split={_LONG}"], "xxx"),
  "a digit too many": (None, [f"--train_split=train[:{'9' * 5000}]"], "999"),
  "nothing but zeros": (
    None,
    ["--dataset=synthetic", "--validation_split=validation[:00]"],
    "validation[:00]",
  ),
  "a number of 5000 digits": (
    None,
    ["--dataset=synthetic", f"--train_split=train[:{'9' * 5000}]"],
    "999",
  ),
  "images that no memory holds": (
    None,
    ["--dataset=synthetic", "--image_size=60000"],
    "image_size below 60000",
  ),
  "a step of more than there is": (None, ["--workers=400"], "4000 images is more than the 20"),
  "two channels": (None, ["--channel_mean=1,2"], "channel_mean=1.0,2.0"),
  "passes that do not divide": (
    None,
    ["--workers_per_pass=7"],
    "workers_per_pass=7 does not divide",
  ),
  "NCCL without a GPU": (None, ["--communication=nccl"], "'nccl'"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, pictures, tmp_path, capfd, monkeypatch):
  change, arguments, names = DATA[case]
  monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [])
  data_dir = tmp_path / "data"
  shutil.copytree(pictures, data_dir)
  if change:
    change(data_dir)
  check_main(
    capfd,
    tmp_path / "run",
    names,
    *_SMALL,
    "--dataset=few_pictures",
    "--train_split=train",
    "--validation_split=test",
    f"--data_dir={data_dir}",
    f"--index_dir={tmp_path / 'index'}",
    *arguments,
  )
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("index_dir", ["file", "file/under", "foo://x", _LONG])
def test_an_index_that_cannot_be_kept_is_made_each_time(index_dir, pictures, tmp_path, caplog):
  """No run need end for it."""
  (tmp_path / "file").write_text("precious")
  index_dir = index_dir if "://" in index_dir else str(tmp_path / index_dir)
  with caplog.at_level("WARNING", logger="absl"):
    source = sources.open_source("few_pictures", "train", str(pictures), index_dir=index_dir)
  assert source.num_examples == 20 and "The index cannot be saved" in caplog.text
  assert (tmp_path / "file").read_text() == "precious"


def test_the_program_itself_with_tensorflow(run_dir):
  """What is found late ends the process as it ends `main`."""
  edit(seed=7)(run_dir)
  before = contents(run_dir)
  status, lines = run_program(f"--work_dir={run_dir}", *_SMALL)
  assert status == 1 and not any("Traceback" in line for line in lines)
  check_line([line for line in lines if line.startswith("error: ")], "seed is 7 there and 0 now")
  assert contents(run_dir) == before


def test_a_damaged_metrics_file_does_not_end_a_run(run_dir, caplog):
  """They are no state of the run: it goes on, and what was there stays beside the new file."""
  path = run_dir / "metrics.jsonl"
  good = path.read_bytes().splitlines(keepends=True)
  damaged = b"".join(
    [good[0], b"\xff\0junk\n", b'{"kind": "eval", "step": 1}\n', DEEP + b"\n", *good[1:]]
  )
  path.write_bytes(damaged)
  with caplog.at_level("WARNING", logger="absl"), MetricsWriter(str(run_dir), {}, 2, 2):
    pass
  assert path.read_bytes() == b"".join(good)
  assert (run_dir / "metrics.jsonl.damaged").read_bytes() == damaged
  assert "3 lines of" in caplog.text


def test_a_checkpoint_past_the_end(run_dir, capfd):
  """Of another run, put there by hand."""
  recipe = resolution.resolve(recipe_of(*_SMALL), 1, "")
  model = build_model(recipe, 1000)
  optimizer = build_optimizer(recipe, 40)
  optimizer.build(model.trainable_variables)
  checkpoints = Checkpoints(str(run_dir / "checkpoints"), model, optimizer)
  checkpoints.save(3, 1.0)
  checkpoints.wait()
  check_main(capfd, run_dir, "step 3, past the 2", *_SMALL)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_is_in_the_place_of_the_metrics(name, run_dir, capfd):
  shutil.rmtree(run_dir / "checkpoints")
  (run_dir / "tensorboard").mkdir()
  replace(name, None if name == "metrics.jsonl" else b"mine")(run_dir)
  check_main(capfd, run_dir, name, *_SMALL)


def one_line(call, *arguments):
  """What it returns; None where it refuses, which it does in one line."""
  try:
    return call(*arguments)
  except UserError as error:
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 2500
    hypothesis.event("refused")
    return None


def few(examples):
  return hypothesis.settings(
    max_examples=examples,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
  lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=9), each, max_size=3),
  max_leaves=5,
)
_ADDRESSES = st.lists(
  st.sampled_from(["a:1", "b.c-d_e:65535", "[::1]:2222", "10.0.0.1:80"])
  | st.from_regex(r"[a-z.:\[\]\n\0 ü]{0,5}:[0-9]{0,6}", fullmatch=True)
  | _JSON,
  max_size=4,
)
_CONFIGS = st.fixed_dictionaries(
  {},
  optional={
    "cluster": st.dictionaries(
      st.sampled_from(["chief", "worker", "worker", "ps", "", "\n"]), _ADDRESSES | _JSON, max_size=3
    )
    | _JSON,
    "task": st.fixed_dictionaries(
      {},
      optional={
        "type": st.sampled_from(["chief", "worker"]) | _JSON,
        "index": st.integers(-1, 4) | _JSON,
      },
    )
    | _JSON,
    "environment": _JSON,
  },
)


@st.composite
def mutated(draw, content: bytes):
  """Some bytes of it are others, gone, or more than they were."""
  for _ in range(draw(st.integers(1, 3))):
    first = draw(st.integers(0, len(content)))
    last = min(len(content), first + draw(st.sampled_from([0, 1, 2, 8, 10**6])))
    content = content[:first] + draw(st.binary(max_size=4)) + content[last:]
  return content


def texts(config):
  """The configuration as JSON, or what a few other bytes make of it."""
  text = json.dumps(config)
  return st.just(text) | mutated(text.encode()).map(
    lambda content: content.decode(errors="replace")
  )


@few(400)
@hypothesis.given(_CONFIGS.flatmap(texts) | st.text())
def test_any_tf_config_is_a_cluster_or_refused(text):
  cluster = one_line(read_cluster, {"TF_CONFIG": text})
  if cluster is not None:
    assert isinstance(cluster, Cluster) and 0 <= cluster.task_index < cluster.num_tasks
    assert len(set(cluster.tasks)) == cluster.num_tasks
    assert all(task.isascii() and task.isprintable() for task in cluster.tasks)


_NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 2**31, 2**63, -(10**20), 1e308])
_VALUES = (
  _NUMBERS.map(str)
  | st.lists(_NUMBERS, max_size=4).map(lambda numbers: ",".join(map(str, numbers)))
  | st.sampled_from(["", " ", "true", "none", "0x10", "1_0", "1e5", "٣", "linear", "float64"])
  | st.text(max_size=20)
)


def recipe_and_what_follows(arguments):
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  command_line.parse_flags(["train", *arguments], values)
  recipe = command_line.recipe_from_flags(values)
  recipe = dataclasses.replace(recipe, workers=recipe.workers or 8)
  derived = resolution.derive(recipe, 1_281_167, 1)
  assert math.isfinite(derived["peak_learning_rate"]) and derived["total_steps"] > 0
  build_optimizer(recipe, 1_281_167).learning_rate  # noqa: B018 - Computes the rate.
  again = Recipe(**recipe.to_dict() | {"workers": values.workers})
  assert command_line.recipe_from_flags(values) == again
  return recipe


@few(250)
@hypothesis.given(
  st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(Recipe)]), _VALUES, max_size=3
  )
)
def test_any_flags_are_a_recipe_or_refused(given):
  one_line(recipe_and_what_follows, [f"--{name}={value}" for name, value in given.items()])


@few(60)
@hypothesis.given(data=st.data(), name=st.sampled_from(["recipe.json", "result.json"]))
def test_any_work_directory_is_a_run_or_refused(whole_run, data, name):
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    shutil.copytree(whole_run, directory, dirs_exist_ok=True)
    (directory / name).write_bytes(data.draw(mutated((whole_run / name).read_bytes())))
    before = contents(directory)
    recipe = resolution.resolve(recipe_of(*_SMALL), 1, "")
    for workers in (None, 2):
      given = dataclasses.replace(recipe, workers=workers)
      one_line(work_directory.with_stored_workers, given, str(directory))
    result = one_line(work_directory.find_run, str(directory), recipe, {"name": "synthetic"})
    assert result is None or result["status"] == "complete"
    assert contents(directory) == before


@few(60)
@hypothesis.given(data=st.data(), name=st.sampled_from(["metrics.jsonl", "bad_examples.jsonl"]))
def test_any_list_of_records_is_read_or_refused(whole_run, data, name):
  bad = b'{"split": "train", "example": 7, "fault": "example 7: no JPEG"}\n' * 2
  content = (whole_run / "metrics.jsonl").read_bytes() if name == "metrics.jsonl" else bad
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    (directory / name).write_bytes(data.draw(mutated(content)))
    before = contents(directory)
    for record in read_metrics(str(directory)):
      assert record["step"] + 1 and record["epoch"] + 1 and record["error"] + 1
    one_line(BadExamples, str(directory), 0, 3)
    assert contents(directory) == before


@few(60)
@hypothesis.given(data=st.data(), kind=st.sampled_from(["json", "json", "npz"]))
def test_any_checkpoint_is_whole_or_passed_over(whole_run, variables, data, kind):
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    shutil.copytree(whole_run / "checkpoints", directory, dirs_exist_ok=True)
    path = directory / f"step-0000000002.{kind}"
    content = data.draw(mutated(path.read_bytes()))
    same = content == path.read_bytes()
    path.write_bytes(content)
    before = contents(directory)
    manifest = Checkpoints(str(directory), *variables, saves=False).restore_newest()
    assert isinstance(manifest, Manifest) and (manifest.step == 1 or same or kind == "json")
    assert contents(directory) == before


@pytest.fixture(scope="module")
def variables():
  return tiny()
