"""All properties by name, and the program that checks them."""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from tools.conformance.properties.defaults import check_defaults
from tools.conformance.properties.gradients import (
  check_aggregation,
  check_normalization,
  check_weight_decay,
)
from tools.conformance.properties.network import check_network, check_resnet50
from tools.conformance.properties.result import Result
from tools.conformance.properties.schedule import check_schedule
from tools.conformance.properties.whole_step import check_step

# The check of each property; one check can give the results of several.
CHECKS: dict[str, Callable[..., list[Result]]] = {
  "paper defaults": check_defaults,
  "scaling rule": check_schedule,
  "warmup": check_schedule,
  "step decay": check_schedule,
  "momentum correction": check_schedule,
  "every image once": check_schedule,
  "reshuffled each epoch": check_schedule,
  "shared shuffle": check_schedule,
  "sample order": check_schedule,
  "weight decay": check_weight_decay,
  "aggregation": check_aggregation,
  "BN groups": check_normalization,
  "moving statistics": check_normalization,
  "whole step": check_step,
  "replicas identical": check_step,
  "network": check_network,
  "variables": check_network,
  "initial γ": check_network,
  "initial kernels": check_network,
  "ResNet-50 float64": check_resnet50,
  "ResNet-50 float32": check_resnet50,
}
# Take minutes, and so are checked on request only.
SLOW = ("ResNet-50 float64", "ResNet-50 float32")


def not_covered(network: str, decay: str, optimizer: str) -> dict[str, str]:
  """The properties that say nothing about a recipe with these fields, and why."""
  found = {}
  if network != "resnet50":
    names = ("network", "variables", "initial γ", "initial kernels", *SLOW)
    found |= dict.fromkeys(names, f"of ResNet-50, not of {network}")
  if decay != "steps":
    found["step decay"] = f"the decay is {decay}"
  if optimizer != "momentum_corrected_sgd":
    names = ("weight decay", "momentum correction", "whole step")
    found |= dict.fromkeys(names, f"of momentum_corrected_sgd, not of {optimizer}")
  return found


def verify(strategy, names: Collection[str] = ()) -> list[Result]:
  """Checks properties on the strategy; each deviation is the largest that any task found.

  Args:
    strategy: made by `make_strategy`.
    names: of the properties to check; if empty, all but the slow ones.
  """
  from tf_largebatch.distributed.collectives import make_gather

  names = set(names) or CHECKS.keys() - set(SLOW)
  results = []
  for check in dict.fromkeys(check for name, check in CHECKS.items() if name in names):
    results += [result for result in check(strategy) if result.name in names]
  gather = make_gather(strategy, lambda: np.array([result.deviation for result in results]))
  largest = gather().max(axis=0)  # NaN if one is.
  return [
    dataclasses.replace(result, deviation=float(value))
    for result, value in zip(results, largest, strict=True)
  ]
