"""Forecasts the step from its parts, and compares with what was measured (docs/answers_claims.md).

A setting's figures are medians over its turns. The forecast is `tools.forecast`'s, with backprop
that hides what it can, from two measured figures: the step of the tasks without communication, and
the all-reduce of the same bytes in the same packs on the same links. A pack takes its share of the
all-reduce by bytes.
"""

import statistics

from tools.forecasting.layers import gradient_layers
from tools.forecasting.measurements import coefficient_of_variation
from tools.forecasting.model import Cluster, Step, forecast_gpus

LONGER = 0.1  # c.1: how much longer the step is at least where communication does not hide.
CLOSE = 0.2  # c.2: how far the forecast may be off.
NEEDED = 0.9  # Share of the settings in which a claim must hold.
_BACKWARD_SHARE = 2 / 3  # The default of `tools.forecast`.


def forecast(setting: dict, alone: float, reduce: float, jitter: float) -> dict:
  """The row of `forecast_gpus` for the setting's tasks.

  Args:
    setting: of the network and the packs.
    alone: seconds of the step without communication.
    reduce: seconds of the all-reduce alone.
    jitter: coefficient of variation of a task's steps.
  """
  tasks, size = setting["tasks"], setting["bytes"]
  step = Step(
    seconds=alone,
    backward_seconds=_BACKWARD_SHARE * alone,
    images=setting["per_worker_batch_size"],
    layers=_layers(setting["network"], setting["image_size"], size),
    jitter=jitter,
    overlap=True,
    bytes_per_pack=setting["bytes_per_pack"],
  )
  # The bandwidth at which a ring takes as long as was measured, however that time came about.
  bandwidth = 2 * (tasks - 1) * size / tasks / reduce if tasks > 1 else 1.0
  cluster = Cluster(
    gpus_per_server=1,
    server_bandwidth=1.0,
    server_latency=0.0,
    network_bandwidth=bandwidth,
    network_latency=0.0,
    algorithm="ring",
  )
  return forecast_gpus(step, cluster, [tasks], 1, 1.0)[0]


def _layers(network: str, image_size: int, size: float) -> list[tuple[float, float]]:
  """`gradient_layers` of so many bytes in all; a task that is alone reduces nothing."""
  return gradient_layers(network, image_size, size or None)


def judge(setting: dict) -> dict:
  """The figures and the verdicts of a setting, from the raw seconds of its turns."""
  turns = setting["turns"]
  each = [[second for task in turn["alone"] for second in task] for turn in turns]
  middles = [statistics.median(seconds) for seconds in each]
  alone = statistics.median(middles)
  # Drift of the machine's speed between turns does not count as jitter.
  steady = [s / middle for seconds, middle in zip(each, middles, strict=True) for s in seconds]
  jitter = coefficient_of_variation(steady)
  step = statistics.median(statistics.fmean(turn["step"]) for turn in turns)
  reduce = 0.0
  if setting["tasks"] > 1:
    reduce = statistics.median(statistics.fmean(turn["reduce"]) for turn in turns)
  row = forecast(setting, alone, reduce, jitter)
  longer, exposed = step / alone - 1, row["exposed_seconds"] / alone
  return {
    "alone_seconds": alone,
    "jitter": jitter,
    "reduce_seconds": reduce,
    "step_seconds": step,
    "forecast_seconds": row["iteration_seconds"],
    "exposed_seconds": row["exposed_seconds"],
    "hides": row["hidden"],
    "longer": longer,
    "error": row["iteration_seconds"] / step - 1,
    "c1": longer <= LONGER if row["hidden"] else longer >= LONGER,
    # The same if up to 10 % of the step may be exposed where communication "hides".
    "c1_by_tenth": longer <= LONGER if exposed <= LONGER else longer >= LONGER,
    "c2": abs(row["iteration_seconds"] / step - 1) <= CLOSE,
  }


def count_claims(settings: list[dict]) -> dict:
  """In how many settings each claim holds; a task that is alone sends nothing and does not count.

  Args:
    settings: judged.
  """
  judged = [setting["judged"] for setting in settings if setting["tasks"] > 1]
  claims = {}
  for name in ("c1", "c1_by_tenth", "c2"):
    right = sum(each[name] for each in judged)
    share = right / len(judged) if judged else None
    claims[name] = {"holds": right, "settings": len(judged), "share": share}
    claims[name]["enough"] = None if share is None else share >= NEEDED
  return claims
