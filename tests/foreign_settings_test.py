"""Settings of the user's machine do not change what is computed, or are refused in one line."""

import os

import keras
import pytest

from tests.launching import run_module
from tf_largebatch import foreign_settings
from tf_largebatch.errors import UserError


def test_ignores_what_would_change_the_computation_and_nothing_else():
  kept = {"TF_ENABLE_ONEDNN_OPTS": "0", "XLA_FLAGS": "--x", "HOME": "/nowhere"}
  harmless = {"TF_USE_LEGACY_KERAS": "0", "ONEDNN_DEFAULT_FPMATH_MODE": "strict"}
  harmful = {"KERAS_BACKEND": "torch", "TF2_BEHAVIOR": "0", "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": "1"}
  environ = {**kept, **harmless, **harmful}
  assert foreign_settings.ignore(environ) == [f"{name}={v}" for name, v in harmful.items()]
  assert environ == {**kept, "KERAS_BACKEND": "tensorflow", "TF2_BEHAVIOR": "1"}
  assert foreign_settings.ignore(environ) == []


@pytest.mark.parametrize(
  "content, named",
  [
    ("[]", "which is not a JSON object"),
    ('{"floatx": "float8"}', "floatx is 'float8'"),
    ('{"epsilon": 1}', "epsilon is 1"),
    ('{"image_data_format": "NHWC"}', "image_data_format is 'NHWC'"),
    (None, "cannot read"),
  ],
)
def test_a_file_that_keras_cannot_use_is_named(tmp_path, content, named):
  path = tmp_path / "keras.json"
  path.mkdir() if content is None else path.write_text(content)
  with pytest.raises(UserError, match=f"{path}.*"):
    foreign_settings.ignore({"KERAS_HOME": str(tmp_path)})
  with pytest.raises(UserError, match=named):
    foreign_settings.ignore({"KERAS_HOME": str(tmp_path)})


@pytest.mark.parametrize("content", ["{", '{"image_data_format": "channels_first"}'])
def test_a_file_that_keras_can_use_or_ignores_is_accepted(tmp_path, content):
  (tmp_path / "keras.json").write_text(content)
  assert foreign_settings.ignore({"KERAS_HOME": str(tmp_path)}) == []


def test_the_file_is_found_where_keras_finds_it(tmp_path, monkeypatch):
  (tmp_path / ".keras").mkdir()
  (tmp_path / ".keras" / "keras.json").write_text("[]")
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(UserError, match=str(tmp_path)):
    foreign_settings.ignore({})


@pytest.fixture
def changed_keras():
  config = keras.config
  config.set_floatx("float64")
  config.set_epsilon(0.5)
  config.set_image_data_format("channels_first")
  config.set_dtype_policy("mixed_float16")
  yield config
  config.set_floatx("float32")
  config.set_epsilon(1e-7)
  config.set_image_data_format("channels_last")
  config.set_dtype_policy("float32")


def _settings(config):
  return (
    config.floatx(),
    config.epsilon(),
    config.image_data_format(),
    config.dtype_policy().name,
  )


def test_keras_defaults_hold_inside_and_the_programs_settings_after(changed_keras):
  before = _settings(changed_keras)
  with foreign_settings.keras_defaults():
    assert _settings(changed_keras) == ("float32", 1e-7, "channels_last", "float32")
  assert _settings(changed_keras) == before == ("float64", 0.5, "channels_first", "mixed_float16")


def test_another_backend_is_refused_in_words(monkeypatch):
  monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
  with pytest.raises(ImportError, match="needs Keras' TensorFlow backend, but Keras uses 'jax'"):
    foreign_settings.require_tensorflow_backend()


def test_a_tool_names_a_file_that_keras_cannot_use(tmp_path):
  (tmp_path / "keras.json").write_text("[]")
  env = {**os.environ, "KERAS_HOME": str(tmp_path)}
  finished = run_module("tools.launch_local", "--tasks=1", env=env)
  assert finished.returncode == 1
  (line,) = finished.stderr.splitlines()
  path = tmp_path / "keras.json"
  assert line == f"error: Keras cannot use {path}, which is not a JSON object; remove it."
