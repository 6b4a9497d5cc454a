"""Large-minibatch SGD for TensorFlow and Keras 3 (Goyal et al. 2017, arXiv 1706.02677).

The names below are imported on first use, so that `Recipe` and `RunOptions` need no TensorFlow.
"""

import importlib

_MODULES = {
  "LARS": "optim.lars",
  "LinearScalingSchedule": "optim.schedule",
  "MomentumCorrectedSGD": "optim.sgd",
  "PerWorkerBatchNormalization": "models.normalization",
  "Recipe": "recipe",
  "RunOptions": "options",
  "evaluate": "training.fit",
  "fit": "training.fit",
  "make_strategy": "distributed.strategy",
  "per_worker_batch_normalization": "models.conversion",
  "read_cluster": "distributed.cluster",
  "train_and_evaluate": "training.trainer",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
