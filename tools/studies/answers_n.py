"""(n) of docs/answers_claims.md: what n does, decided from the results of its runs."""

import statistics

from tf_largebatch.errors import UserError
from tools.studies import bn_results, rank_tests
from tools.studies.answers import SEEDS, SWEEP, Answer, Runs, combine
from tools.studies.curves import format_points
from tools.studies.results import CHANCE
from tools.studies.verdicts import NOT_DECIDABLE, NOT_REPRODUCED, PENDING, REPRODUCED

SIZES = (2, 4, 8, 16, 32, 64, 128)
KNS = (128, 512)
_MIDDLE = SIZES[1:-1]  # Among which n.1 looks for the best.


def stem(kn: int, n: int) -> str:
  """The group of these runs; those of n = 16 belong to (d1)."""
  return SWEEP[kn] if n == 16 else f"kn{kn}_n{n}"


# Of n.3, by kn: k = 8 with the scaled rate, without, and n = 16 with the same kn.
FIXED_K = {
  32: ("k8_n4", "k8_n4_unscaled", SWEEP[32]),
  512: (stem(512, 64), "k8_n64_unscaled", SWEEP[512]),
}


class Statistics:
  """The errors of the final weights by kind of batch statistics."""

  def __init__(self, runs: Runs, path: str):
    """Reads the file of `tools.bn_statistics`, which may be missing.

    Raises:
      UserError: it is damaged, or holds other weights than a run's.
    """
    known = bn_results.read(path, "repair or remove it")
    self._errors = {}
    for group in {stem(kn, n) for kn in KNS for n in SIZES}:
      for result in runs.results(group):
        entry = known.get(f"{group}_seed{result.seed}")
        if result.diverged:  # It has no final weights.
          self._errors[group, result.seed] = dict.fromkeys(bn_results.KINDS, CHANCE)
        elif entry:
          if not entry["weights_sha256"].startswith(result.weights_sha256):
            raise UserError(
              f"{path}: {group}_seed{result.seed} has other weights than {result.run.path}; "
              "measure it again with tools.bn_statistics."
            )
          errors = {kind: entry[kind]["error"] for kind in bn_results.KINDS}
          self._errors[group, result.seed] = errors

  def errors(self, group: str, kind: str) -> list[float]:
    """The errors that are there, by seed."""
    found = (self._errors.get((group, seed)) for seed in SEEDS)
    return [each[kind] for each in found if each]


def decide(runs: Runs, found: Statistics) -> list[Answer]:
  """Decides all claims of (n), in their order."""
  return [_decide_u(runs), _decide_recomputed(found), _decide_fixed_k(runs)]


def best_size(runs: Runs, kn: int) -> int:
  """The n of 4 to 64 whose median error is the lowest."""
  return min(_MIDDLE, key=lambda n: statistics.median(runs.errors(stem(kn, n))))


def _decide_u(runs: Runs) -> Answer:
  claim = "at kn = 128, n = 2 and n = 128 are worse than the best n between"
  verdict, test = (
    runs.missing([stem(128, n) for n in SIZES]),
    "worse(n = 2, best), worse(128, best)",
  )
  if not verdict:
    best = best_size(runs, 128)
    pairs = [(runs.errors(stem(128, n)), runs.errors(stem(128, best))) for n in (2, 128)]
    verdict = combine([rank_tests.worse(*pair) for pair in pairs])
    p = ", ".join(f"{rank_tests.p_worse(*pair):.3f}" for pair in pairs)
    test = f"worse(n2, n{best}), worse(n128, n{best}): p = {p}"
  seen = [f"n = {n}: {runs.describe(stem(128, n))}" for n in SIZES if runs.errors(stem(128, n))]
  return Answer("n.1", claim, "<br>".join(seen), test, verdict)


