"""Made-up result files for the tests."""

import json

from tf_largebatch.recipe import Recipe
from tools.studies import claims
from tools.studies.results import read_groups

KN = "fashion_mnist_kn"
SCATTER = (0.0, 0.001, -0.001, 0.0005, -0.0005)
_SMALL_SCATTER = (0.0, 0.0002, -0.0002, 0.0004, -0.0004)
# Made-up groups: stem → (warmup, correction, mean error, seeds).
GROUPS = {
  **{f"{KN}{16 * 2**i}": ("gradual", True, 0.100, 5) for i in range(6)},
  **{f"{KN}1024": ("gradual", True, 0.112, 3), f"{KN}2048": ("gradual", True, 0.130, 3)},
  **{f"{KN}4096": ("gradual", True, 0.160, 3), f"{KN}512_none": ("none", True, 0.110, 5)},
  f"{KN}512_constant": ("constant", True, 0.120, 5),
  f"{KN}512_uncorrected": ("gradual", False, 0.100, 3),
  f"{KN}512_constant_uncorrected": ("constant", False, 0.1215, 3),
}
EPOCHS = 12
DIVERGED = {
  "status": "diverged",
  "reason": "error: Training diverged at step 7.",
  **dict.fromkeys(("val_error", "val_error_median_last_5", "weights_sha256", "seconds")),
}


def make_recipe(stem, warmup="gradual", correction=True, seed=0):
  if not stem.startswith(KN):
    return Recipe(dataset="cifar10", network="resnet20", workers=4, seed=seed)
  return Recipe(
    dataset="fashion_mnist",
    network="resnet20",
    image_size=28,
    workers=int(stem.removeprefix(KN).split("_")[0]) // 16,
    per_worker_batch_size=16,
    epochs=EPOCHS,
    reference_batch_size=16,
    warmup=warmup,
    warmup_epochs=2,
    decay_epochs=(6.0, 9.0),
    momentum_correction=correction,
    seed=seed,
  )


def write_result(root, run, stem, error, study="table1", name=None, **changes):
  """Writes a run's result file as tools.study does; changes replace top-level fields."""
  early = {False: 1.0, True: 1.0 + run.global_batch_size / 1000}[run.warmup == "none"]
  curve = {e: error + 0.4 * early / e**2 - 0.4 / EPOCHS**2 for e in range(1, EPOCHS + 1)}
  data = {
    "study": study,
    "flagfile": f"flags/{stem}.flags",
    "seed": run.seed,
    "status": "complete",
    "recipe": run.to_dict(),
    "derived": {"train_examples": 60000},
    "versions": {"python": "3.11.7", "tensorflow": "2.21.0", "keras": "3.15.1"},
    "hardware": {"cpu": "AMD EPYC", "cores": 1},
    "training_error": {str(e): min(1.0, value * 0.7) for e, value in curve.items()},
    "validation_error": {str(e): min(1.0, value) for e, value in curve.items()},
    "val_error": error,
    "val_error_median_last_5": error,
    "seconds": 100.0,
    "weights_sha256": "0123456789abcdef" * 4,
    **changes,
  }
  path = root / study / (name or f"{stem}_seed{run.seed}.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(data))
  return path


def write_group(root, group, error, seeds=range(5, 10), kn=1024, **changes):
  """Writes the results of a study's group; changes may be functions of the seed."""
  for index, seed in enumerate(seeds):
    recipe = make_recipe(f"{KN}{kn}", seed=seed)
    fields = {name: f(seed) if callable(f) else f for name, f in changes.items()}
    error_of_seed = error + _SMALL_SCATTER[index]
    name = f"{group}_seed{seed}.json"
    write_result(root, recipe, f"{KN}{kn}", error_of_seed, "made", name, group=group, **fields)


def write_all(root, groups):
  for stem, (warmup, correction, error, seeds) in groups.items():
    for seed in range(seeds):
      write_result(root, make_recipe(stem, warmup, correction, seed), stem, error + SCATTER[seed])
  write_result(
    root, make_recipe("cifar10_resnet20_he"), "cifar10_resnet20_he", 0.0901, study="known"
  )
  return root


def read(root):
  return claims.arrange(read_groups(str(root)))
