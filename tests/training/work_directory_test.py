"""The work directory: its lock, and the workers of the run that it holds."""

import dataclasses
import os

import pytest

from tests import locks_test
from tests.training.small_runs import RECIPE, interrupting, train
from tf_largebatch.errors import UserError
from tf_largebatch.training import work_directory
from tf_largebatch.training.metrics import MetricsWriter


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
  with work_directory.locked(str(tmp_path)):
    with pytest.raises(UserError, match=rf"in use by a run \(process {os.getpid()} on "):
      train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
  with work_directory.locked(str(tmp_path)):
    pass


@pytest.mark.parametrize("kind", ["record", "lease"])
def test_a_second_run_is_refused_on_file_systems_without_flock(kind, tmp_path, monkeypatch):
  locks_test.leave(kind, monkeypatch.setattr)
  refused = pytest.raises(UserError, match=r"in use by a run \(process \d+ on ")
  with locks_test.holder(tmp_path / ".lock", kind), refused:
    train(tmp_path)
  with work_directory.locked(str(tmp_path)):
    pass


def test_workers_default_to_those_of_the_stored_run(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "train", interrupting("train", 2))
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path)
  without_workers = dataclasses.replace(RECIPE, workers=None)
  assert work_directory.with_stored_workers(without_workers, str(tmp_path)) == RECIPE
  assert (
    work_directory.with_stored_workers(without_workers, str(tmp_path / "new")) == without_workers
  )
