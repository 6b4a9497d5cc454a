"""Parses contenders, and refuses what they cannot be."""

import pytest

from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tools.benchmark.contenders.contender import parse_contender

_RECIPE = Recipe(
  dataset="synthetic",
  image_size=224,
  workers=2,
  channel_mean=(0.0, 0.0, 0.0),
  channel_std=(1.0, 1.0, 1.0),
)


def test_a_contenders_options_go_where_they_belong():
  contender = parse_contender(
    "ours:workers=8:workers_per_pass=2:jit_compile=true:dtype=bfloat16:TF_X=0:tasks=4",
    _RECIPE.to_dict(),
    {"workers_per_pass": None, "bytes_per_pack": 0},
  )
  assert contender.kind == "ours" and contender.tasks == 4
  assert Recipe(**contender.recipe).workers == 8 and contender.recipe["dtype"] == "bfloat16"
  assert contender.recipe["image_size"] == 224 and contender.environment == {"TF_X": "0"}
  assert contender.step_options == {"workers_per_pass": 2, "bytes_per_pack": 0, "jit_compile": True}


@pytest.mark.parametrize(
  "text, culprit",
  [
    ("theirs", "theirs"),
    ("ours:speed=2", "speed=2"),
    ("ours:workers=0", "workers"),
    ("ours:dtype=int8", "int8"),
    ("ours:workers=8:tasks=3", "tasks=3"),
    ("ours:tasks=x", "tasks=x"),
    ("ours:cores=0", "cores=0"),
    ("ours:cores=10000", "cores=10000"),
    ("keras:dtype=float64", "float64"),
    ("keras:tasks=2", "only ours"),
    ("torch:network=resnet20", "resnet50"),
  ],
)
def test_bad_contenders_are_refused(text, culprit):
  with pytest.raises(UserError, match=culprit):
    parse_contender(text, _RECIPE.to_dict(), {})
