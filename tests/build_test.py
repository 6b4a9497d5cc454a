"""`BUILD` matches the sources, and imports between folders go down only."""

import ast
import collections
import functools
import itertools
import sys

import pytest

from tests.launching import ROOT

# The package's folders and top-level modules, from the lowest floor up. A module may import from
# lower floors and from its own folder.
_FLOORS = (
  {"errors", "threads"},
  {"fields", "files", "foreign_settings", "machine", "signals", "standard_streams"},
  {"locks"},
  {"recipe", "options"},
  {"command_line"},
  {"data", "distributed", "models", "optim"},
  {"training"},
  {"train"},
)
# Modules that are imported before TensorFlow.
_LIGHT = {"tf_largebatch", "errors", "fields", "signals", "standard_streams", "threads"}
_LIGHT |= {"recipe", "options"}
# The modules of the package that may import absl's flags.
_KNOW_FLAGS = {"tf_largebatch.command_line", "tf_largebatch.train"}
# Modules that a program runs as a process although its source has no `-m` before their names.
_RUN = {"tools.launch_local": {"tf_largebatch.train"}}  # The default of its flag --module.
# Needed by every pytest_test but imported by no module; they are in a filegroup.
TEST_SUPPORT = {"tests/conftest.py", "tests/pytest_main.py"}
_LONGEST_FILE, _LONGEST_FUNCTION, _MOST_PARAMETERS = 400, 60, 8
_KERAS_OBJECTS = {
  ("tf_largebatch/training/fit.py", "fit"),
  ("tf_largebatch/training/fit.py", "evaluate"),
  ("tf_largebatch/optim/schedule.py", "__init__"),
  ("tf_largebatch/optim/sgd.py", "__init__"),
  ("tf_largebatch/models/normalization.py", "__init__"),
}
_MACROS = {"library", "package_init", "program", "pytest_test"}


def read_tree():
  """`BUILD` and every Python source, by path."""
  paths = [ROOT / "BUILD"]
  for folder in ("tests", "tf_largebatch", "tools"):
    paths += (ROOT / folder).rglob("*.py")
  return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def sources(tree):
  """Paths by module name."""
  paths = sorted(path for path in tree if path.endswith(".py"))
  stems = (path.removesuffix(".py").removesuffix("/__init__") for path in paths)
  return dict(zip((stem.replace("/", ".") for stem in stems), paths, strict=True))


