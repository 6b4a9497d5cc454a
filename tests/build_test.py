"""`BUILD` against what the sources import, and the house's rules of who may import whom."""

import ast
import collections
import functools
import itertools
import pathlib
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent

# Imports go down only: every module may import those of lower floors.
_FLOORS = (
  {"errors", "recipe"},
  {"files", "preemption"},
  {
    "cluster",
    "input_pipeline",
    "loss_scale",
    "metrics",
    "normalization",
    "optimizer",
    "preparation",
    "record_index",
    "resnet",
    "schedule",
    "sources",
  },
  {"bad_examples", "checkpoint", "step"},
  {"training"},
  {"train"},
)
# The imports that stay on a floor.
_SIDEWAYS = {("recipe", "errors"), ("sources", "record_index"), ("input_pipeline", "sources")}
# What runs as a process of its own without `-m` beside it in the source.
_RUN = {"tools.launch_local": {"tf_largebatch.train"}}  # The default of its flag --module.
# The one module of the package that knows flags, and so the one that is a program.
_PROGRAM = "tf_largebatch.train"
# What tools and tests share: a library, though it lives with the programs.
_LIBRARIES = {"tools.reference"}
# Files that all tests share are no module of one target: a filegroup holds them.
_TEST_SUPPORT = {"tests/__init__.py", "tests/conftest.py", "tests/pytest_main.py"}


def read_tree():
  """`BUILD` and every Python source, by path."""
  paths = [_ROOT / "BUILD"]
  for folder in ("tests", "tf_largebatch", "tools"):
    paths += (_ROOT / folder).rglob("*.py")
  return {path.relative_to(_ROOT).as_posix(): path.read_text() for path in paths}


def sources(tree):
  """Paths by the names that `import` takes."""
  paths = sorted(path for path in tree if path.endswith(".py"))
  stems = (path.removesuffix(".py").removesuffix("/__init__") for path in paths)
  return dict(zip((stem.replace("/", ".") for stem in stems), paths, strict=True))


