"""Jobs in processes of their own."""

import psutil
import pytest

from tests.tools.benchmark import photographs
from tf_largebatch.errors import UserError
from tools.benchmark.readers import jobs

pytestmark = pytest.mark.xdist_group("benchmark_input")  # One process prepares the data for all.


def test_a_reader_that_fails_shows_why(tmp_path, monkeypatch, capfd):
  (tmp_path / "PIL").mkdir()
  (tmp_path / "PIL" / "__init__.py").write_text("raise RuntimeError('broken Pillow')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  arguments = {"reader": "pillow", "warm_up": 0.0, "seconds": 0.1}
  with pytest.raises(UserError, match="pillow failed with status 1"):
    jobs.run_alone("time_reader", photographs.task(), arguments)
  assert "RuntimeError: broken Pillow" in capfd.readouterr().err


def test_a_reader_that_takes_too_long_is_ended(monkeypatch):
  monkeypatch.setattr(jobs, "_START_SECONDS", -99)
  arguments = {"reader": "pillow", "warm_up": 0.0, "seconds": 100.0}
  with pytest.raises(UserError, match="pillow did not report within 1 s"):
    jobs.run_alone("time_reader", photographs.task(), arguments)
  assert psutil.Process().children() == []


def test_a_users_mistake_comes_back_as_it_is(tmp_path):
  task = jobs.Task("tiny_photographs", "few", photographs.data_dir(), str(tmp_path), cores=1)
  with pytest.raises(UserError, match=r"^few has 31 examples"):
    jobs.run_alone("write_files", task, {"examples": 100})
