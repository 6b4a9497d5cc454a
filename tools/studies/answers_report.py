"""The report of `tools.answers` in Markdown."""

import dataclasses
import itertools
import statistics

from tools.studies import answers, answers_c, answers_n
from tools.studies.answers import BASELINE, SWEEP, Answer, Runs
from tools.studies.bn_results import KINDS
from tools.studies.curves import format_points
from tools.studies.report import bold, describe_cost, tabulate
from tools.studies.verdicts import NOT_DECIDABLE, NOT_REPRODUCED, PENDING, REPRODUCED

_MENDS = {
  "why.2": "taking as many steps as kn = 128",
  "why.3": "another rate at the same epochs",
  "why.4": "another rate and as many steps as kn = 128 takes",
  "why.5": "a longer warmup",
  "why.6": "leaving out momentum",
}
_D1_AGAINST = (
  "**What speaks against it.** One small network on one small data set. "
  "Five seeds decide differences of about a point; whether a run of kn = 1024 ends at 14 % or at "
  "90 % is chance. The rate, the number of epochs and the length of the warmup were chosen for the "
  "earlier replication with kn = 16 and 512."
)
_WHY_AGAINST = (
  "**What speaks against it.** B grows by orders of magnitude within a run, so whether the break "
  "lies near it depends on the epochs; the claim fixed them before the runs. The bound is that of "
  "a quadratic, and the loss is none."
)
_N_AGAINST = (
  "**What speaks against it.** At the same kn, a smaller n also means noisier normalisation of a "
  "network with few layers; deeper ones may react otherwise. The rate is that of n = 16. At "
  "kn = 128 and n = 128 there is one worker, at kn = 512 and n = 2 there are 256."
)
_C_AGAINST = (
  "**What speaks against it.** Links between namespaces of one machine are neither Ethernet nor "
  "InfiniBand, and the tasks share two cores with what carries their packets. The forecast for "
  "GPUs rests on the model, assumed latencies and an assumed step: no GPU was measured. Each task "
  "had one inter-op thread, with which TensorFlow runs no all-reduce during backprop; "
  "[benchmarks.md](benchmarks.md) has figures with more. `tools.launch_local` now gives two."
)
_C_FORECAST = (
  f"Forecast for servers of 8 GPUs with {answers_c.IMAGES} images each: the kn at which more than "
  "1 % / more than 10 % of the step waits for communication, up to 10 000 GPUs (kn = "
  f"{answers_c.IMAGES * answers_c.GPUS[-1]}; –: not up to there), by the Gbit/s of a server's "
  "network. The paper's GPU is taken to need "
  f"{answers_c.STEP_SECONDS:g} s for ResNet-50; the other steps follow from the multiplications, "
  "and the rest is as in `tools.forecast` by default with `--overlap=backprop`."
)


_NOT_RUN = """## What was not run

- Which recipe goes furthest without loss: a longer warmup, polynomial decay, LARS, or a kn that
  grows instead of a rate that decays.
- The momentum correction where the rate changes suddenly, or with a momentum of 0.95 and 0.98.
- He et al.'s error on CIFAR-10 with five seeds.
- Any of this on a larger network or data set."""


@dataclasses.dataclass(frozen=True)
class Found:
  """All that the report shows: results, and what was decided from them."""

  runs: Runs
  statistics: answers_n.Statistics
  links: list[dict]
  decided: list[Answer]

  def about(self, question: str) -> list[Answer]:
    """The claims of d1, why, n or c."""
    return [answer for answer in self.decided if answer.key.startswith(f"{question}.")]


def to_markdown(found: Found, pictures: dict[str, str]) -> str:
  """Returns the report; `pictures` maps a picture's name to its path, relative to the report."""
  runs = found.runs
  results = [result for group in runs.groups.values() for result in group.results]
  blocks = [
    "# The reader's three questions, answered",
    "Claims, tests and margins were stated before the first run: "
    "[answers_claims.md](answers_claims.md). Errors are in % for each seed, sorted. `python -m "
    "tools.answers` writes this page from the committed results.",
    describe_cost(results),
    "## (d1) Up to which minibatch does linear scaling hold?",
    _answer_d1(runs),
    *_picture(pictures, "d1"),
    "Epochs in which some seed sees no gradient above the noise are left out on the right.",
    _tabulate(found.about("d1")),
    _D1_AGAINST,
    "## (why) Why does it break there?",
    _answer_why(runs, found.about("why")),
    *_picture(pictures, "why"),
    _tabulate(found.about("why")),
    _WHY_AGAINST,
    *_about_n(found, pictures),
    *_about_links(found, pictures),
    _NOT_RUN,
  ]
  return "\n\n".join(blocks) + "\n"


def _about_n(found: Found, pictures: dict[str, str]) -> list[str]:
  head = ["kn", "n", "k", "error of a run", *(f"final weights, {kind}" for kind in KINDS)]
  return [
    "## (n) What does n do at the same kn?",
    answers_n.describe(found.runs, found.statistics),
    *_picture(pictures, "n"),
    _tabulate(found.about("n")),
    "Medians over the seeds, in %:",
    tabulate(head, answers_n.rows(found.runs, found.statistics)),
    _N_AGAINST,
  ]


