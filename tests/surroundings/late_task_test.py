"""Two tasks, of which the chief starts long after the other."""

import json
import subprocess
import sys
import time

from tests.launching import ROOT, SMALL
from tools.launch_local import free_addresses, task_environment


def test_a_task_waits_for_the_chief(tmp_path):
  """Without the chief, the others cannot even begin to form a cluster."""
  addresses, tasks, logs = free_addresses(2), [], []
  command = [sys.executable, "-m", "tf_largebatch.train", *SMALL, "--workers=2", "--epochs=1"]
  command += ["--cluster_timeout_minutes=2", "--verbosity=0", f"--work_dir={tmp_path / 'run'}"]
  try:
    for index in (1, 0):
      if index == 0:
        deadline = time.monotonic() + 90
        while "Task 1 of 2" not in (tmp_path / "1.log").read_text():
          assert tasks[0].poll() is None and time.monotonic() < deadline
          time.sleep(0.1)
        time.sleep(3)
        assert tasks[0].poll() is None
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
