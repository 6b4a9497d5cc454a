"""Studies of one flagfile for the tests."""

from tests.launching import SMALL


def make_study(root, text='seeds = 2\nflags = ["--log_every_steps=2"]', flag_lines=SMALL, head=""):
  """Writes a study of one flagfile and returns its path."""
  recipe = [line for line in flag_lines if "every" not in line and "evaluation" not in line]
  (root / "small.flags").write_text("\n".join(["--epochs=3", *recipe]) + "\n")
  path = root / "tiny.toml"
  path.write_text(f'{head}\n[[runs]]\nflagfile = "{root}/small.flags"\n{text}\n')
  return str(path)
