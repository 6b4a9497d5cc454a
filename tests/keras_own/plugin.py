"""pytest plugin that runs Keras' own tests against ours and writes what came out.

KERAS_OWN_OUTCOMES names the JSON file: test → "passed", "skipped" or the failure's last line.
KERAS_OWN_STOCK=1 leaves Keras' classes in place. KERAS_OWN_ONLY names a file of the tests to run.
"""

import json
import os
import sys
import types

import pytest

from tests.keras_own import stand_ins

_outcomes: dict[str, str] = {}
_stock = bool(os.environ.get("KERAS_OWN_STOCK"))


def pytest_configure(config):
  config.addinivalue_line("markers", "requires_trainable_backend: any backend but NumPy's")
  # trainer_test.py imports JAX, which none of the tests for TensorFlow uses.
  sys.modules.setdefault("jax", types.ModuleType("jax"))
  # What some import from the conftest.py of Keras' repository, which the wheel lacks.
  conftest = types.ModuleType("conftest")
  conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(
    backend == "tensorflow", reason=reason
  )
  sys.modules.setdefault("conftest", conftest)
  if not _stock:
    stand_ins.replace_methods()


def test_name(item) -> str:
  """File, class and test, such as `optimizers/sgd_test.py::SGDTest::test_config`."""
  path = item.module.__name__.removeprefix("keras.src.").replace(".", "/")
  return "::".join([f"{path}.py", *item.nodeid.split("::")[1:]])


def pytest_collection_modifyitems(config, items):
  only = os.environ.get("KERAS_OWN_ONLY")
  if only:
    with open(only) as file:
      chosen = set(json.load(file))
    items[:] = [item for item in items if test_name(item) in chosen]
  for item in items:
    item.user_properties.append(("name", test_name(item)))
    if not _stock:
      stand_ins.replace_names(item.module)


def pytest_runtest_setup():
  stand_ins.uses.clear()


def pytest_runtest_logreport(report):
  name = dict(report.user_properties)["name"]
  if report.skipped:
    _outcomes[name] = "skipped"
  elif report.failed:
    _outcomes[name] = report.longrepr.reprcrash.message
  elif report.when == "call":
    _outcomes[name] = "passed" if stand_ins.uses or _stock else "passed without ours"


def pytest_sessionfinish():
  with open(os.environ["KERAS_OWN_OUTCOMES"], "w") as file:
    json.dump(_outcomes, file, indent=1)
