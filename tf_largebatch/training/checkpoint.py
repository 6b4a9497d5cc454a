"""Checkpoints: saved as a whole or not at all, and restored from the newest whole one.

step-0000000120.npz    all state after step 120
step-0000000120.json   its manifest, written last: without it the checkpoint does not exist
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_largebatch import files
from tf_largebatch.errors import UserError, summary

_KEEP = 3
_MANIFEST = re.compile(r"step-(\d{10})\.json")
_OURS = re.compile(r"step-\d{10}\.(npz|json)(\.partial)?")


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a checkpoint holds, without its state.

  Attributes:
    step: steps done.
    seconds: time trained so far.
    bytes, sha256: size and digest of the file of the state.
    validation_error: a fraction; None if this state was not evaluated (yet).
  """

  step: int
  seconds: float
  bytes: int
  sha256: str
  validation_error: float | None = None

  def to_json(self) -> str:
    """Returns one line of JSON, with a digest of the other fields."""
    fields = dataclasses.asdict(self)
    return json.dumps(fields | {"manifest_sha256": _sha256_of_fields(fields)}) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "Manifest":
    """Parses what `to_json` returned.

    Raises:
      ValueError: the text is not a manifest, or was changed.
    """
    fields = files.parse_json(text)
    if not isinstance(fields, dict):
      raise ValueError("not a manifest")
    if fields.pop("manifest_sha256", None) != _sha256_of_fields(fields):
      raise ValueError("the manifest's own digest differs")
    try:
      return cls(**fields)
    except TypeError as error:
      raise ValueError(f"another version's manifest: {error}") from error


