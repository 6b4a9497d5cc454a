"""The JSON file of a benchmark, and the lines of its table."""

import json

import pytest

from tf_largebatch.errors import UserError
from tools.benchmark import output


def test_the_file_is_written_whole(tmp_path):
  path = output.json_path(str(tmp_path / "report.json"))
  output.write_json(path, {"a": [1, 2.5]})
  assert json.loads(path.read_text()) == {"a": [1, 2.5]}
  assert list(tmp_path.iterdir()) == [path]
  assert output.json_path(None) is None and output.json_path("") is None


@pytest.mark.parametrize("name", ["", "no/report.json"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name):
  with pytest.raises(UserError, match=rf"^--json={tmp_path}.* cannot be written; name a file in"):
    output.json_path(f"{tmp_path}/{name}")


def test_a_directory_that_is_gone_when_the_file_is_written(tmp_path):
  (tmp_path / "directory").mkdir()
  path = output.json_path(str(tmp_path / "directory" / "report.json"))
  (tmp_path / "directory").rmdir()
  with pytest.raises(UserError, match=rf"^--json={path} cannot be written \("):
    output.write_json(path, {})


def test_lines_of_a_table():
  assert output.table_line("name", 6, ["a", 10], 4) == "name     a  10"
