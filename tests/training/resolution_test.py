"""The fields that a recipe leaves open, and recipes that do not fit the data or the replicas."""

import dataclasses

import pytest

from tests.training.small_runs import RECIPE, train
from tf_largebatch.errors import UserError
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import resolution


def test_resolve_chooses_the_fields_that_are_none():
  minimal = Recipe(dataset="synthetic", epochs=2, warmup_epochs=1, decay_epochs=())
  resolved = resolution.resolve(minimal, 8, "")
  assert resolved.workers == 8
  assert resolved.validation_split == "validation"
  assert resolved.image_size == 224 and resolved.augmentation == "area_crop"
  with pytest.raises(UserError, match=r"1 values.*3 channels"):
    resolution.resolve(dataclasses.replace(minimal, channel_mean=(1.0,)), 8, "")


@pytest.mark.parametrize(
  "workers, replicas, suggestion", [(3, 2, "2 or 4"), (1, 4, "such as 4"), (33, 8, "32 or 40")]
)
def test_workers_that_the_replicas_do_not_divide_are_refused(workers, replicas, suggestion):
  with pytest.raises(UserError) as error:
    resolution.resolve(dataclasses.replace(RECIPE, workers=workers), replicas, "")
  assert f"workers={workers}" in str(error.value) and suggestion in str(error.value)


def test_a_minibatch_larger_than_the_data_is_refused(tmp_path):
  with pytest.raises(UserError, match="4000 images is more than the 70"):
    train(tmp_path, dataclasses.replace(RECIPE, workers=400))
