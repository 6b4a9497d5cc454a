"""Lists a user's images and their classes, from a folder or a CSV file.

A folder holds `class_name/*`, or `train/class_name/*` and likewise `validation` and `test`. A CSV
file has a header and one image a row: its path, its class and optionally its split.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from tf_largebatch.errors import UserError, summary

# Names of splits, as people write them → as TFDS does.
_SPLITS = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("validation", "val", "valid"), "validation"),
  **dict.fromkeys(("test", "testing"), "test"),
}
# What operating systems put into folders, beside names that begin with a dot.
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
_COLUMNS = {
  "path": ("path", "image", "file", "filename", "file_name", "filepath", "image_path"),
  "label": ("label", "class", "class_name", "category"),
  "split": ("split", "subset"),
}


@dataclasses.dataclass(frozen=True)
class ImageFile:
  """An image and its class.

  Attributes:
    path: where the file is.
    name: the path below the split's folder, or as in the CSV file; unique in the split.
    label: name of the class.
  """

  path: pathlib.Path
  name: str
  label: str


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """The files of each split, train first, and names of all classes, those without files too."""

  origin: str
  splits: dict[str, list[ImageFile]]
  classes: list[str]


def from_folder(folder: pathlib.Path) -> ImageSet:
  """Lists the files in a folder's class folders; symbolic links are followed.

  Raises:
    UserError: the folder has no class folders, or files or folders in the wrong place.
  """
  origin = f"--images={folder}"
  try:
    splits = {split: _list_classes(path) for split, path in _split_folders(folder).items()}
  except OSError as error:
    raise UserError(f"{origin} cannot be read ({summary(error)}); name another folder.") from error
  files = {
    split: [
      ImageFile(path, f"{label}/{path.name}", label)
      for label, paths in classes.items()
      for path in paths
    ]
    for split, classes in splits.items()
  }
  return ImageSet(origin, files, sort_classes(label for part in splits.values() for label in part))


def sort_classes(labels: Iterable[str]) -> list[str]:
  """Returns the different labels, sorted by name, or by value if all are integers."""
  labels = sorted(set(labels))
  if all(label.isascii() and label.removeprefix("-").isdigit() for label in labels):
    return sorted(labels, key=int)
  return labels


def listing(names: Sequence[object], most: int = 3) -> str:
  """Returns the first names, and how many there are."""
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(map(str, names[:most])) + more


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    path
    for path in folder.iterdir()
    if not path.name.startswith(".") and path.name.lower() not in _SYSTEM_FILES
  )


def _split_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the folder of each split: the folder itself is `train` if it has no split folders."""
  folders = [path for path in _visible(folder) if path.is_dir()]
  splits: dict[str, list[pathlib.Path]] = {}
  for path in folders:
    if split := _SPLITS.get(path.name.lower()):
      splits.setdefault(split, []).append(path)
  others = [path.name for path in folders if path.name.lower() not in _SPLITS]
  if "train" not in splits:
    if splits and not others:
      raise UserError(f"--images={folder} has {', '.join(splits)} but no train folder; add it.")
    return {"train": folder}
  if others:
    raise UserError(
      f"--images={folder} has other folders beside {splits['train'][0].name}: {listing(others)}; "
      "leave either class folders there or train, validation and test."
    )
  for split, paths in splits.items():
    if len(paths) > 1:
      raise UserError(
        f"--images={folder} has {len(paths)} folders of the {split} split: "
        f"{listing([path.name for path in paths])}; merge or remove them."
      )
  return {split: splits[split][0] for split in ("train", "validation", "test") if split in splits}


def _list_classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each class folder."""
  entries = _visible(folder)
  classes = {path.name: _visible(path) for path in entries if path.is_dir()}
  if not classes:
    raise UserError(f"{folder} has no class folders; put the images into {folder}/CLASS_NAME/.")
  nested = [path for paths in classes.values() for path in paths if path.is_dir()]
  if nested:
    raise UserError(
      f"{folder} has folders inside its class folders: {listing(nested)}; put the images directly "
      f"into the class folders, or give the folder that holds these, such as {nested[0].parent}."
    )
  outside = [path.name for path in entries if not path.is_dir()]
  if any(pathlib.Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") for name in outside):
    raise UserError(
      f"{folder} has images outside of its class folders: {listing(outside)}; move them into one."
    )
  return classes


def from_csv(path: pathlib.Path) -> ImageSet:
  """Lists the files of a CSV file, whose paths are relative to the file's own folder.

  Raises:
    UserError: the file cannot be read, lacks a column, or a row is incomplete or repeated.
  """
  splits: dict[str, dict[str, ImageFile]] = {}
  try:
    # Excel begins UTF-8 files with a byte order mark.
    with open(path, newline="", encoding="utf-8-sig") as file:
      for line, name, label, split in _rows(path, file):
        files = splits.setdefault(split, {})
        if name in files:
          raise UserError(f"--csv={path}, line {line}: {name!r} was already listed; remove one.")
        files[name] = ImageFile(path.parent / name, name, label)
  except UnicodeDecodeError as error:
    raise UserError(
      f"--csv={path} is not UTF-8 text ({error.reason}); save it as UTF-8."
    ) from error
  except (OSError, csv.Error) as error:
    raise UserError(
      f"--csv={path} cannot be read ({summary(error)}); name a CSV file with a header."
    ) from error
  if "train" not in splits:
    raise UserError(f"--csv={path} lists no training image; add rows, or split values of train.")
  ordered = {
    split: list(splits[split].values())
    for split in ("train", "validation", "test")
    if split in splits
  }
  labels = (file.label for files in ordered.values() for file in files)
  return ImageSet(f"--csv={path}", ordered, sort_classes(labels))


def _rows(path: pathlib.Path, file) -> Iterator[tuple[int, str, str, str]]:
  """Yields (line, path, label, split) of each row."""
  header = file.readline()
  delimiter = max(",;\t", key=header.count)
  names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
  columns = {}
  for kind, accepted in _COLUMNS.items():
    found = [number for number, name in enumerate(names) if name in accepted]
    if len(found) > 1 or (kind != "split" and not found):
      raise UserError(
        f"--csv={path} has {len(found)} columns for the {kind} in its header "
        f"{header.strip()!r}; name exactly one column {' or '.join(accepted)}."
      )
    columns[kind] = found[0] if found else None
  reader = csv.reader(file, delimiter=delimiter)
  for row in reader:
    line = reader.line_num + 1
    if not any(cell.strip() for cell in row):
      continue
    values = {
      kind: row[column].strip() if column is not None and column < len(row) else ""
      for kind, column in columns.items()
    }
    split = "train" if columns["split"] is None else _SPLITS.get(values["split"].lower())
    if not (values["path"] and values["label"] and split):
      wrong = "path" if not values["path"] else "label" if not values["label"] else "split"
      raise UserError(
        f"--csv={path}, line {line}: the {wrong} is {values[wrong]!r}; give "
        f"{'train, validation or test' if wrong == 'split' else 'one, or remove the row'}."
      )
    yield line, os.path.normpath(values["path"]), values["label"], split
