"""A cluster and a step for the tests of the forecast."""

import dataclasses
import functools

import pytest

from tools.forecasting.model import Cluster, Step

CLOSE = functools.partial(pytest.approx, rel=1e-12, abs=1e-15)
B, LATENCY, BANDWIDTH = 3e6, 7e-5, 2e9
CLUSTER = Cluster(
  gpus_per_server=8,
  server_bandwidth=3e10,
  server_latency=4e-6,
  network_bandwidth=BANDWIDTH,
  network_latency=LATENCY,
  algorithm="ring",
)


def make_cluster(**values):
  return dataclasses.replace(CLUSTER, **values)


def make_step(**values):
  defaults = {"seconds": 0.3, "backward_seconds": 0.2, "images": 32, "layers": [(B, 0.25)] * 4}
  return Step(**{**defaults, "jitter": 0, "overlap": True, "bytes_per_pack": 1, **values})
