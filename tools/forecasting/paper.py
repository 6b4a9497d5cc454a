"""The model against what Goyal et al. 2017 report of their own cluster."""

import dataclasses

from tools.forecasting.allreduce import halving_doubling, ring
from tools.forecasting.layers import gradient_layers
from tools.forecasting.model import Cluster, Step, expected_maximum, needed_gigabits

# The paper's inputs (§4): seconds of backprop, bytes of gradients, n, bits sent per bit.
_BACKWARD, _SIZE, _IMAGES, _OVERHEAD = 0.120, 100e6, 32, 15 / 12.8


def compare_with_paper(cluster: Cluster, share: float) -> list[dict]:
  """Returns a row for each figure of the paper.

  The inputs are the paper's: 120 ms of backprop, 100 MB of gradients sent layer by layer, n = 32,
  8 GPUs per server, halving/doubling between servers at 50 Gbit/s, 15 bits sent for 12.8. The model
  also assumes that a layer's share of backprop is its share of the multiplications. For the last
  rows a jitter is fitted, unless communication alone grows by more than the paper's 12 %.

  Args:
    cluster: its latencies, and the bandwidth within a server, are assumptions.
    share: assumed share of backprop in a step.
  """
  cluster = dataclasses.replace(
    cluster,
    gpus_per_server=8,
    network_bandwidth=50e9 / 8 / _OVERHEAD,
    algorithm="halving_doubling",
  )
  step = Step(
    seconds=_BACKWARD / share,
    backward_seconds=_BACKWARD,
    images=_IMAGES,
    layers=gradient_layers("resnet50", 224, _SIZE),
    jitter=0.0,
    overlap=True,
    bytes_per_pack=1,  # Each layer's gradients leave as soon as they are ready.
  )
  rows = _compare_network(step, cluster)
  rows += _compare_scaling(step, cluster, "nothing fitted")
  exposed = dataclasses.replace(step, overlap=False)
  rows += _compare_scaling(exposed, cluster, "nothing fitted, nothing hidden")
  # The growth is linear in the jitter, and a single server has no other to wait for.
  lacking = 1.12 * step.iteration(cluster, 8) - step.iteration(cluster, 352)
  if lacking > 0:
    jitter = lacking / step.seconds / expected_maximum(44)
    fitted = dataclasses.replace(step, jitter=jitter)
    last = _compare_scaling(fitted, cluster, f"jitter of {jitter:.4f} fitted to the growth")
    last[0]["relative_error"] = "fitted"
    rows += last
  return rows


def _row(what: str, predicted: float | None, paper: float) -> dict:
  error = None if predicted is None else predicted / paper - 1
  return {"what": what, "predicted": predicted, "paper": paper, "relative_error": error}


def _compare_network(step: Step, cluster: Cluster) -> list[dict]:
  peak = 2 * _SIZE * 8 / _BACKWARD / 1e9
  needed = needed_gigabits(step, cluster, 256, _OVERHEAD)
  link = (32, cluster.network_latency, cluster.network_bandwidth)
  rings, halvings = (sum(f(b, *link) for b, _ in step.layers) for f in (ring, halving_doubling))
  return [
    _row("peak Gbit/s: all bytes twice in backprop's time", peak, 12.8),
    _row("network Gbit/s at which the model hides 99 %, 256 GPUs", needed, 15),
    _row("ring's seconds / halving/doubling's, 32 servers", rings / halvings, 3),
  ]


def _compare_scaling(step: Step, cluster: Cluster, kind: str) -> list[dict]:
  base, at_256, at_352 = (step.iteration(cluster, gpus) for gpus in (8, 256, 352))
  hours = 90 * 1_281_167 / 256 / _IMAGES * at_256 / 3600
  return [
    _row(f"{kind}: growth from 8 to 352 GPUs, %", 100 * (at_352 / base - 1), 12),
    _row(f"{kind}: efficiency at 256 GPUs, %", 100 * base / at_256, 90),
    _row(f"{kind}: hours of 90 epochs at 256 GPUs", hours, 1),
  ]