def _sha256_of_fields(fields: dict) -> str:
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Checkpoints:
  """The checkpoints of a run: the last three and the best by validation error.

  Only one process may save to a directory. A save copies the state and returns; a thread digests
  and writes the copy while training continues.
  """

  def __init__(
    self, directory: str, model: keras.Model, optimizer, loss_scale=None, *, saves: bool = True
  ):
    """
    Args:
      directory: made at the first save.
      model, optimizer, loss_scale (may be None): built; what is saved and restored.
      saves: False if another process saves (`save` and the like then do nothing).
    """
    self.directory = directory
    owners = {"model": model.variables, "optimizer": optimizer.variables}
    if loss_scale is not None:
      owners["loss_scale"] = loss_scale.variables
    # By index, not by Keras' paths, which count the layers that a process has made.
    self._variables = {
      f"{owner}/{index:04d}": variable
      for owner, variables in owners.items()
      for index, variable in enumerate(variables)
    }
    self._saves = saves
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint") if saves else None
    self._pending: concurrent.futures.Future | None = None
    self._step: int | None = None  # Of the newest checkpoint that is saved or being saved.

  def restore_newest(self) -> Manifest | None:
    """Restores the newest whole checkpoint; logs the newer ones that are not whole.

    Returns:
      Its manifest; None if there is no checkpoint.

    Raises:
      UserError: see `manifests` and `restore`.
    """
    for manifest in self.manifests():
      arrays = self.read(manifest)
      if arrays is not None:
        self.restore(manifest, arrays)
        return manifest
    return None

  def manifests(self) -> Iterator[Manifest]:
    """Yields the whole manifests, newest first; logs the others.

    Raises:
      UserError: the path of the checkpoints is not a directory.
    """
    try:
      names = _manifests(self.directory)
    except files.FAILURES as error:
      raise UserError(
        f"The checkpoints {self.directory} cannot be listed ({summary(error)}); move away what "
        "is there, or choose another work_dir."
      ) from error
    for name in reversed(names):
      try:
        manifest = read_manifest(os.path.join(self.directory, name))
        if manifest.step != _step_of(name):
          raise ValueError(f"its manifest is of step {manifest.step}")
      except (*files.FAILURES, ValueError) as error:
        self._log_skipped(name, error)
      else:
        yield manifest

  def read(self, manifest: Manifest) -> dict[str, np.ndarray] | None:
    """Returns the state of a checkpoint; logs why and returns None if it is not whole."""
    name = _name_of(manifest.step)
    try:
      return load_state(os.path.join(self.directory, name), manifest)
    except (*files.FAILURES, ValueError) as error:
      self._log_skipped(name, error)
      return None

  def _log_skipped(self, name: str, error: Exception) -> None:
    path = os.path.join(self.directory, name)
    logging.warning("Skipping the checkpoint %s, which is not whole (%s).", path, summary(error))

  def restore(self, manifest: Manifest, arrays: dict[str, np.ndarray]) -> None:
    """Assigns the state of a checkpoint.

    Raises:
      UserError: it belongs to another network or optimizer.
    """
    expected = {name: (tuple(v.shape), v.dtype) for name, v in self._variables.items()}
    if expected != {name: (array.shape, array.dtype.name) for name, array in arrays.items()}:
      path = os.path.join(self.directory, _name_of(manifest.step))
      raise UserError(
        f"The checkpoint {path} holds other variables than this recipe's network and optimizer; "
        "another version wrote it: continue with that version, or choose another work_dir."
      )
    for name, variable in self._variables.items():
      variable.assign(arrays[name])
    self._step = manifest.step

  @property
  def busy(self) -> bool:
    """Whether a save is under way."""
    return self._pending is not None and not self._pending.done()

  def save(self, step: int, seconds: float) -> None:
    """Starts to save the state. A failure is logged and leaves earlier checkpoints alone.

    Args:
      step: steps done.
      seconds: time trained so far.
    """
    if not self._saves or step == self._step:
      return
    self.wait()
    # Copies, because the next step overwrites the variables.
    arrays = {name: np.array(variable.numpy()) for name, variable in self._variables.items()}
    self._step = step
    self._pending = self._thread.submit(self._write, step, seconds, arrays)

  def evaluated(self, step: int, error: float) -> None:
    """Adds the validation error (a fraction) to the checkpoint of `step`."""
    if self._saves:
      self.wait()
      self._pending = self._thread.submit(self._note, step, error)

  def wait(self) -> None:
    """Waits until the save under way has finished or failed."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      pending.result()

  def discard_from(self, step: int) -> None:
    """Removes the checkpoints from `step` on, because their state proved to be bad."""
    if self._saves:
      self.wait()
      self._remove(name for name in _manifests(self.directory) if _step_of(name) >= step)

  def newest_step(self) -> int | None:
    """Returns the newest checkpoint's step, whichever process saved it; None if none exists."""
    self.wait()
    names = _manifests(self.directory)
    return _step_of(names[-1]) if names else None

  def _write(self, step: int, seconds: float, arrays: dict[str, np.ndarray]) -> None:
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
      logging.error(
        "The state after step %d is not saved: %s of its %d variables are not finite.",
        step,
        len(broken),
        len(arrays),
      )
      return
    try:
      store(self.directory, step, seconds, arrays)
      self._prune(step)
    except files.FAILURES as error:
      self._step = None
      logging.error(
        "Cannot save the checkpoint of step %d (%s); earlier checkpoints stay, and training "
        "continues and retries at the next checkpoint.",
        step,
        summary(error),
      )

  def _note(self, step: int, error: float) -> None:
    path = os.path.join(self.directory, _name_of(step))
    try:
      if tf.io.gfile.exists(path):  # Otherwise it could not be saved.
        manifest = read_manifest(path)
        manifest = dataclasses.replace(manifest, validation_error=error)
        files.write_text(path, manifest.to_json())
        self._prune(step)
    except (*files.FAILURES, ValueError) as failure:
      logging.error(
        "Cannot add the validation error of step %d to %s (%s).",
        step,
        path,
        summary(failure),
      )

  def _prune(self, newest: int) -> None:
    """Removes all but the last three checkpoints and the best, and what torn saves left.

    Checkpoints past the step that was just saved go too: they were not whole when the run resumed,
    and would count among the last three.
    """
    manifests = {}
    for name in _manifests(self.directory):
      if _step_of(name) > newest:
        continue
      with contextlib.suppress(ValueError):  # A changed manifest does not count.
        manifests[name] = read_manifest(os.path.join(self.directory, name))
    rated = [name for name in manifests if manifests[name].validation_error is not None]
    best = min(rated, key=lambda name: manifests[name].validation_error, default=None)
    kept = {*list(manifests)[-_KEEP:], best}
    self._remove(name for name in _manifests(self.directory) if name not in kept)
    whole = {name for manifest in kept - {None} for name in (manifest, _state_path(manifest))}
    for name in tf.io.gfile.listdir(self.directory):
      if _OURS.fullmatch(name) and name not in whole:
        tf.io.gfile.remove(os.path.join(self.directory, name))

  def _remove(self, names) -> None:
    for name in list(names):
      path = os.path.join(self.directory, name)
      tf.io.gfile.remove(path)  # First, because it marks the state as whole.
      if tf.io.gfile.exists(_state_path(path)):
        tf.io.gfile.remove(_state_path(path))


