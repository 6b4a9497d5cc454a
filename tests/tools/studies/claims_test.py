"""The verdicts on made-up results."""

import itertools

import pytest

from tests.tools.studies.made_up_results import (
  DIVERGED,
  EPOCHS,
  GROUPS,
  KN,
  SCATTER,
  make_recipe,
  read,
  write_all,
  write_result,
)
from tools.studies import claims, verdicts


def _verdicts(root):
  return {claim.key: claim.verdict for claim in claims.decide(read(root))}


def _sweep(root, means, seeds=3):
  """Writes a sweep with these mean errors, the baseline first; returns the verdicts."""
  for i, mean in enumerate(means):
    for seed in range(seeds):
      stem = f"{KN}{16 * 2**i}"
      write_result(root, make_recipe(stem, seed=seed), stem, mean + SCATTER[seed])
  return _verdicts(root)


@pytest.mark.parametrize(
  "above, verdicts, ends",
  [
    # Errors minus the baseline's, in points; "|" separates those from 64 times the minibatch on.
    ("0 0 0 0 0 | 1 2 3", "reproduced, reproduced, reproduced", (512, 1024)),
    ("0 0 0 0 0 | 0 0 0", "reproduced, not reproduced, not decidable", (4096, None)),
    ("0 0 0 0 0 | 0 0 3", "reproduced, reproduced, not decidable", (2048, 4096)),
    ("0 0 0 0 0 | .5 2 3", "reproduced, reproduced, reproduced", (512, 2048)),
    ("0 0 .5 0 0 | 0 0 .5", "not decidable, not decidable, not decidable", (64, None)),
    ("0 0 0 0 1 | 0 2 3", "not reproduced, reproduced, not reproduced", (256, 512)),
    ("0 0 0 0 1 | 0 0 0", "not reproduced, not decidable, not reproduced", (256, 512)),
    ("0 0 0 0 -1 | 1 2 3", "not reproduced, reproduced, reproduced", (256, 1024)),
    ("0 0 0 0 0 | 2 1 3", "reproduced, reproduced, not reproduced", (512, 1024)),
    ("0 0 0 0 0 | 0 2 2.05", "reproduced, reproduced, not reproduced", (1024, 2048)),
  ],
)
def test_the_sweep_and_its_break(tmp_path, above, verdicts, ends):
  means = [0.1, *(0.1 + float(each) / 100 for each in above.replace("|", "").split())]
  found = _sweep(tmp_path, means)
  expected = verdicts.replace("decidable", "decidable at this scale").split(", ")
  assert [found[key] for key in ("d1", "d2", "d3")] == expected
  groups = read(tmp_path)
  largest, smallest = claims.find_break(list(groups.values()))
  assert (largest.kn, smallest and smallest.kn) == ends


def test_beyond_the_break_without_scatter_nothing_is_decided(tmp_path):
  ended = (f"{KN}2048", f"{KN}4096")
  write_all(tmp_path, {stem: group for stem, group in GROUPS.items() if stem not in ended})
  for stem, seed in itertools.product(ended, range(3)):
    write_result(tmp_path, make_recipe(stem, seed=seed), stem, 0.9)
  for seed in range(3):  # Equal to the baseline, so that the break comes after it.
    write_result(tmp_path, make_recipe(f"{KN}1024", seed=seed), f"{KN}1024", 0.1 + SCATTER[seed])
  assert _verdicts(tmp_path)["d3"] == verdicts.NOT_DECIDABLE


def test_what_is_missing_is_pending(tmp_path):
  found = _sweep(tmp_path, [0.1] * 6 + [0.12], seeds=3)
  assert found["a1"] == f"pending (runs: 3 of 5 of {KN}512, 3 of 5 of {KN}16)"
  assert found["a2"].startswith(f"pending (runs: 0 of 5 of {KN}512_none, 3 of 5")
  assert found["d1"] == "reproduced"
  assert found["d2"] == f"pending (runs: 0 of 3 of {KN}2048, 0 of 3 of {KN}4096)"
  assert found["f1"] == f"pending (runs: 0 of 3 of {KN}512_uncorrected)"
  assert found["e"] == "pending (runs: 0 of 1 of cifar10_resnet20_he)"


def test_a_diverged_run_counts_as_chance_and_has_no_matching_curve(tmp_path):
  write_all(tmp_path, GROUPS)
  assert _verdicts(tmp_path)["a5"] == "reproduced"
  stem = f"{KN}512"
  write_result(tmp_path, make_recipe(stem, seed=4), stem, 0.1, **DIVERGED)
  group = read(tmp_path)[stem]
  assert group.errors[4] == 0.9
  assert group.summary == "26.01 ± 35.77 % (5 seeds, 1 diverged, counted as 90 %)"
  found = _verdicts(tmp_path)
  assert found["a5"] == "not reproduced"
  assert found["a1"] == found["a2"] == "not decidable at this scale"


@pytest.mark.parametrize("since, verdict", [(6, "reproduced"), (7, "not reproduced")])
def test_training_curves_must_match_from_the_first_half_on(tmp_path, since, verdict):
  for stem, seed in itertools.product((f"{KN}16", f"{KN}512"), range(5)):
    apart = 0.02 * stem.endswith("512")
    curve = {str(e): 0.2 + apart * (e < since) for e in range(1, EPOCHS + 1)}
    write_result(
      tmp_path, make_recipe(stem, seed=seed), stem, 0.1 + SCATTER[seed], training_error=curve
    )
  assert _verdicts(tmp_path)["a5"] == verdict


@pytest.mark.parametrize(
  "error, verdict",
  [(0.0826, "reproduced"), (0.0925, "reproduced"), (0.0926, "not reproduced"), (0.0824, "not rep")],
)
def test_the_known_number(tmp_path, error, verdict):
  stem = "cifar10_resnet20_he"
  write_result(tmp_path, make_recipe(stem), stem, error, val_error_median_last_5=0.5)
  assert _verdicts(tmp_path)["e"].startswith(verdict)
