"""Bad TF_CONFIGs, flags and flagfiles: one clear line each before TensorFlow is imported.

The tests of the modules check the details of each message.
"""

import json
import os
import random

import pytest

from tests.bad_input.checks import (
  LONG,
  check_program,
)


def config(cluster, index=0):
  return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


TF_CONFIGS = {
  "empty": ("", "not JSON"),
  "truncated": (config({"worker": ["a:1"]})[:-9], "not JSON"),
  "10 kB that are not JSON": (LONG, "xxxx"),
  "not UTF-8": (b"\xff{}", "not JSON"),
  "a list": ("[1, 2]", "[1, 2]"),
  "nested too deep": ("[" * 100_000, "[[[["),
  "a deeply nested address": (
    '{"cluster": {"worker": [%s]}, "task": {}}' % ("[" * 900 + "]" * 900),
    "[[[[",
  ),
  "no task": ('{"cluster": {"worker": ["a:1"]}}', '"task" is missing'),
  "parameter servers": (config({"ps": ["a:1"], "worker": ["b:1"]}), '"ps"'),
  "a port too high": (config({"worker": ["a:65536"]}), "a:65536"),
  "a missing port": (
    config({"worker": [f"a{i}:1" for i in range(999)] + ["b"]}),
    '"b"',
  ),
  "a host with a newline": (config({"worker": ["a\nb:1"]}), r"a\nb:1"),
  "a host that is not ASCII": (config({"worker": ["\ud800:1", "ü:1"]}), r"\ud800:1"),
  "a duplicate address": (config({"worker": ["a:1", "a:1"]}), '["a:1"]'),
  "an index too high": (config({"worker": ["a:1", "b:1"]}, 2), "given 2"),
  "an index that is text": (config({"worker": ["a:1", "b:1"]}, "1"), 'given "1"'),
}


@pytest.mark.parametrize("case", TF_CONFIGS)
def test_tf_config(case, tmp_path):
  text, names = TF_CONFIGS[case]
  check_program(tmp_path, names, TF_CONFIG=text)


