"""The documents: every command is run by a test or listed as not runnable here, tables are current.

`python -m tests.docs_test > docs/options.md` writes the table of the flags.
"""

import ast
import contextlib
import dataclasses
import functools
import json
import re
import shlex
import sys
import types

import pytest

from tests.launching import ROOT, SMALL, run_module
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Programs of the documents' commands → the test that runs each.
RUN = {
  "docs.examples.cnn": "tests/examples_test.py::test_cnn",
  "docs.examples.text": "tests/examples_test.py::test_text",
  "docs.examples.transfer": "tests/examples_test.py::test_transfer",
  "docs.examples.vision_transformer": "tests/examples_test.py::test_vision_transformer",
  "make test": ".ci/run",
  "tf_largebatch.train": "tests/train_test.py::test_a_run_and_its_repetition_from_flags_txt",
  "tools.answers": "tests/tools/answers_test.py",
  "tools.benchmark.allreduce": "tests/tools/benchmark/allreduce_test.py",
  "tools.benchmark.checkpoint": "tests/tools/benchmark/checkpoint_test.py::test_figures",
  "tools.benchmark.input_pipeline": "tests/tools/benchmark/input_pipeline_test.py",
  "tools.benchmark.noise_scale": "tests/tools/benchmark/noise_scale_test.py",
  "tools.benchmark.resized_pixels": "tests/tools/benchmark/resized_pixels_test.py",
  "tools.benchmark.slow_links": "tests/tools/benchmark/slow_links_test.py::test_a_real_run",
  "tools.benchmark.start_up": "tests/tools/benchmark/start_up_test.py",
  "tools.benchmark.step": "tests/tools/benchmark/step_test.py",
  "tools.bn_statistics": "tests/tools/bn_statistics_test.py",
  "tools.compare_runs": "tests/tools/compare_runs_test.py",
  "tools.conformance.negative_controls": "tests/tools/verify_test.py",
  "tools.critical_batch": "tests/tools/critical_batch_test.py",
  "tools.datasets.make_photographs": "tests/tools/datasets/make_photographs_test.py",
  "tools.forecast": "tests/tools/forecast_test.py",
  "tools.launch_local": "tests/training/multi_task_test.py::test_the_binary_on_two_tasks",
  "tools.prepare_data": "tests/tools/prepare_data_test.py",
  "tools.ray_train": "tests/tools/ray_train_test.py",
  "tools.replication": "tests/tools/replication_test.py",
  "tools.resilience.chaos": "tests/tools/resilience/chaos_test.py",
  "tools.resilience.time_lost_task": "tests/tools/resilience/time_lost_task_test.py",
  "tools.stock_keras": "tests/tools/stock_keras_test.py",
  "tools.study": "tests/tools/study_test.py",
  "tools.verify": "tests/tools/verify_test.py",
  "tests.keras_own.report": "tests/keras_own/keras_own_test.py",
  "tests.docs_test": "tests/docs_test.py::test_the_options_document_is_current",
}
# Commands that no test runs, and why.
NOT_RUN = {
  "make train": "fetches 140 MB and trains for minutes",
  "kubectl": "needs a Kubernetes cluster; tests/tools/manifests_test.py checks the manifest",
  "pip": "tests/wheel_test.py installs the wheel instead",
  "pytest": "is what runs this test; tests/tools/slurm_test.py needs a Slurm",
  "sbatch": "needs a Slurm; tests/tools/slurm_test.py runs it with SLURM_TESTS=1",
  "sky": "needs a cloud or a cluster; tests/tools/manifests_test.py checks the manifest",
  "tensorboard": "serves pages until it is stopped",
  "tools/benchmark/measure_on_gpu.sh": "needs a GPU",
  "tools.side_by_side.keras_issue_20585": "shows an error of Keras, not of ours",
}


_COMMAND = (
  r"([A-Z_]+=\S+ |TF_CONFIG='.*?' +)*(python -m|make|tools/|sbatch|kubectl|sky|tensorboard)\b"
)


def code_lines(text):
  """The lines of the fenced and of the indented blocks, continued lines joined."""
  fenced = False
  for line in text.replace("\\\n", " ").splitlines():
    if line.startswith("```"):
      fenced = not fenced
    elif fenced or line.startswith("    "):
      yield re.sub(r"\s+#.*$", "", line.strip())


def commands():
  """(document, words) of each command."""
  for path in DOCUMENTS:
    for line in code_lines(path.read_text()):
      if re.match(_COMMAND, line):
        words = shlex.split(line)
        yield path.name, [word for word in words if not re.match(r"[A-Z_]+=", word)]


def program_of(words):
  if words[:2] == ["python", "-m"]:
    return words[2]
  return " ".join(words[:2]) if words[0] == "make" else words[0]