@functools.cache  # The same sources are read for every check and every case.
def names(text):
  """What a source imports, at the top or in a function, and runs by `-m` or `run_module`."""
  found = []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      found += (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      # A relative import keeps its dots here, and so is no known name.
      prefix = "." * node.level + (node.module or "")
      found += (f"{prefix}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.List | ast.Tuple):
      words = [getattr(word, "value", None) for word in node.elts]
      found += (word for option, word in itertools.pairwise(words) if option == "-m")
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "run_module":
      found.append(getattr(node.args[0], "value", None))
  return [name for name in found if isinstance(name, str)]


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
  """The calls of `BUILD`, a (kind, arguments) each; what is no literal (a glob) is None."""
  for node in ast.parse(tree["BUILD"]).body:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
      arguments = {}
      for keyword in node.value.keywords:
        try:
          arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
          arguments[keyword.arg] = None
      yield node.value.func.id, arguments


def label(module):
  return ":" + module.rpartition(".")[2]


def is_test(module):
  """Other modules of `tests` are what several tests share."""
  return module.startswith("tests.") and module.endswith("_test")


def target_problems(tree):
  """Each source has one target, of its name and of the right kind, and each target its source."""
  known = sources(tree)
  owners = collections.defaultdict(list)
  for kind, arguments in targets(tree):
    for path in arguments.get("srcs") or ():
      if path.endswith(".py"):
        owners[path].append((kind, ":" + arguments["name"]))
        if path not in tree:
          yield f"{path} has a target but is not there"
  for module, path in known.items():
    if path in _TEST_SUPPORT:
      expected = ("filegroup", ":pytest_main")
    elif is_test(module):
      expected = ("py_test", label(module))
    elif path.endswith("/__init__.py") or module in _LIBRARIES:
      expected = ("py_library", label(module))
    elif module == _PROGRAM or module.startswith("tools."):
      expected = ("py_binary", label(module))
    else:
      expected = ("py_library", label(module))
    if owners[path] != [expected]:
      yield f"{path} has the targets {owners[path]}, not {expected}"


def dependency_problems(tree):
  """deps are what the sources import, and a module's own package, which Python imports first."""
  rules = {}
  for kind, arguments in targets(tree):
    if kind.startswith("py_"):
      rules[":" + arguments["name"]] = arguments
  for module, path in sources(tree).items():
    if path in _TEST_SUPPORT or label(module) not in rules:
      continue
    rule = rules[label(module)]
    expected = {label(name) for name in needed(tree, module)}
    package = module.rpartition(".")[0]
    if is_test(module):
      # The package of the tests comes with the program that runs them.
      program = {"main": "tests/pytest_main.py", "args": [path], "srcs": [path, ":pytest_main"]}
      for name, value in program.items():
        if rule.get(name) != value:
          yield f"{label(module)} has {name} = {rule.get(name)}, not {value}"
    elif package != "tests":
      expected |= {label(package)} if package else set()
    given = rule.get("deps", [])
    if sorted(given) != sorted(expected):
      yield f"{label(module)} has deps {sorted(given)}, not {sorted(expected)}"


def floor_problems(tree):
  """Imports go down only, and those of the package stay in it."""
  floors = {f"tf_largebatch.{name}": i for i, names in enumerate(_FLOORS) for name in names}
  modules = {name for name in sources(tree) if name.startswith("tf_largebatch.")}
  for module in sorted(modules ^ set(floors)):
    yield f"{module} is only in one of the package and the table of floors"
  sideways = {tuple(f"tf_largebatch.{name}" for name in pair) for pair in _SIDEWAYS}
  for module in sorted(modules & set(floors)):
    for other in sorted(needed(tree, module)):
      if (module, other) not in sideways and floors.get(other, len(floors)) >= floors[module]:
        yield f"{module} imports {other}, which is not below it"


def foreign_problems(tree):
  """Flags are the programs' alone, floor 0 is standard library only, no import is relative."""
  for module, path in sources(tree).items():
    imports = names(tree[path])
    if any(name.startswith(".") for name in imports):
      yield f"{module} has a relative import"
    knows_flags = any(f"{name}.".startswith("absl.flags.") for name in imports)
    if knows_flags and module.startswith("tf_largebatch") and module != _PROGRAM:
      yield f"{module} imports absl.flags"
    if module in {f"tf_largebatch.{name}" for name in _FLOORS[0]}:
      allowed = {*sys.stdlib_module_names, "tf_largebatch"}
      for name in imports:
        if name.partition(".")[0] not in allowed:
          yield f"{module} imports {name}, which is not of the standard library"


def problems(tree):
  checks = (target_problems, dependency_problems, floor_problems, foreign_problems)
  return [problem for check in checks for problem in check(tree)]


def test_targets_imports_and_floors():
  assert problems(read_tree()) == []


def test_the_tree_is_not_empty():
  tree = read_tree()
  assert {"tf_largebatch/train.py", "tools/launch_local.py", "tests/build_test.py"} <= set(tree)
  assert needed(tree, "tf_largebatch.errors") == set()
  assert needed(tree, "tf_largebatch.recipe") == {"tf_largebatch.errors"}
  # In a function, and by the name that a subprocess is given.
  assert "tf_largebatch.training" in needed(tree, "tf_largebatch.train")
  assert needed(tree, "tests.launch_local_test") >= {"tools.launch_local"}


_OPTIMIZER, _RECIPE = "tf_largebatch/optimizer.py", "tf_largebatch/recipe.py"
_BELOW = "which is not below it"


@pytest.mark.parametrize(
  "path, added, expected",
  [
    pytest.param(
      "tf_largebatch/utils.py",
      "",
      [
        "tf_largebatch/utils.py has the targets [], not ('py_library', ':utils')",
        "tf_largebatch.utils is only in one of the package and the table of floors",
      ],
      id="new module",
    ),
    pytest.param(
      "tests/new_test.py",
      "",
      ["tests/new_test.py has the targets [], not ('py_test', ':new_test')"],
      id="new test",
    ),
    pytest.param(
      "tools/new.py",
      "",
      ["tools/new.py has the targets [], not ('py_binary', ':new')"],
      id="new tool",
    ),
    pytest.param(
      "BUILD",
      'py_library(name = "gone", srcs = ["tf_largebatch/gone.py"])',
      ["tf_largebatch/gone.py has a target but is not there"],
      id="target without source",
    ),
    pytest.param(
      "BUILD",
      'py_library(name = "sgd", srcs = ["tf_largebatch/optimizer.py"])',
      [
        "tf_largebatch/optimizer.py has the targets [('py_library', ':optimizer'), "
        "('py_library', ':sgd')], not ('py_library', ':optimizer')"
      ],
      id="two targets",
    ),
    pytest.param(
      _OPTIMIZER,
      "from tf_largebatch.errors import UserError",
      [":optimizer has deps [':tf_largebatch'], not [':errors', ':tf_largebatch']"],
      id="missing dependency",
    ),
    pytest.param(
      _OPTIMIZER,
      "def f():\n  from tf_largebatch import errors",
      [":optimizer has deps [':tf_largebatch'], not [':errors', ':tf_largebatch']"],
      id="missing dependency of a function",
    ),
    pytest.param(
      "BUILD",
      'py_library(name = "optimizer", deps = [":errors", ":tf_largebatch"])',
      [":optimizer has deps [':errors', ':tf_largebatch'], not [':tf_largebatch']"],
      id="needless dependency",
    ),
    pytest.param(
      "BUILD",
      'py_test(name = "build_test", args = ["tests/flags_test.py"], main = "tests/pytest_main.py", '
      'srcs = ["tests/build_test.py", ":pytest_main"])',
      [
        "tests/build_test.py has the targets [('py_test', ':build_test'), "
        "('py_test', ':build_test')], not ('py_test', ':build_test')",
        ":build_test has args = ['tests/flags_test.py'], not ['tests/build_test.py']",
      ],
      id="test that runs another",
    ),
    pytest.param(
      _OPTIMIZER,
      "from tf_largebatch.schedule import LinearScalingSchedule",
      [
        ":optimizer has deps [':tf_largebatch'], not [':schedule', ':tf_largebatch']",
        f"tf_largebatch.optimizer imports tf_largebatch.schedule, {_BELOW}",
      ],
      id="import on the same floor",
    ),
    pytest.param(
      _OPTIMIZER,
      "from tf_largebatch import training",
      [
        ":optimizer has deps [':tf_largebatch'], not [':tf_largebatch', ':training']",
        f"tf_largebatch.optimizer imports tf_largebatch.training, {_BELOW}",
      ],
      id="import upwards",
    ),
    pytest.param(
      _OPTIMIZER,
      "COMMAND = ['-m', 'tools.launch_local']",
      [
        ":optimizer has deps [':tf_largebatch'], not [':launch_local', ':tf_largebatch']",
        f"tf_largebatch.optimizer imports tools.launch_local, {_BELOW}",
      ],
      id="tool",
    ),
    pytest.param(
      _OPTIMIZER,
      "from . import errors",
      ["tf_largebatch.optimizer has a relative import"],
      id="relative import",
    ),
    pytest.param(
      _OPTIMIZER,
      "from absl import flags",
      ["tf_largebatch.optimizer imports absl.flags"],
      id="flags",
    ),
    pytest.param(
      _RECIPE,
      "import numpy as np",
      ["tf_largebatch.recipe imports numpy, which is not of the standard library"],
      id="floor 0",
    ),
  ],
)
def test_each_check_fails_where_its_rule_is_broken(path, added, expected):
  tree = read_tree()
  before = problems(tree)
  tree[path] = f"{tree.get(path, '')}\n{added}\n"
  assert [problem for problem in problems(tree) if problem not in before] == expected
