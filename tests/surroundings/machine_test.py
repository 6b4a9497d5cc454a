"""Memory and cores that a process may use: machines, containers, `ulimit -v`, no /proc."""

import math
import subprocess
import sys
import types

import numpy as np
import psutil
import pytest

from tests.launching import ROOT
from tf_largebatch import machine
from tf_largebatch.data import memory_sources, sources
from tf_largebatch.errors import UserError

_MIB = 2**20


def _tree(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")
  return root


@pytest.fixture
def free(monkeypatch):
  """Makes 1000 MiB of the machine free."""
  memory = types.SimpleNamespace(available=1000 * _MIB)
  monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def _version_2(top, limit, used, cache=0):
  statistics = f"anon 5\ninactive_file {cache}\nactive_file 0"
  return {
    f"{top}/memory.max": limit,
    f"{top}/memory.current": used,
    f"{top}/memory.stat": statistics,
  }


def _version_1(top, limit, used, cache=0):
  # What the group itself holds does not count: its limit includes the groups below.
  statistics = f"inactive_file 7\ntotal_inactive_file 0\ntotal_active_file {cache}"
  return {
    f"{top}/memory.limit_in_bytes": limit,
    f"{top}/memory.usage_in_bytes": used,
    f"{top}/memory.stat": statistics,
  }


_TOP = "sys/fs/cgroup"
_OWN_2 = {"proc/self/cgroup": "0::/pod/run"}
_OWN_1 = {"proc/self/cgroup": "4:cpu,cpuacct:/docker/a\n3:memory:/docker/a\n0::/"}


@pytest.mark.parametrize(
  "files, mebibytes",
  [
    pytest.param({}, 1000, id="no control groups"),
    pytest.param(
      _OWN_2 | _version_2(f"{_TOP}/pod/run", 300 * _MIB, 250 * _MIB, 40 * _MIB), 90, id="version 2"
    ),
    pytest.param(_OWN_2 | _version_2(f"{_TOP}/pod/run", "max", 250 * _MIB), 1000, id="no limit"),
    pytest.param(
      _OWN_2
      | _version_2(f"{_TOP}/pod/run", "max", 100 * _MIB)
      | _version_2(f"{_TOP}/pod", 400 * _MIB, 150 * _MIB),
      250,
      id="limit of the group around",
    ),
    pytest.param(
      _OWN_2 | _version_2(f"{_TOP}/unified/pod/run", 300 * _MIB, 0), 300, id="both versions mounted"
    ),
    pytest.param(
      _OWN_1 | _version_1(f"{_TOP}/memory/docker/a", 300 * _MIB, 250 * _MIB, 40 * _MIB),
      90,
      id="version 1",
    ),
    pytest.param(
      _OWN_1 | _version_1(f"{_TOP}/memory", 300 * _MIB, 250 * _MIB), 50, id="seen from inside"
    ),
    pytest.param(
      _OWN_1 | _version_1(f"{_TOP}/memory", 2**63 - 4096, 250 * _MIB), 1000, id="largest number"
    ),
    pytest.param(_OWN_2 | _version_2(f"{_TOP}/pod/run", 90, 100), 0, id="limit exceeded"),
    pytest.param(_OWN_2 | _version_2(f"{_TOP}/pod/run", "?", 100), 1000, id="unknown format"),
  ],
)
def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path, free, files, mebibytes):
  assert machine.free_memory(_tree(tmp_path, files)) / _MIB == mebibytes


def test_without_proc_memory_is_not_checked(tmp_path, monkeypatch):
  def fail():
    raise FileNotFoundError("/proc/meminfo")

  monkeypatch.setattr(psutil, "virtual_memory", fail)
  assert machine.free_memory(tmp_path) == math.inf
  monkeypatch.setattr(memory_sources, "free_memory", lambda: math.inf)
  memory_sources.require_memory(2**60)


def test_ulimit_v_counts():
  """In a process of its own, because a limit cannot be raised again."""
  program = "from tf_largebatch.machine import free_memory; print(free_memory())"
  command = ["sh", "-c", 'ulimit -v 3000000; exec "$@"', "sh", sys.executable, "-c", program]
  output = subprocess.check_output(command, cwd=ROOT, text=True, timeout=60)
  assert 0 < float(output) < 3_000_000 * 1024


def test_data_that_do_not_fit_are_refused_or_stay_on_the_disk(monkeypatch, decoded_set):
  dataset, data_dir = decoded_set
  in_memory = sources.open_source(dataset, "train", data_dir)
  monkeypatch.setattr(memory_sources, "free_memory", lambda: 1000)
  on_disk = sources.open_source(dataset, "train", data_dir)
  assert isinstance(in_memory, sources.ArraySource)
  assert isinstance(on_disk, sources.TFRecordSource)
  images, labels = in_memory.read(np.arange(4))
  for record, image, label in zip(on_disk.read(np.arange(4)), images, labels, strict=True):
    encoded, own_label = on_disk.parse(record)
    np.testing.assert_array_equal(sources.tf.io.decode_image(encoded), image)
    assert own_label == label
  with pytest.raises(UserError, match=r"a container's limit.*--nocache"):
    sources.open_source(dataset, "train", data_dir, cache=True)


@pytest.mark.parametrize(
  "files, cores",
  [
    pytest.param({}, 8, id="no control groups"),
    pytest.param(_OWN_2 | {f"{_TOP}/pod/run/cpu.max": "150000 100000"}, 2, id="version 2"),
    pytest.param(_OWN_2 | {f"{_TOP}/pod/run/cpu.max": "max 100000"}, 8, id="no quota"),
    pytest.param(_OWN_2 | {f"{_TOP}/pod/cpu.max": "1000 100000"}, 1, id="a hundredth of a core"),
    pytest.param(
      _OWN_1 | {f"{_TOP}/cpu/cpu.cfs_quota_us": 300000, f"{_TOP}/cpu/cpu.cfs_period_us": 100000},
      3,
      id="version 1",
    ),
    pytest.param(
      _OWN_1 | {f"{_TOP}/cpu/cpu.cfs_quota_us": -1, f"{_TOP}/cpu/cpu.cfs_period_us": 100000},
      8,
      id="version 1 without quota",
    ),
    pytest.param(_OWN_2 | {f"{_TOP}/pod/run/cpu.max": "junk"}, 8, id="unknown format"),
  ],
)
def test_usable_cores_are_those_of_the_tightest_quota(tmp_path, monkeypatch, files, cores):
  monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
  assert machine.usable_cores(_tree(tmp_path, files)) == cores
