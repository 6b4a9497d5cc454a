"""The report of `tools.answers` in Markdown."""

from tools.studies import answers
from tools.studies.answers import BASELINE, SWEEP, Answer, Runs
from tools.studies.curves import format_points
from tools.studies.report import bold, describe_cost, tabulate
from tools.studies.verdicts import NOT_REPRODUCED, PENDING, REPRODUCED

_MENDS = {
  "why.2": "taking as many steps as kn = 128",
  "why.3": "another rate at the same epochs",
  "why.4": "another rate at these steps",
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
_NOT_YET = "No run yet: the claims and their tests are in [answers_claims.md](answers_claims.md)."


def to_markdown(runs: Runs, decided: list[Answer], pictures: dict[str, str]) -> str:
  """Returns the report; `pictures` maps a picture's name to its path, relative to the report."""
  results = [result for group in runs.groups.values() for result in group.results]
  d1 = [answer for answer in decided if answer.key.startswith("d1")]
  why = [answer for answer in decided if answer.key.startswith("why")]
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
    _tabulate(d1),
    _D1_AGAINST,
    "## (why) Why does it break there?",
    _answer_why(runs, why),
    *_picture(pictures, "why"),
    _tabulate(why),
    _WHY_AGAINST,
    "## (n) What does n do at the same kn?",
    _NOT_YET,
    "## (c) When is communication the bottleneck?",
    _NOT_YET,
  ]
  return "\n\n".join(blocks) + "\n"


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
  parts = []
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
  for start, wanted in (("What mends", REPRODUCED), ("What does not mend", NOT_REPRODUCED)):
    found = [words for key, words in _MENDS.items() if verdicts[key] == wanted]
    if found:
      parts.append(f"{start} kn = 1024: {', '.join(found)}.")
  pending = [words for key, words in _MENDS.items() if PENDING in verdicts[key]]
  if pending:
    parts.append(f"Not tried on all seeds yet: {', '.join(pending)}.")
  return " ".join(parts) or "No test could decide why kn = 1024 is worse."
