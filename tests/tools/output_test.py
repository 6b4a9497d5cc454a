"""Tests of `tools.output`."""

import pytest

from tf_largebatch.errors import UserError
from tools import output


def test_writes_the_file_that_the_flag_names(tmp_path):
  path = output.output_path("--json", str(tmp_path / "figures.json"))
  output.write_json("--json", path, {"a": [1.5]})
  assert path.read_text() == '{\n  "a": [\n    1.5\n  ]\n}\n'
  assert output.output_path("--json", None) is None
  assert output.output_path("--json", "") is None


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
  for path in (tmp_path, tmp_path / "missing" / "figures.json"):
    with pytest.raises(UserError, match=f"--json={path} cannot be written; name a file in"):
      output.output_path("--json", str(path))


def test_a_directory_that_disappears_is_a_user_error(tmp_path):
  path = output.output_path("--output", str(tmp_path / "figures.json"))
  tmp_path.rmdir()
  with pytest.raises(UserError, match=r"--output=.*figures\.json cannot be written \("):
    output.write_json("--output", path, {})


def test_lines_of_a_table():
  assert output.table_line("name", 6, ["a", 10], 4) == "name     a  10"
