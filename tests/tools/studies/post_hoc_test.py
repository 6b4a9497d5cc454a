"""The post-hoc analyses of made-up results."""

from scipy import stats

from tests.tools.studies.made_up_results import GROUPS, KN, SCATTER, read, write_all
from tools.studies import post_hoc


def test_post_hoc_analyses(tmp_path):
  results = write_all(tmp_path, GROUPS)
  text = post_hoc.to_markdown(read(results))
  lines = text.splitlines()
  assert lines[0].startswith("**Post-hoc analyses**") and lines[1] == ""
  # All five of one group are above all five of the other, 1 of the 10! / (5! 5!) = 252 orders; Holm
  # multiplies it by 5.
  assert "a2 0.000 and 0.020 (0.004)" in lines[2]
  seeds = [0.1 + each for each in SCATTER[1:]]
  test = stats.ttest_ind(seeds, seeds, equal_var=False).confidence_interval(0.9)
  interval = f"[{100 * test.low:+.2f}, {100 * test.high:+.2f}]"
  expected = f"- Without seed 0, which the pilot runs used, a1: +0.00 {interval}"
  assert lines[3].startswith(expected)
  assert "- No minibatch up to kn 512 (32 times the baseline's) is worse than the baseline" in text
  assert "The whole interval" not in text
  lower = {**GROUPS, f"{KN}64": ("gradual", True, 0.09, 3)}
  text = post_hoc.to_markdown(read(write_all(tmp_path / "2", lower)))
  assert text.endswith("- The whole interval of the difference is below 0 for kn 64.")
