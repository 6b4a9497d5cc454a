"""(c) of docs/answers_claims.md: when communication is the bottleneck, measured and forecast."""

import itertools
import json
import statistics

from tf_largebatch.errors import UserError, summary
from tools.benchmark.links.judgement import LONGER, count_claims, judge
from tools.forecasting.layers import gradient_layers, network_layers
from tools.forecasting.model import Cluster, Step, forecast_gpus
from tools.studies.answers import Answer
from tools.studies.verdicts import NOT_REPRODUCED, PENDING, REPRODUCED

# What docs/answers_claims.md counts.
_NETWORKS, _TASKS = ("resnet20", "resnet50"), (2, 4)
GIGABITS, DELAYS = (0.1, 1.0, 10.0), (0.0, 0.1, 1.0, 10.0)
_PACKS, _TURNS = 2, 5
_SETTINGS = len(_NETWORKS) * len(_TASKS) * len(GIGABITS) * len(DELAYS) * _PACKS

# The forecast: networks with their image sizes, and servers of 8 GPUs, each with this network.
NETWORKS = {"resnet20": 32, "resnet50": 224, "resnet152": 224}
NETWORK_GIGABITS = (10, 50, 400)
GPUS = (*(2**power for power in range(3, 14)), 10_000)
IMAGES = 32
# Of ResNet-50 and 32 images: Goyal et al. 2017 report 0.12 s of backprop (§4), which is assumed to
# be two thirds of the step. Other networks take as long per multiplication.
STEP_SECONDS, _BACKWARD_SHARE = 0.18, 2 / 3
SPEEDS = {"the paper's": 1, "ten times as fast": 10}
_OVERHEAD = 15 / 12.8  # Bits sent per bit of gradients (Goyal et al. 2017, §4).
SHARES = (0.01, LONGER)  # Of the step, exposed: from here on not hidden; a bottleneck.


def read(path: str) -> list[dict]:
  """Reads the settings of `tools.benchmark.slow_links` that have turns, and judges them.

  Returns:
    the settings; an empty list if the file does not exist.

  Raises:
    UserError: the file is damaged.
  """
  try:
    with open(path, encoding="utf-8") as file:
      settings = [each for each in json.load(file)["settings"] if each["turns"]]
    settings = [each | {"judged": judge(each)} for each in settings]
    return [each for each in settings if each["tasks"] > 1]
  except FileNotFoundError:
    return []
  except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
    raise UserError(
      f"{path} is not a file of tools.benchmark.slow_links ({summary(error)}); repair or remove it."
    ) from error


def decide(settings: list[dict]) -> list[Answer]:
  """Decides the claims of (c), in their order."""
  claims = count_claims(settings)
  there = sum(len(each["turns"]) >= _TURNS for each in settings)
  complete = there == len(settings) == _SETTINGS
  answers = []
  for key, claim in (
    ("c1", "the forecast says where the step is at most, and where at least, 10 % longer"),
    ("c2", "the forecast's step is within 20 % of the measured one"),
  ):
    verdict = REPRODUCED if claims[key]["enough"] else NOT_REPRODUCED
    if not complete:
      verdict = f"{PENDING} ({there} of {_SETTINGS} settings)"
    test = "in at least 90 % of the settings"
    seen = "<br>".join(_count(settings, key)) if settings else ""
    answers.append(Answer(f"c.{key[1]}", claim, seen, test, verdict))
  return answers


def _count(settings: list[dict], key: str) -> list[str]:
  """In how many settings a claim holds: in all, and by network and packs."""
  lines = [_share("all", [each["judged"][key] for each in settings])]
  for network, packed in itertools.product(_NETWORKS, (True, False)):
    found = [
      each["judged"][key]
      for each in settings
      if each["network"] == network and (each["bytes_per_pack"] > 0) == packed
    ]
    if found:
      lines.append(_share(f"{network}, {'packs' if packed else 'one pack'}", found))
  return lines


def _share(name: str, found: list[bool]) -> str:
  return f"{name}: {sum(found)} of {len(found)} ({sum(found) / len(found):.0%})"