def test_every_command_is_run_by_a_test_or_listed():
  found = {program_of(words) for _, words in commands()}
  assert len(found) > 15
  unknown = found - set(RUN) - set(NOT_RUN)
  assert not unknown, f"Add {unknown} to RUN or to NOT_RUN."
  for test in RUN.values():
    path, _, name = test.partition("::")
    assert (ROOT / path).exists(), test
    functions = {
      node.name
      for node in ast.walk(ast.parse((ROOT / path).read_text() if path.endswith(".py") else ""))
      if isinstance(node, ast.FunctionDef)
    }
    assert not name or name in functions, test


@functools.cache
def flags_of(module):
  """Names of the flags of a program, and of those that turn one off."""
  if module.startswith("docs."):
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    return set(re.findall(r'add_argument\("--(\w+)"', source))
  text = run_module(module, "--helpfull").stdout
  return set(re.findall(r"^\s+(?:-\w,)?--(?:\[no\])?(\w+):", text, re.MULTILINE))


MODULES = sorted(
  module for module in RUN if module.startswith(("docs.", "tools.", "tf_largebatch."))
)


@pytest.mark.parametrize("module", MODULES)
def test_the_flags_of_the_commands_exist(module):
  for document, words in commands():
    if words[:3] != ["python", "-m", module]:
      continue
    behind = words.index("--") if "--" in words else len(words)
    started = [word.partition("=")[2] for word in words[3:behind] if word.startswith("--module=")]
    inner = (started or ["tf_largebatch.train"])[0]
    for owner, part in ((module, words[3:behind]), (inner, words[behind + 1 :])):
      for word in part:
        if match := re.match(r"--(?:no(?=deterministic|cache))?(\w+)", word):
          assert match[1] in flags_of(owner) | {"flagfile"}, (document, word, owner)
        if match := re.match(r"--flagfile=(flags/.*)", word):
          assert (ROOT / match[1]).exists(), (document, word)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
    assert (path.parent / target).exists(), target


def test_the_tests_that_documents_name_exist():
  named = [
    match
    for path in DOCUMENTS
    for match in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text())
  ]
  assert len(named) > 50
  sources = {path: (ROOT / path).read_text() for path, _ in named}
  assert [
    (path, name) for path, name in named if f"def {name}(" not in sources[path] and name
  ] == []


def test_readme_is_short_and_finished():
  text = (ROOT / "README.md").read_text()
  assert len(text.split()) <= 1000 and "_FIGURES" not in text


def test_the_run_that_metrics_describes(tmp_path, monkeypatch):
  """Its fields, its files and the example for trackers."""
  flags = (*SMALL, "--dtype=float16", "--bad_examples=skip", "--workers=2", "--epochs=1")
  flags += ("--curvature_every_steps=4",)
  finished = run_module("tf_largebatch.train", *flags, f"--work_dir={tmp_path}")
  assert finished.returncode == 0, finished.stderr
  written = {
    name
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    for name in json.loads(line)
  }
  text = (ROOT / "docs" / "metrics.md").read_text()
  fields = text[text.index("## The fields") :]
  assert written == set(re.findall(r"^\| `(\w+)` \|", fields, re.MULTILINE))
  left = {path.name for path in tmp_path.iterdir()} - {".lock"}
  assert all(f"| `{name}" in text for name in left), left
  check_the_tracker_example(text, tmp_path, monkeypatch)


def check_the_tracker_example(text, work_dir, monkeypatch):
  """It logs the recipe, and every record under its kind."""
  logged, settings = [], {}

  @contextlib.contextmanager
  def init(**given):
    settings.update(given)
    yield types.SimpleNamespace(log=lambda scalars, step: logged.append((step, scalars)))

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  (source,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
  exec(source, {"work_dir": str(work_dir)})
  records = map(json.loads, (work_dir / "metrics.jsonl").read_text().splitlines())
  assert logged == [
    (
      record["step"],
      {f"{record['kind']}/{name}": x for name, x in record.items() if name != "kind"},
    )
    for record in records
  ]
  assert settings["config"]["dtype"] == "float16"


def options_document():
  lines = [
    "# Flags",
    "",
    "Every field of `Recipe` and of `RunOptions` is a flag of `tf_largebatch.train`. `auto` means",
    "that the data set, the cluster or the device chooses the value. A later flag, on the command",
    "line or in a flagfile, overrides an earlier one.",
  ]
  for settings, title in (
    (Recipe, "The recipe: what is computed"),
    (RunOptions, "Run options: where and how the run goes"),
  ):
    lines += ["", f"## {title}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(settings):
      default = field.default
      if isinstance(default, tuple):
        default = ",".join(f"{item:g}" for item in default)
      text = field.metadata["help"].replace("|", "\\|")
      lines.append(f"| `--{field.name}` | {'auto' if default is None else default} | {text} |")
  return "\n".join(lines) + "\n"


def test_the_options_document_is_current():
  assert (ROOT / "docs" / "options.md").read_text() == options_document()


if __name__ == "__main__":
  print(options_document(), end="")