def _decide_recomputed(found: Statistics) -> Answer:
  claim = "at n = 2, recomputed statistics err less than running ones"
  kinds = ("running", "recomputed")
  errors = {kn: [found.errors(stem(kn, 2), kind) for kind in kinds] for kn in KNS}
  there = sum(len(running) for running, _ in errors.values())
  needed = len(KNS) * len(SEEDS)
  verdict = f"{PENDING} ({there} of {needed} runs)"
  if there == needed:
    above = [sum(r > p for r, p in zip(*each, strict=True)) for each in errors.values()]
    outcomes = {0: NOT_REPRODUCED, len(SEEDS): REPRODUCED}
    verdict = combine([outcomes.get(count, NOT_DECIDABLE) for count in above])
  seen = [
    f"kn = {kn}, {kind}: {', '.join(map(format_points, each))}"
    for kn, both in errors.items()
    for kind, each in zip(kinds, both, strict=True)
    if each
  ]
  return Answer(
    "n.2", claim, "<br>".join(seen), "in all 5 seeds (p = 1/32), for kn = 128 and 512", verdict
  )


def _decide_fixed_k(runs: Runs) -> Answer:
  claim = "k = 8 and n = 4, 64: as n = 16 at the same kn if the rate is scaled with kn, else worse"
  groups = [group for each in FIXED_K.values() for group in each]
  verdict, test = runs.missing(groups), "equal(scaled, n16) and worse(unscaled, n16), for both n"
  if not verdict:
    verdicts, p = [], []
    for scaled, unscaled, usual in FIXED_K.values():
      pairs = [(runs.errors(each), runs.errors(usual)) for each in (scaled, unscaled)]
      verdicts += [rank_tests.equal(*pairs[0]), rank_tests.worse(*pairs[1])]
      p += [rank_tests.p_equal(*pairs[0]), rank_tests.p_worse(*pairs[1])]
    verdict = combine(verdicts)
    test += f": p = {', '.join(f'{each:.3f}' for each in p)}"
  return Answer("n.3", claim, runs.describe_all(groups), test, verdict)


def rows(runs: Runs, found: Statistics) -> list[list[str]]:
  """The medians for each kn and n that has runs, for a table.

  Each is [kn, n, k, the error that the claims are about, and the final weights' by `KINDS`].
  """
  return [
    [f"{kn}", f"{n}", f"{kn // n}", _median(runs.errors(stem(kn, n))), *_medians(found, kn, n)]
    for kn in KNS
    for n in SIZES
    if runs.errors(stem(kn, n))
  ]


def _medians(found: Statistics, kn: int, n: int) -> list[str]:
  return [_median(found.errors(stem(kn, n), kind)) for kind in bn_results.KINDS]


def _median(errors: list[float]) -> str:
  """The median and, unless all seeds are there, their number."""
  if not errors:
    return "–"
  text = format_points(statistics.median(errors))
  return text if len(errors) == len(SEEDS) else f"{text} ({len(errors)} of {len(SEEDS)})"


def describe(runs: Runs, found: Statistics) -> str:
  """The answer in a few sentences, or what is known so far."""
  parts = []
  for kn in KNS:
    if runs.missing([stem(kn, n) for n in SIZES]):
      parts.append(f"At kn = {kn}, runs are missing.")
      continue
    best = best_size(runs, kn)
    base = runs.errors(stem(kn, best))
    others = {n: runs.errors(stem(kn, n)) for n in SIZES if n != best}
    same, worse = (
      ", ".join(str(n) for n, errors in others.items() if test(errors, base) == REPRODUCED)
      for test in (rank_tests.equal, rank_tests.worse)
    )
    text = f"At kn = {kn}, the best n is {best} ({_median(base)} %)"
    text += f"; equal to it: {same or 'none'}; worse: {worse or 'none'}."
    parts.append(text)
  small = [(kn, _medians(found, kn, 2)) for kn in KNS if found.errors(stem(kn, 2), "running")]
  parts += [
    f"With n = 2 at kn = {kn}, the final weights err {running} % with running statistics, "
    f"{recomputed} % with recomputed ones."
    for kn, (running, recomputed, _) in small
  ]
  return " ".join(parts)