class _Digested(io.RawIOBase):
  """A file that is written once from start to end, with its size and digest."""

  def __init__(self, file):
    super().__init__()
    self._file = file
    self.bytes = 0
    self.sha256 = hashlib.sha256()

  def writable(self) -> bool:
    return True

  def write(self, data) -> int:
    data = bytes(data)
    self.sha256.update(data)
    self.bytes += len(data)
    self._file.write(data)
    return len(data)


def read_manifest(path: str) -> Manifest:
  """Reads a manifest.

  Raises:
    ValueError: it is not one, or was changed; or one of `files.FAILURES`.
  """
  return Manifest.from_json(files.read_text(path))


def load_state(path: str, manifest: Manifest) -> dict[str, np.ndarray]:
  """Returns the state of a checkpoint by name: "model/0000", …, "optimizer/0000", ….

  Args:
    path: of the manifest.
    manifest: that was read there.

  Raises:
    ValueError: the state is not whole; or one of `files.FAILURES`.
  """
  with tf.io.gfile.GFile(_state_path(path), "rb") as file:
    content = file.read()
  if len(content) != manifest.bytes:
    raise ValueError(f"{len(content)} bytes of state instead of {manifest.bytes}")
  if hashlib.sha256(content).hexdigest() != manifest.sha256:
    raise ValueError("the state's SHA-256 differs from the manifest's")
  return dict(np.load(io.BytesIO(content), allow_pickle=False))


def store(
  directory: str,
  step: int,
  seconds: float,
  arrays: dict[str, np.ndarray],
  validation_error: float | None = None,
) -> None:
  """Writes a checkpoint.

  Args:
    directory: of the checkpoints; made if it is missing.
    step, seconds, validation_error: see `Manifest`.
    arrays: the state, as `load_state` returns it.

  Raises:
    one of `files.FAILURES`.
  """
  tf.io.gfile.makedirs(directory)
  path = os.path.join(directory, _name_of(step))
  with files.replacing(_state_path(path), "wb") as file:
    digested = _Digested(file)
    np.savez(digested, **arrays)
  digest = digested.sha256.hexdigest()
  manifest = Manifest(step, seconds, digested.bytes, digest, validation_error)
  files.write_text(path, manifest.to_json())


def _state_path(manifest: str) -> str:
  return manifest.removesuffix(".json") + ".npz"


def _name_of(step: int) -> str:
  return f"step-{step:010d}.json"


def _step_of(manifest: str) -> int:
  return int(_MANIFEST.fullmatch(os.path.basename(manifest))[1])


def _manifests(directory: str) -> list[str]:
  """Returns the names of the manifests, oldest first."""
  if not tf.io.gfile.exists(directory):
    return []
  return sorted(name for name in tf.io.gfile.listdir(directory) if _MANIFEST.fullmatch(name))
