"""The description of the processor and the software."""

import platform

import numpy as np

from tools import hardware


def test_cpu_name(tmp_path):
  cpuinfo = tmp_path / "cpuinfo"
  cpuinfo.write_text(
    "processor\t: 0\nmodel name\t: A CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: B\n"
  )
  assert hardware.cpu_name(str(cpuinfo)) == "A CPU: 3 GHz"
  cpuinfo.write_text("processor\t: 0\n")
  assert hardware.cpu_name(str(cpuinfo)) == platform.machine()
  assert hardware.cpu_name(str(tmp_path / "none")) == platform.machine()
  found = hardware.describe()
  assert found["cpu"] == hardware.cpu_name() and found["cores"] >= 1


def test_versions_of_installed_packages_only():
  found = hardware.versions("numpy", "no-such-package")
  assert found == {"python": platform.python_version(), "numpy": np.__version__}