FLAGS = {
  "unknown": (["--wokers=8"], "wokers"),
  "no value": (["--workers"], "workers"),
  "no dashes": (["workers=8"], "workers=8"),
  "a newline and a page of text": ([f"--dtype=float\n{LONG}"], r"float\nxxx"),
  "a newline in a number": (["--workers=8\n9"], r"8\n9"),
  "text for a number": (["--workers=many"], "many"),
  "a number of 5000 digits": (["--workers=" + "9" * 5000], "--workers=999"),
  "a fraction of a worker": (["--workers=1.5"], "1.5"),
  "text for a boolean": (["--nesterov=perhaps"], "perhaps"),
  "a quoted list": (['--decay_epochs="1'], '"1'),
  "a list of text": (["--decay_epochs=1,x"], "decay_epochs=1,x"),
  "n = 0": (["--per_worker_batch_size=0"], "per_worker_batch_size=0"),
  "negative k": (["--workers=-8"], "workers=-8"),
  "too many epochs": (["--epochs=1" + "0" * 400], "epochs=100"),
  "k too large": (["--workers=1" + "0" * 400], "workers=100"),
  "n too large": (["--per_worker_batch_size=4294967296"], "per_worker_batch_size=4294967296"),
  "decays out of order": (["--epochs=9", "--decay_epochs=5,3"], "decay_epochs=(5.0, 3.0)"),
  "a warmup longer than the run": (["--workers=64", "--warmup_epochs=4"], "warmup_epochs=4.0"),
  "an infinite warmup": (["--warmup_epochs=inf"], "warmup_epochs=inf"),
  "a huge reference": (
    ["--reference_batch_size=1" + "0" * 400],
    "reference_batch_size=100",
  ),
  "images too large": (["--image_size=1000000000"], "image_size=1000000000"),
  "a decay too late": (["--epochs=9", "--decay_epochs=1,1e308"], "1e+308"),
  "a rate that is not a number": (["--reference_learning_rate=nan"], "reference_learning_rate=nan"),
  "an infinite rate": (["--reference_learning_rate=1e999"], "reference_learning_rate=inf"),
  "a negative rate": (["--reference_learning_rate=-0.1"], "reference_learning_rate=-0.1"),
  "an infinite peak rate": (
    ["--reference_learning_rate=1e308", "--reference_batch_size=1"],
    "reference_learning_rate=1e+308",
  ),
  "momentum 1": (["--momentum=1"], "momentum=1.0"),
  "infinite weight decay": (["--weight_decay=inf"], "weight_decay=inf"),
  "a decay factor of 0": (["--decay_factor=0"], "decay_factor=0.0"),
  "an epsilon of 0": (["--batch_norm_epsilon=0"], "batch_norm_epsilon=0.0"),
  "a deviation of 0": (["--channel_std=1,0,1"], "channel_std=(1.0, 0.0, 1.0)"),
  "a negative seed": (["--seed=-1"], "seed=-1"),
  "an unknown dtype": (["--dtype=float8"], "float8"),
  "an empty network": (["--network="], "network=''"),
  "an evaluation batch of 0": (
    ["--evaluation_batch_size=0"],
    "evaluation_batch_size=0 is out of range",
  ),
  "a negative logging interval": (["--log_every_steps=-1"], "log_every_steps=-1 is out of range"),
  "minutes of nan": (
    ["--checkpoint_every_minutes=nan"],
    "checkpoint_every_minutes=nan",
  ),
  "unknown collectives": (["--communication=mpi"], "mpi"),
  "workers_per_pass of text": (["--workers_per_pass=all"], "workers_per_pass=all"),
  "workers_per_pass of zero": (["--workers_per_pass=0"], "workers_per_pass=0"),
  "an unknown jit_compile": (["--jit_compile=maybe"], "maybe"),
  "an unknown bad_examples": (["--bad_examples=mend"], "mend"),
  "an empty work_dir": (["--work_dir="], "--work_dir"),
  "a work_dir of 10 kB": ([f"--work_dir={LONG}"], "--work_dir='xxx"),
  "an index_dir of 10 kB": ([f"--index_dir={LONG}"], "--index_dir='xxx"),
  "a work_dir that is not UTF-8": ([b"--work_dir=a\xff"], r"--work_dir='a\udcff'"),
  "an empty data_dir": (["--dataset=cifar10", "--data_dir="], "--data_dir"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, tmp_path):
  arguments, names = FLAGS[case]
  check_program(tmp_path, names, *arguments)


# Files by name; the program is given bad.flags.
FLAGFILES = {
  "missing": ({}, "bad.flags"),
  "a directory": ({"bad.flags/notes": b""}, "bad.flags"),
  "including itself": ({"bad.flags": b"--flagfile={}/bad.flags\n"}, "bad.flags"),
  "including one that includes it": (
    {"bad.flags": b"--flagfile={}/b.flags\n", "b.flags": b"--flagfile={}/bad.flags\n"},
    "bad.flags",
  ),
  "including a missing one": ({"bad.flags": b"--flagfile={}/gone.flags\n"}, "gone.flags"),
  "not UTF-8": ({"bad.flags": b"--workers=8\n\xff\xfe\n"}, "bad.flags"),
  "binary": ({"bad.flags": random.Random(0).randbytes(100_000)}, "bad.flags"),
  "control characters": ({"bad.flags": bytes(range(128)) * 100}, r"'\x00\x01"),
  "an unknown flag": ({"bad.flags": b"--workers=8\n--no_such_flag=1\n"}, "no_such_flag"),
  "a bad value": ({"bad.flags": b"--workers=8\n--epochs=x\n"}, "--epochs=x"),
  "a bad recipe": ({"bad.flags": b"--epochs=0\n"}, "epochs=0"),
  "no dashes": ({"bad.flags": b"workers=8\n"}, "workers=8"),
  "JSON": ({"bad.flags": b'{"workers": 8}\n'}, '{"workers": 8}'),
  "including a name with a NUL": ({"bad.flags": b"--flagfile=a\0b\n"}, "bad.flags"),
  "a work_dir with a NUL": ({"bad.flags": b"--work_dir=a\0b\n"}, r"'a\x00b'"),
  "a data_dir with a NUL": ({"bad.flags": b"--data_dir=a\0b\n"}, r"'a\x00b'"),
}


@pytest.mark.parametrize("case", FLAGFILES)
def test_flagfiles(case, tmp_path):
  files, names = FLAGFILES[case]
  for name, content in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.replace(b"{}", os.fsencode(tmp_path)))
  check_program(tmp_path, names, f"--flagfile={tmp_path / 'bad.flags'}")
