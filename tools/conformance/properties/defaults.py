"""The defaults of `Recipe` are the paper's values."""

from tf_largebatch.recipe import Recipe
from tools.conformance.properties.result import Result

# Goyal et al. 2017, §5.1; §2.1 and §2.2 for η and the warmup.
PAPER = {
  "per_worker_batch_size": 32,
  "reference_learning_rate": 0.1,
  "reference_batch_size": 256,
  "learning_rate_scaling": "linear",
  "warmup": "gradual",
  "warmup_epochs": 5.0,
  "epochs": 90,
  "decay": "steps",
  "decay_epochs": (30.0, 60.0, 80.0),
  "decay_factor": 0.1,
  "optimizer": "momentum_corrected_sgd",
  "momentum": 0.9,
  "nesterov": True,
  "momentum_correction": True,
  "weight_decay": 1e-4,
  "label_smoothing": 0.0,
  "network": "resnet50",
  "last_gamma": 0.0,
  "batch_norm_momentum": 0.9,
  "batch_norm_epsilon": 1e-5,
}


def check_defaults(strategy) -> list[Result]:
  """Compares the defaults of `Recipe` with the paper's values."""
  del strategy
  differing = [name for name, value in PAPER.items() if getattr(Recipe(), name) != value]
  meaning = f"defaults that are not the paper's: {', '.join(differing) or 'none'}"
  return [Result("paper defaults", len(differing), 0, meaning)]
