"""Three tasks, of which one starts long after the others."""

import json
import subprocess
import sys
import time

from tests.launching import ROOT, SMALL
from tools.launch_local import free_addresses, task_environment


def test_the_tasks_wait_for_one_that_starts_late(tmp_path):
  """The chief, without which the others cannot even begin to form a cluster."""
  addresses, tasks, logs = free_addresses(3), [], []
  command = [sys.executable, "-m", "tf_largebatch.train", *SMALL, "--workers=3", "--epochs=1"]
  command += ["--cluster_timeout_minutes=2", f"--work_dir={tmp_path / 'run'}"]
  try:
    for index in (2, 1, 0):
      if index == 0:
        time.sleep(12)  # The others have imported TensorFlow by then and wait.
        assert [task.poll() for task in tasks] == [None, None]
      logs.append((tmp_path / f"{index}.log").open("w+"))
      environment = task_environment(addresses, index)
      tasks.append(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=logs[-1], stderr=logs[-1])
      )
    for task, log in zip(tasks, logs, strict=True):
      status = task.wait(timeout=90)
      log.seek(0)
      assert status == 0, log.read()
  finally:
    for task, log in zip(tasks, logs, strict=False):
      task.kill()
      task.wait()
      log.close()
  assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "complete"
