r"""Reports the answers to the reader's questions, from the committed results alone.

  python -m tools.answers

Reads RESULTS_DIR/STUDY/NAME_seedN.json, which `tools.study` writes, and, where they are there,
RESULTS_DIR/bn_statistics.json of `tools.bn_statistics` and RESULTS_DIR/communication.json of
`tools.benchmark.slow_links`. Writes docs/answers.md and its pictures in docs/answers/. The same
results give the same bytes. docs/answers_claims.md states the claims and the tests that decide
them, which were fixed before the runs.
"""

import functools
import os

from absl import flags

from tools import program
from tools.studies import (
  answers,
  answers_c,
  answers_figures,
  answers_n,
  answers_report,
  output,
  results,
)


def define_flags():
  flags.DEFINE_string("results_dir", "docs/answers", "Directory of the studies' results.")
  flags.DEFINE_string(
    "output", "docs/answers.md", "The report; its pictures go into a folder beside it."
  )


def answer(results_dir: str, output_path: str) -> str:
  """Writes the report and its pictures, and returns the verdicts as text.

  Raises:
    UserError: a result is invalid, or the output cannot be written.
  """
  output.require_markdown(output_path)
  runs = answers.Runs(results.read_groups(results_dir))
  statistics = answers_n.Statistics(runs, os.path.join(results_dir, "bn_statistics.json"))
  links = answers_c.read(os.path.join(results_dir, "communication.json"))
  decided = answers.decide(runs) + answers_n.decide(runs, statistics) + answers_c.decide(links)
  found = answers_report.Found(runs, statistics, links, decided)
  pictures = answers_figures.draw(runs, statistics, links)
  output.write_report(output_path, pictures, functools.partial(answers_report.to_markdown, found))
  lines = [f"{each.key:6}  {each.verdict:30}  {each.claim}" for each in decided]
  return "\n".join([*lines, f"Report: {output_path}"])


def main():
  print(answer(flags.FLAGS.results_dir, flags.FLAGS.output))


if __name__ == "__main__":
  program.run(main, define_flags)
