"""Macros for the root `BUILD`, which has one target per source, named like its path without ".py".

Each adds what follows from the name: the source and the package that Python imports first.
"""

load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

def _labels(name, deps):
    """The labels of `deps` and of the package of `name` (tests get theirs with pytest_main)."""
    package = name.rpartition("/")[0]
    packages = [package] if package and not name.startswith("tests/") else []
    return [":" + dep for dep in packages + deps]

def _visibility(public):
    return ["//visibility:" + ("public" if public else "private")]

def package_init(name, deps = [], public = False):
    """The `__init__.py` of a folder."""
    py_library(
        name = name,
        srcs = [name + "/__init__.py"],
        visibility = _visibility(public),
        deps = _labels(name, deps),
    )

def library(name, deps = [], public = False):
    """A module that is imported."""
    py_library(
        name = name,
        testonly = name.startswith("tests/"),
        srcs = [name + ".py"],
        visibility = _visibility(public),
        deps = _labels(name, deps),
    )

def program(name, deps = [], data = [], public = False):
    """A module that runs with `python -m`."""
    py_binary(
        name = name,
        testonly = name.startswith("tests/"),
        srcs = [name + ".py"],
        data = data,
        main = name + ".py",
        visibility = _visibility(public),
        deps = _labels(name, deps),
    )

def pytest_test(name, deps = [], data = [], size = "medium"):
    """A file of tests, which `tests/pytest_main.py` runs."""
    py_test(
        name = name,
        size = size,
        srcs = [name + ".py", ":tests/pytest_main"],
        args = [name + ".py"],
        data = data,
        main = "tests/pytest_main.py",
        deps = _labels(name, deps),
    )
