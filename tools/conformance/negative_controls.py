r"""Shows that `tools.verify` can fail: makes subtle mistakes that the paper warns of, one by one.

  python -m tools.conformance.negative_controls
  python -m tools.conformance.negative_controls --quick --only="warmup from 0,decoupled decay"

For each mistake the program changes a scratch copy of the package and runs `tools.verify` there on
two replicas (logical CPUs). A table shows the property that should fail, by how much it did, and
which others failed too. The exit status is 1 if that property did not fail, or if the unchanged
package does not pass.
"""

import concurrent.futures
import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl import flags

from tf_largebatch.errors import UserError
from tools import output, program
from tools.conformance.mutations import MUTATIONS, Mutation

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_TIMEOUT = 300  # Seconds for a run.


def define_flags():
  flags.DEFINE_boolean(
    "quick", False, "Check only the property that should fail, and skip the unchanged package."
  )
  flags.DEFINE_list("only", [], "Names of the mistakes to make; empty: all.")
  flags.DEFINE_string("output", None, "File for the table, as JSON.")
  flags.DEFINE_integer("at_once", 2, "Number of copies that run at a time.", lower_bound=1)


def make_copy(directory: pathlib.Path, mutation: Mutation | None) -> pathlib.Path:
  """Copies the package and the tools, makes the mistake in the copy, and returns its root.

  Raises:
    AssertionError: a text to replace does not occur exactly once, so the mutation is out of date.
  """
  for folder in ("tf_largebatch", "tools"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / folder, directory / folder, ignore=ignored)
  for module, old, new in mutation.edits if mutation else ():
    path = directory / "tf_largebatch" / f"{module}.py"
    source = path.read_text()
    if source.count(old) != 1:
      raise AssertionError(f"{mutation.name}: {path.name} has {old!r} {source.count(old)} times.")
    path.write_text(source.replace(old, new))
  return directory


def run_verify(mutation: Mutation | None, only: str | None, at_once: int) -> dict[str, dict]:
  """Runs `tools.verify` on a scratch copy and returns the properties of its report by name.

  Args:
    mutation: None for the unchanged package.
    only: one property, or None for all.
    at_once: number of copies that share the machine's cores.

  Raises:
    RuntimeError: the run left no report; the message ends with its last output.
  """
  with tempfile.TemporaryDirectory() as directory:
    scratch = make_copy(pathlib.Path(directory), mutation)
    command = [sys.executable, "-m", "tools.verify", "--logical_cpus=2"]
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    finished = subprocess.run(
      [*command, *([f"--only={only}"] if only else [])],
      cwd=scratch,
      env={name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
      | {"CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": threads, "PYTHONPATH": ""}
      | {f"TF_NUM_{kind}OP_THREADS": threads for kind in ("INTRA", "INTER")},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=_TIMEOUT,
      check=False,
    )
    report = scratch / "verify.json"
    if not report.exists():
      raise RuntimeError(f"verify left no report: {finished.stdout[-2000:]}")
    properties = json.loads(report.read_text())["properties"]
  failed = any(not result["holds"] for result in properties)
  assert finished.returncode == failed, (finished.returncode, properties)
  return {result["name"]: result for result in properties}


def _row(mutation: Mutation | None, quick: bool, at_once: int) -> dict:
  """Returns a row of the table: for a mistake, or for the unchanged package."""
  name = mutation.name if mutation else "none"
  try:
    results = run_verify(mutation, mutation.caught_by if mutation and quick else None, at_once)
  except (RuntimeError, subprocess.TimeoutExpired) as error:
    return {"mistake": name, "caught": False, "no_result": str(error)}
  failed = [property_ for property_, result in results.items() if not result["holds"]]
  if mutation is None:
    return {"mistake": name, "caught": not failed, "failed": failed}
  result = results[mutation.caught_by]
  return {
    "mistake": name,
    "caught": mutation.caught_by in failed,
    "caught_by": mutation.caught_by,
    "deviation": result["deviation"],
    "limit": result["limit"],
    "failed": failed,
  }


def _format(row: dict) -> str:
  if "no_result" in row:
    return f"{row['mistake']:<44}NO RESULT: {row['no_result']}"
  if row["mistake"] == "none":
    return "none: " + ("all properties hold" if row["caught"] else f"FAILS {row['failed']}")
  deviation, limit = row["deviation"], row["limit"]
  deviation = math.nan if deviation is None else deviation
  excess = f"{deviation / limit:.3g} times" if limit else "limit 0"
  others = [name for name in row["failed"] if name != row["caught_by"]]
  verdict = row["caught_by"] if row["caught"] else f"NOT CAUGHT by {row['caught_by']}"
  return (
    f"{row['mistake']:<44}{verdict:<22}{deviation:>10.1e}{limit:>10.1e}{excess:>16}  "
    + ", ".join(others)
  )


def main() -> bool:
  """Makes the mistakes and prints the table; returns whether one was not caught."""
  only, quick, at_once = flags.FLAGS.only, flags.FLAGS.quick, flags.FLAGS.at_once
  names = [mutation.name for mutation in MUTATIONS]
  unknown = [name for name in only if name not in names]
  if unknown:
    raise UserError(
      f"--only={','.join(unknown)}: there is no such mistake; use any of {', '.join(names)}."
    )
  path = output.output_path("--output", flags.FLAGS.output)
  chosen = [mutation for mutation in MUTATIONS if not only or mutation.name in only]
  print(f"{'mistake':<44}{'caught by':<22}{'deviation':>10}{'limit':>10}{'over limit':>16}  also")
  rows = []
  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    measure = functools.partial(_row, quick=quick, at_once=at_once)
    for row in pool.map(measure, chosen if quick else [None, *chosen]):
      rows.append(row)
      print(_format(row), flush=True)
  if path:
    output.write_json("--output", path, rows)
  missed = [row["mistake"] for row in rows if not row["caught"]]
  print(f"Unexpected: {', '.join(missed)}." if missed else "Every mistake was caught.")
  return bool(missed)


if __name__ == "__main__":
  program.run(main, define_flags)
