"""The rule of the tests: pytest files are no programs, so `pytest_main.py` runs each."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest_test(name, **attributes):
    """A py_test that runs the pytest file `name`.py.

    Args:
      name: path of the file from the repository's root, without ".py".
      **attributes: further ones of py_test, such as deps, data and size.
    """
    py_test(
        name = name,
        srcs = [name + ".py", ":tests/pytest_main"],
        args = [name + ".py"],
        main = "tests/pytest_main.py",
        **attributes
    )
