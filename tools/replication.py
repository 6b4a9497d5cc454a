r"""Reports what our runs reproduce of Goyal et al. 2017, from their committed results alone.

  python -m tools.replication

Reads RESULTS_DIR/STUDY/FLAGFILE_seedN.json, which `tools.study` writes, and writes
docs/replication.md and its pictures in docs/replication/. The same results give the same bytes. All
runs of one flagfile form a group, whatever their study; the numbers of seeds in the rules are
minima. `tools/studies/claims.py` states the claims and the rules that decide them, which were fixed
before the runs; the report repeats the rules.
"""

import functools

from absl import flags

from tools import program
from tools.studies import claims, figures, output, report, results


def define_flags():
  flags.DEFINE_string("results_dir", "docs/results", "Directory of the studies' results.")
  flags.DEFINE_string(
    "output", "docs/replication.md", "The report; its pictures go into a folder beside it."
  )


def replicate(results_dir: str, output_path: str) -> str:
  """Writes the report and its pictures, and returns the verdicts as text.

  Raises:
    UserError: a result is invalid, or the output cannot be written.
  """
  output.require_markdown(output_path)
  groups = claims.arrange(results.read_groups(results_dir))
  decided = claims.decide(groups)
  to_markdown = functools.partial(report.to_markdown, groups, decided)
  output.write_report(output_path, figures.draw(groups), to_markdown)
  lines = [f"{claim.key:2}  {claim.verdict:30}  {claim.claim}" for claim in decided]
  return "\n".join([*lines, f"Report: {output_path}"])


def main():
  print(replicate(flags.FLAGS.results_dir, flags.FLAGS.output))


if __name__ == "__main__":
  program.run(main, define_flags)
