"""What tasks resume from that see different files, simulated by threads with a directory each."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time

import numpy as np
import pytest

from tf_largebatch.distributed.collectives import DifferentViewsError
from tf_largebatch.training.agreement import require_same_files, restore_newest_of_all
from tf_largebatch.training.checkpoint import Checkpoints, Manifest


class Variable:
  """What checkpoints need of a variable."""

  def __init__(self, value=0):
    self.value = np.full(3, value)
    self.shape, self.dtype = self.value.shape, self.value.dtype.name

  def numpy(self):
    return self.value

  def assign(self, value):
    self.value = value


@dataclasses.dataclass
class Owner:
  """Stands for a model or an optimizer."""

  variables: list


def checkpoints_of(directory, variable, saves=False):
  return Checkpoints(str(directory), Owner([variable]), Owner([]), saves=saves)


def save(directory, step, value=None, error=None):
  checkpoints = checkpoints_of(directory, Variable(step if value is None else value), saves=True)
  checkpoints.save(step, 1.0)
  if error is not None:
    checkpoints.evaluated(step, error)
  checkpoints.wait()


def run_tasks(tasks, function):
  """Calls `function(task, gather)` in a thread for each task; returns results and exceptions."""
  barrier = threading.Barrier(tasks, timeout=30)
  values = [None] * tasks

  def call(task):
    def gather(value):
      values[task] = np.asarray(value, np.float64)
      barrier.wait()
      gathered = np.stack(values)
      barrier.wait()
      return gathered

    try:
      return function(task, gather)
    except DifferentViewsError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(tasks) as pool:
    return list(pool.map(call, range(tasks)))


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
  """Records the pauses of all tasks instead of sleeping."""
  recorded = []
  monkeypatch.setattr(time, "sleep", recorded.append)
  return recorded


@pytest.fixture
def reads(monkeypatch):
  """Counts how often the contents of a checkpoint are read."""
  steps, read = [], Checkpoints.read

  def counted(self, manifest):
    steps.append(manifest.step)
    return read(self, manifest)

  monkeypatch.setattr(Checkpoints, "read", counted)
  return steps


def restore(directories):
  """Restores on each task; returns (manifest, state), None or an error for each."""

  def restore_one(task, gather):
    variable = Variable()
    # The chief is task 0.
    checkpoints = checkpoints_of(directories[task], variable, saves=task == 0)
    manifest = restore_newest_of_all(checkpoints, gather)
    return manifest and (manifest, variable.value.tolist())

  return run_tasks(len(directories), restore_one)


def views(tmp_path, *steps, tasks=2):
  """Directories with the same checkpoints, one per task."""
  directories = [tmp_path / f"task{task}" for task in range(tasks)]
  for directory in directories:
    for step in steps:
      save(directory, step)
  return directories


def tear(directory, step):
  (directory / f"step-{step:010d}.npz").write_bytes(b"torn")


def hide(directory, step):
  (directory / f"step-{step:010d}.json").unlink()


def change(directory, step):
  save(directory, step, value=7)


def test_tasks_that_see_the_same_read_one_checkpoint_once(tmp_path, reads, pauses, caplog):
  with caplog.at_level(logging.INFO, logger="absl"):
    first, second = restore(views(tmp_path, 10, 20))
  assert first == second and first[0].step == 20 and first[1] == [20, 20, 20]
  assert reads == [20, 20] and not pauses and not caplog.records


@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize("damage", [tear, hide, change])
def test_the_newest_that_all_see_whole_is_restored(tmp_path, damage, task, pauses, caplog):
  directories = views(tmp_path, 10, 20, tasks=3)
  damage(directories[task], 20)
  with caplog.at_level(logging.INFO, logger="absl"):
    restored = restore(directories)
  assert restored[0] == restored[1] == restored[2]
  assert restored[0][0].step == 10 and restored[0][1] == [10, 10, 10] and not pauses
  said = {record.getMessage() for record in caplog.records if record.levelname == "INFO"}
  (line,) = said
  assert "Step 10 is the newest checkpoint that all tasks see whole" in line
  assert damage is change or f"task {task} does not see that of step 20" in line
  # The metrics past step 10 are dropped, so nothing may restore step 20 later.
  assert not (directories[0] / "step-0000000020.json").exists()


def test_the_newest_is_torn_for_one_and_the_next_is_missing_for_another(tmp_path, reads):
  directories = views(tmp_path, 10, 20, 30)
  tear(directories[0], 30)
  hide(directories[1], 20)
  first, second = restore(directories)
  assert first == second and first[0].step == 10
  assert sorted(reads) == [10, 10, 30, 30]


def test_a_validation_error_that_one_does_not_see_is_computed_again(tmp_path):
  """Otherwise one task would evaluate the epoch while the other trains."""
  directories = views(tmp_path, 10)
  save(directories[0], 20, error=0.25)
  save(directories[1], 20)
  assert [result[0].validation_error for result in restore(directories)] == [None, None]
  save(directories[1], 20, error=0.25)
  assert [result[0].validation_error for result in restore(directories)] == [0.25, 0.25]


@pytest.mark.parametrize("torn", [False, True])
def test_without_a_checkpoint_all_begin_at_0(tmp_path, torn, pauses):
  directories = views(tmp_path, *([10] if torn else []))
  for directory in directories if torn else ():
    tear(directory, 10)
  assert restore(directories) == [None, None] and not pauses


@pytest.mark.parametrize(
  "damage, says", [(tear, "task 1 sees none"), (hide, "task 1 sees none"), (change, "sees step 10")]
)
def test_nothing_in_common_ends_after_a_minute(tmp_path, damage, says, pauses, caplog, reads):
  """It must not begin at 0: the directory of one task may not be the shared one."""
  directories = views(tmp_path, 10)
  damage(directories[1], 10)
  with caplog.at_level(logging.INFO, logger="absl"):
    results = restore(directories)
  for error in results:
    assert isinstance(error, DifferentViewsError)
    assert "task 0 sees step 10, but" in str(error) and says in str(error)
    assert "shared work_dir" in str(error)
  assert sum(pauses) == 2 * 60
  assert sum("Trying again for 60 s" in r.getMessage() for r in caplog.records) == 2
  assert len(reads) <= 2 * 4
  assert (directories[0] / "step-0000000010.json").exists()


def test_a_checkpoint_that_appears_late_is_restored(tmp_path, monkeypatch):
  directories = views(tmp_path, 10)
  hidden = directories[1] / "step-0000000010.json"
  hidden = hidden.rename(hidden.with_suffix(".hidden"))

  def appear(_):
    with contextlib.suppress(FileNotFoundError):  # The other task's thread may be first.
      hidden.rename(hidden.with_suffix(".json"))

  monkeypatch.setattr(time, "sleep", appear)
  first, second = restore([directories[0], directories[1]])
  assert first == second and first[0].step == 10


def test_many_torn_checkpoints_do_not_hide_an_old_one(tmp_path):
  directories = views(tmp_path, 10)
  for step in range(100, 140):
    text = Manifest(step, 1.0, 1, "").to_json()
    (directories[step % 2] / f"step-{step:010d}.json").write_text(text)
  assert [result[0].step for result in restore(directories)] == [10, 10]


@pytest.mark.parametrize("late", [False, True])
def test_a_result_that_only_one_task_sees(tmp_path, monkeypatch, late, pauses):
  directories = [tmp_path / "a", tmp_path / "b"]
  for directory in directories:
    directory.mkdir()
    (directory / "recipe.json").write_text("{}")
  (directories[0] / "result.json").write_text("{}")
  if late:
    monkeypatch.setattr(time, "sleep", lambda _: (directories[1] / "result.json").write_text("{}"))
  results = run_tasks(
    2,
    lambda task, gather: require_same_files(
      gather, str(directories[task]), ("recipe.json", "result.json")
    ),
  )
  if late:
    assert results == [None, None]
    return
  assert sum(pauses) == 2 * 60
  for error in results:
    assert "Task 1 does not see the result.json in work_dir=" in str(error)
    assert "that task 0 sees" in str(error)