@functools.cache  # All checks and cases read the same sources.
def names(text):
  """Names that a source imports, at the top or in a function, or runs by `-m` or `run_module`."""
  found = []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      found += (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      # A relative import keeps its dots, so that it matches no known name.
      prefix = "." * node.level + (node.module or "")
      found += (f"{prefix}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.List | ast.Tuple):
      words = [getattr(word, "value", None) for word in node.elts]
      found += (word for option, word in itertools.pairwise(words) if option == "-m")
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "run_module":
      found.append(getattr(node.args[0], "value", None))
  return [name for name in found if isinstance(name, str)]


@functools.cache
def functions(text):
  """The definitions of functions in a source."""
  return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


def needed(tree, module):
  """Modules of this repository that a module imports or runs."""
  known = sources(tree)
  found = set(_RUN.get(module, ()))
  for name in names(tree[known[module]]):
    while name and name not in known:
      name = name.rpartition(".")[0]
    found.add(name)
  return found - {"", module}


def targets(tree):
  """(macro, name, deps) of each target that a macro of `tests/defs.bzl` makes in `BUILD`."""
  for node in ast.parse(tree["BUILD"]).body:
    call = getattr(node, "value", None)
    if isinstance(call, ast.Call) and call.func.id in _MACROS:
      arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
      yield call.func.id, ast.literal_eval(call.args[0]), arguments.get("deps", [])


def label(module):
  """The name of a module's target."""
  return module.replace(".", "/")


def is_test(module):
  """Whether a module is a test, not a helper that tests share."""
  return module.startswith("tests.") and module.endswith("_test")


def is_test_support(path):
  return path in TEST_SUPPORT or (path.startswith("tests/") and path.endswith("/__init__.py"))


def kind_of(module, path, text):
  """The macro that makes a module's target."""
  if path.endswith("/__init__.py"):
    return "package_init"
  if is_test(module):
    return "pytest_test"
  return "program" if '\nif __name__ == "__main__":\n' in text else "library"


def target_problems(tree):
  """Each source must have one target of its name and kind, and each target its source."""
  owners = collections.defaultdict(list)
  for kind, name, _ in targets(tree):
    path = f"{name}/__init__.py" if kind == "package_init" else f"{name}.py"
    owners[path].append(kind)
    if path not in tree:
      yield f"{path} has a target but is not there"
  for module, path in sources(tree).items():
    expected = [] if is_test_support(path) else [kind_of(module, path, tree[path])]
    if owners[path] != expected:
      yield f"{path} has the targets {owners[path]}, not {expected}"


def expected_dependencies(tree, module):
  """Targets that a module imports or runs, without its own package, which the macros add."""
  package = module.rpartition(".")[0]
  found = needed(tree, module)
  fixtures = f"{package}.conftest"  # pytest imports it; all tests depend on that of `tests`.
  if is_test(module) and package != "tests" and fixtures in sources(tree):
    found |= {fixtures}
  return sorted({label(name) for name in found} - {label(package), "tests"})


def dependency_problems(tree):
  modules = {label(module): module for module in sources(tree)}
  for _, name, given in targets(tree):
    expected = expected_dependencies(tree, modules[name]) if name in modules else given
    if sorted(given) != expected:
      yield f"{name} has deps {sorted(given)}, not {expected}"


def floor_of(module):
  """(floor, folder or top-level module); None for a module outside the package."""
  part = module.removeprefix("tf_largebatch.").partition(".")[0]
  found = [floor for floor, parts in enumerate(_FLOORS) if part in parts]
  return (found[0], part) if module.startswith("tf_largebatch.") and found else None


def floor_problems(tree):
  for module in sources(tree):
    if not module.startswith("tf_largebatch."):
      continue
    place = floor_of(module)
    if place is None:
      yield f"{module} is on no floor"
      continue
    for other in sorted(needed(tree, module) - {"tf_largebatch"}):
      below = floor_of(other)
      neighbours = below == place and module.count(".") > 1
      if not neighbours and (below is None or below[0] >= place[0]):
        yield f"{module} imports {other}, which is not below it"


def foreign_problems(tree):
  """Finds relative imports, imports of absl's flags, and heavy imports in light modules."""
  for module, path in sources(tree).items():
    imports = names(tree[path])
    if any(name.startswith(".") for name in imports):
      yield f"{module} has a relative import"
    knows_flags = any(f"{name}.".startswith("absl.flags.") for name in imports)
    if knows_flags and module.startswith("tf_largebatch") and module not in _KNOW_FLAGS:
      yield f"{module} imports absl.flags"
    if module.startswith("tf_largebatch") and module.removeprefix("tf_largebatch.") in _LIGHT:
      allowed = {*sys.stdlib_module_names, "tf_largebatch"}
      for name in imports:
        if name.partition(".")[0] not in allowed:
          yield f"{module} imports {name}, which is not of the standard library"


def size_problems(tree):
  """Files and functions that are too large to take in; Keras objects take their whole config."""
  for module, path in sources(tree).items():
    lines = tree[path].count("\n")
    if lines > _LONGEST_FILE:
      yield f"{path} has {lines} lines"
    for node in functions(tree[path]):
      lines = node.end_lineno - node.lineno + 1
      if lines > _LONGEST_FUNCTION:
        yield f"{module}.{node.name} has {lines} lines"
      count = len(node.args.args) + len(node.args.kwonlyargs) + len(node.args.posonlyargs)
      if count > _MOST_PARAMETERS and (path, node.name) not in _KERAS_OBJECTS:
        yield f"{module}.{node.name} has {count} parameters"


def problems(tree):
  checks = (target_problems, dependency_problems, floor_problems, foreign_problems, size_problems)
  return [problem for check in checks for problem in check(tree)]


def test_targets_imports_and_floors():
  assert problems(read_tree()) == []


def test_the_tree_is_not_empty():
  tree = read_tree()
  assert {"tf_largebatch/train.py", "tools/launch_local.py", "tests/build_test.py"} <= set(tree)
  assert needed(tree, "tf_largebatch.errors") == set()
  assert "tf_largebatch.errors" in needed(tree, "tf_largebatch.recipe")
  # Imported in a function, and run by name in a subprocess.
  assert "tf_largebatch.training.trainer" in needed(tree, "tf_largebatch.train")
  assert needed(tree, "tests.tools.launch_local_test") >= {"tools.launch_local"}


_SGD, _RECIPE = "tf_largebatch/optim/sgd.py", "tf_largebatch/recipe.py"
_SGD_DEPS = "tf_largebatch/optim/sgd has deps []"
_BELOW = "which is not below it"


@pytest.mark.parametrize(
  "path, added, expected",
  [
    pytest.param(
      "tf_largebatch/utils.py",
      "",
      [
        "tf_largebatch/utils.py has the targets [], not ['library']",
        "tf_largebatch.utils is on no floor",
      ],
      id="new module",
    ),
    pytest.param(
      "tests/data/new_test.py",
      "",
      ["tests/data/new_test.py has the targets [], not ['pytest_test']"],
      id="new test",
    ),
    pytest.param(
      "tools/new.py",
      '\nif __name__ == "__main__":\n  pass',
      ["tools/new.py has the targets [], not ['program']"],
      id="new tool",
    ),
    pytest.param(
      "BUILD",
      'library("tools/gone")',
      ["tools/gone.py has a target but is not there"],
      id="target without source",
    ),
    pytest.param(
      "BUILD",
      'library("tf_largebatch/optim/sgd")',
      ["tf_largebatch/optim/sgd.py has the targets ['library', 'library'], not ['library']"],
      id="two targets",
    ),
    pytest.param(
      "BUILD",
      'library("tf_largebatch/optim/sgd", deps = ["tf_largebatch/files"])',
      [
        "tf_largebatch/optim/sgd.py has the targets ['library', 'library'], not ['library']",
        "tf_largebatch/optim/sgd has deps ['tf_largebatch/files'], not []",
      ],
      id="needless dependency",
    ),
    pytest.param(
      _SGD,
      "from tf_largebatch import files",
      [f"{_SGD_DEPS}, not ['tf_largebatch/files']"],
      id="missing dependency",
    ),
    pytest.param(
      _SGD,
      "def f():\n  from tf_largebatch import files",
      [f"{_SGD_DEPS}, not ['tf_largebatch/files']"],
      id="missing dependency of a function",
    ),
    pytest.param(
      _SGD,
      "from tf_largebatch.models import resnet",
      [
        f"{_SGD_DEPS}, not ['tf_largebatch/models/resnet']",
        f"tf_largebatch.optim.sgd imports tf_largebatch.models.resnet, {_BELOW}",
      ],
      id="import of another folder on the floor",
    ),
    pytest.param(
      _SGD,
      "from tf_largebatch.training import trainer",
      [
        f"{_SGD_DEPS}, not ['tf_largebatch/training/trainer']",
        f"tf_largebatch.optim.sgd imports tf_largebatch.training.trainer, {_BELOW}",
      ],
      id="import upwards",
    ),
    pytest.param(
      _SGD,
      "COMMAND = ['-m', 'tools.launch_local']",
      [
        f"{_SGD_DEPS}, not ['tools/launch_local']",
        f"tf_largebatch.optim.sgd imports tools.launch_local, {_BELOW}",
      ],
      id="tool",
    ),
    pytest.param(
      _SGD,
      "from . import errors",
      ["tf_largebatch.optim.sgd has a relative import"],
      id="relative import",
    ),
    pytest.param(
      _SGD,
      "from absl import flags",
      ["tf_largebatch.optim.sgd imports absl.flags"],
      id="flags",
    ),
    pytest.param(
      "tests/conftest.py", "#\n" * 400, ["tests/conftest.py has 420 lines"], id="long file"
    ),
    pytest.param(
      _RECIPE,
      "def f():\n" + "  f()\n" * 60,
      ["tf_largebatch.recipe.f has 61 lines"],
      id="long function",
    ),
    pytest.param(
      _RECIPE,
      "def f(a, b, c, d, e, *, f, g, h, i):\n  pass",
      ["tf_largebatch.recipe.f has 9 parameters"],
      id="many parameters",
    ),
    pytest.param(
      _RECIPE,
      "import numpy as np",
      ["tf_largebatch.recipe imports numpy, which is not of the standard library"],
      id="light",
    ),
  ],
)
def test_each_check_reports_a_broken_rule(path, added, expected):
  tree = read_tree()
  before = problems(tree)
  tree[path] = f"{tree.get(path, '')}\n{added}\n"
  assert [problem for problem in problems(tree) if problem not in before] == expected
