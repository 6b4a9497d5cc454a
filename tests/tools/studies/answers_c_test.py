"""The claims about communication, on made-up measurements, and the forecast for many GPUs."""

import itertools
import json

import pytest

from tests.launching import run_module
from tf_largebatch.errors import UserError
from tools.studies import answers_c
from tools.studies.verdicts import NOT_REPRODUCED, REPRODUCED


def _turn(step, reduce=0.5):
  return {"alone": [[1.0, 1.0], [1.0, 1.0]], "step": [step], "reduce": [reduce]}


def _write(root, wrong, turns=5, tasks=(1, 2, 4), packed=0.0):
  """Writes all settings; in so many of them, the step is not the forecast's 1.5 s but 1.05 s.

  Where packs travel during backprop, it is `packed` seconds longer.
  """
  settings = []
  choices = itertools.product(
    ("resnet20", "resnet50"), tasks, (0.1, 1, 10), (0, 0.1, 1, 10), (1, 0)
  )
  for network, count, gigabits, delay, pack in choices:
    step = 1.5 if count == 1 or len(settings) >= wrong else 1.05
    step += pack * packed
    settings.append(
      {
        **{"network": network, "image_size": 32, "per_worker_batch_size": 8, "tasks": count},
        **{"gigabits": gigabits, "delay_ms": delay, "bytes_per_pack": pack * 2**40, "bytes": 1e6},
        "turns": [_turn(step)] * turns,
      }
    )
  path = root / "communication.json"
  path.write_text(json.dumps({"settings": settings}))
  return str(path)


@pytest.mark.parametrize(
  "wrong, verdict, share",
  [(9, REPRODUCED, "87 of 96 (91%)"), (10, NOT_REPRODUCED, "86 of 96 (90%)")],
)
def test_claims_hold_in_nine_of_ten_settings(tmp_path, wrong, verdict, share):
  settings = answers_c.read(_write(tmp_path, wrong, tasks=(2, 4)))
  assert len(settings) == 96  # 86.4 of them are 90 %.
  answers = answers_c.decide(settings)
  assert [each.key for each in answers] == ["c.1", "c.2"]
  assert [each.verdict for each in answers] == [verdict] * 2
  assert all(f"all: {share}" in each.seen for each in answers)


def test_one_task_does_not_count_and_missing_turns_do(tmp_path):
  assert len(answers_c.read(_write(tmp_path, 0))) == 96
  for changes, there in (({"turns": 4}, 0), ({"tasks": (2,)}, 48)):
    answers = answers_c.decide(answers_c.read(_write(tmp_path, 0, **changes)))
    assert [each.verdict for each in answers] == [f"pending ({there} of 96 settings)"] * 2
  assert answers_c.read(str(tmp_path / "missing.json")) == []
  assert answers_c.decide([])[0].verdict == "pending (0 of 96 settings)"


def test_the_table_and_the_answer(tmp_path):
  settings = answers_c.read(_write(tmp_path, 3, tasks=(2, 4)))
  rows = answers_c.measured_rows(settings)
  assert len(rows) == 8
  assert rows[0] == ["resnet20", "2", "during backprop", "+5", "+5", *["+50"] * 10]
  assert rows[1] == ["resnet20", "2", "after", "+5", *["+50"] * 11]
  text = answers_c.describe(settings)
  assert "resnet20's step is at most 10 % longer than without communication in 2 of 24" in text
  assert "(on links of 0.1 Gbit/s)" in text


def test_the_answer_says_how_much_of_the_all_reduce_shows(tmp_path):
  # 0.25 s and 0.5 s longer than the step alone, beside an all-reduce of 0.5 s.
  text = answers_c.describe(answers_c.read(_write(tmp_path, 0, tasks=(2, 4), packed=-0.25)))
  assert "by 50% of its own time (median) if packs travel during backprop, and by 100% if" in text


@pytest.mark.parametrize("network, speed, gigabits", [("resnet50", 1, 50), ("resnet152", 10, 400)])
def test_the_forecast_is_that_of_the_program(network, speed, gigabits):
  seconds = answers_c.forecast_step(network, speed).seconds
  multiplications = {"resnet50": 4089184256, "resnet152": 11513626624}  # An image's, at 224 × 224.
  ratio = multiplications[network] / multiplications["resnet50"]
  assert seconds == pytest.approx(0.18 * ratio / speed, rel=1e-12)
  process = run_module(
    "tools.forecast",
    "--json",
    f"--network={network}",
    f"--step_seconds={seconds!r}",
    "--overlap=backprop",
    f"--network_gigabits={gigabits}",
    f"--gpus={','.join(map(str, answers_c.GPUS))}",
  )
  rows = json.loads(process.stdout)["rows"]
  shares = answers_c.exposed_shares(network, speed, gigabits)
  assert shares == pytest.approx([row["exposed_seconds"] / seconds for row in rows], rel=1e-12)
  kn = answers_c.first_kn(shares, 0.01)
  hidden = [row["gpus"] for row in rows if row["hidden"]]
  assert kn == 32 * min(set(answers_c.GPUS) - set(hidden))


def test_where_communication_shows():
  shares = [0.0, 0.01, 0.011, *[0.2] * (len(answers_c.GPUS) - 3)]
  assert (answers_c.first_kn(shares, 0.01), answers_c.first_kn(shares, 0.1)) == (32 * 32, 32 * 64)
  assert answers_c.first_kn([0.0] * len(answers_c.GPUS), 0.01) is None


@pytest.mark.parametrize("content", ["[", "{}", '{"settings": [{"turns": [{}], "tasks": 2}]}'])
def test_a_damaged_file_is_refused(tmp_path, content):
  path = tmp_path / "communication.json"
  path.write_text(content)
  with pytest.raises(UserError, match=r"is not a file of tools\.benchmark\.slow_links"):
    answers_c.read(str(path))