def _about_links(found: Found, pictures: dict[str, str]) -> list[str]:
  links = itertools.product(answers_c.GIGABITS, answers_c.DELAYS)
  head = ["network", "tasks", "packs", *(f"{rate:g} Gbit/s, {delay:g} ms" for rate, delay in links)]
  measured = [
    "How much longer the step is than without communication, in %, by the rate and the delay of "
    "the links (`python -m tools.benchmark.slow_links`):",
    tabulate(head, answers_c.measured_rows(found.links)),
  ]
  head = ["network", "GPU", "step, ms", *(f"{rate} Gbit/s" for rate in answers_c.NETWORK_GIGABITS)]
  return [
    "## (c) When is communication the bottleneck?",
    answers_c.describe(found.links),
    *_picture(pictures, "c"),
    _tabulate(found.about("c")),
    *(measured if found.links else []),
    _C_FORECAST,
    tabulate(head, answers_c.forecast_rows()),
    _C_AGAINST,
  ]


def _picture(pictures: dict[str, str], name: str) -> list[str]:
  return [f"![{name}]({pictures[name]})"] if name in pictures else []


def _tabulate(decided: list[Answer]) -> str:
  rows = [[f"**{a.key}** {a.claim}", a.seen, a.test, bold(a.verdict)] for a in decided]
  return tabulate(["claim", "seen", "test", "verdict"], rows)


def _answer_d1(runs: Runs) -> str:
  """The answer in two sentences."""
  if runs.missing(SWEEP.values()):
    return "Runs are missing."
  largest, where = runs.largest_equal(), runs.find_break()
  times = largest // 16
  first = (
    f"Up to kn = {largest}, {times} times the baseline's minibatch, every run ends within "
    f"{_spread(runs, largest)} points of the baseline's median."
  )
  if largest == 16:
    first = "Not even twice the baseline's minibatch can be called equal to it."
  second = "We saw no break up to kn = 2048."
  if where:
    second = f"From kn = {where} on it is worse ({answers.failed_share(runs)} failed)."
  return f"{first} {second}"


def _spread(runs: Runs, largest: int) -> str:
  """The largest distance of an error up to this kn from the baseline's median, in points."""
  errors = sorted(runs.errors(BASELINE))
  median = errors[len(errors) // 2]
  found = [abs(e - median) for kn, s in SWEEP.items() if kn <= largest for e in runs.errors(s)]
  return format_points(max(found))


def _share_above(ratios: list[float]) -> str:
  return f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"


def _answer_why(runs: Runs, decided: list[Answer]) -> str:
  """The answer in a few sentences, or what is known so far."""
  verdicts = {answer.key: answer.verdict for answer in decided}
  parts = _medians(runs)
  for start, wanted in (
    ("What mends kn = 1024", REPRODUCED),
    ("What does not mend it", NOT_REPRODUCED),
    ("What cannot be decided at this scale", NOT_DECIDABLE),
  ):
    found = [words for key, words in _MENDS.items() if verdicts[key] == wanted]
    if found:
      parts.append(f"{start}: {', '.join(found)}.")
  pending = [words for key, words in _MENDS.items() if PENDING in verdicts[key]]
  if pending:
    parts.append(f"Not tried on all seeds yet: {', '.join(pending)}.")
  if PENDING not in verdicts["why.7"]:
    small, large = (_share_above(ratios) for _, ratios in sorted(answers.over_bound(runs).items()))
    parts.append(
      "At the end of the warmup, the largest eigenvalue is above the bound of stability in "
      f"{large} runs of kn = 2048, which break, and in {small} of kn = 128, which do not."
    )
  if verdicts["why.1"] == NOT_REPRODUCED:
    parts.append("The noise scale late in training does not tell where the break is.")
  elif verdicts["why.1"] == REPRODUCED:
    parts.append("The break lies where the noise scale late in training says.")
  return " ".join(parts)


def _medians(runs: Runs) -> list[str]:
  """A sentence that compares the medians of what was tried at kn = 1024, where all seeds ran."""
  tried = {
    "with the best rate": runs.best(answers.RATES),
    "with the steps of kn = 128": answers.SAME_STEPS,
    "with both": runs.best(answers.STEPS_RATES),
    "with the better of the longer warmups": runs.best(answers.WARMUPS),
    "without momentum": answers.NO_MOMENTUM[1024],
  }
  found = [
    f"{_median(runs, stem)} % {how}"
    for how, stem in tried.items()
    if stem and not runs.missing([stem])
  ]
  if not found or runs.missing([BASELINE, SWEEP[1024]]):
    return []
  return [
    f"The median error of kn = 1024 is {_median(runs, SWEEP[1024])} %; it is {', '.join(found)}, "
    f"and that of the baseline is {_median(runs, BASELINE)} %."
  ]


def _median(runs: Runs, stem: str) -> str:
  return format_points(statistics.median(runs.errors(stem)))