def measured_rows(settings: list[dict]) -> list[list[str]]:
  """How much longer the step is than without communication, for a table.

  Each is [network, tasks, packs, and a cell for each of `GIGABITS` and `DELAYS`].
  """
  cells: dict[tuple, dict] = {}
  for each in settings:
    packs = "during backprop" if each["bytes_per_pack"] else "after"
    row = cells.setdefault((each["network"], str(each["tasks"]), packs), {})
    row[each["gigabits"], each["delay_ms"]] = f"{100 * each['judged']['longer']:+.0f}"
  links = list(itertools.product(GIGABITS, DELAYS))
  return [[*names, *(row.get(link, "–") for link in links)] for names, row in cells.items()]


def forecast_step(network: str, speed: float) -> Step:
  """The assumed step of a GPU."""
  work, unit = (
    sum(cost for _, cost in network_layers(*each))
    for each in ((network, NETWORKS[network]), ("resnet50", NETWORKS["resnet50"]))
  )
  seconds = STEP_SECONDS * work / unit / speed
  return Step(
    seconds=seconds,
    backward_seconds=_BACKWARD_SHARE * seconds,
    images=IMAGES,
    layers=gradient_layers(network, NETWORKS[network], None),
    jitter=0.0,
    overlap=True,
    bytes_per_pack=2**24,  # As in a run.
  )


def exposed_shares(network: str, speed: float, gigabits: float) -> list[float]:
  """The share of the step that waits for communication, for each of `GPUS`.

  The cluster is that of the defaults of `tools.forecast`.
  """
  step = forecast_step(network, speed)
  cluster = Cluster(
    gpus_per_server=8,
    server_bandwidth=20e9,
    server_latency=1e-5,
    network_bandwidth=gigabits * 1e9 / 8 / _OVERHEAD,
    network_latency=5e-5,
    algorithm="auto",
  )
  rows = forecast_gpus(step, cluster, list(GPUS), 1.0, _OVERHEAD)
  return [row["exposed_seconds"] / step.seconds for row in rows]


def first_kn(shares: list[float], limit: float) -> int | None:
  """The smallest kn at which more than this share of the step is exposed; None if there is none."""
  counts = (gpus for gpus, share in zip(GPUS, shares, strict=True) if share > limit)
  first = next(counts, None)
  return first and first * IMAGES


def forecast_rows() -> list[list[str]]:
  """The kn from which on communication shows, for a table.

  Each is [network, GPU, step in ms, and for each of `NETWORK_GIGABITS` the kn of `SHARES`].
  """
  rows = []
  for network, (name, speed) in itertools.product(NETWORKS, SPEEDS.items()):
    row = [network, name, f"{1e3 * forecast_step(network, speed).seconds:.3g}"]
    for gigabits in NETWORK_GIGABITS:
      shares = exposed_shares(network, speed, gigabits)
      row.append(" / ".join(f"{first_kn(shares, limit) or '–'}" for limit in SHARES))
    rows.append(row)
  return rows


def _lengthens(judged: dict) -> float:
  """The share of the all-reduce's time by which the step is longer: what does not hide."""
  return (judged["step_seconds"] - judged["alone_seconds"]) / judged["reduce_seconds"]


def describe(settings: list[dict]) -> str:
  """The answer in a few sentences, or what is known so far."""
  if not settings:
    return "The measurement has not run yet; the forecast below rests on the model alone."
  parts = []
  for network in _NETWORKS:
    # With packs that travel during backprop, as a run sends them.
    found = [e for e in settings if e["network"] == network and e["bytes_per_pack"]]
    if found:
      short = [each for each in found if each["judged"]["longer"] <= LONGER]
      kept = ", ".join(f"{each:g}" for each in sorted({e["gigabits"] for e in short}))
      where = f" (on links of {kept} Gbit/s)" if kept else ""
      parts.append(
        f"{network}'s step is at most 10 % longer than without communication in {len(short)} of "
        f"{len(found)} settings{where}."
      )
  shares = {
    packed: [_lengthens(e["judged"]) for e in settings if (e["bytes_per_pack"] > 0) == packed]
    for packed in (True, False)
  }
  if all(shares.values()):
    during, after = (f"{statistics.median(shares[packed]):.0%}" for packed in (True, False))
    parts.append(
      f"The all-reduce lengthens the step by {during} of its own time (median) if packs travel "
      f"during backprop, and by {after} if one follows it."
    )
  errors = [abs(each["judged"]["error"]) for each in settings]
  parts.append(f"The forecast's median error is {statistics.median(errors):.0%}.")
  return " ".join(parts)
