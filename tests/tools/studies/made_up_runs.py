"""Small work directories with known curves for the tests."""

import json

from tf_largebatch.recipe import Recipe


def make_run(root, name, validation, training=None, complete=True, **recipe):
  """Makes a work directory; each epoch has two training records, the first over 3/4 of it."""
  training = validation if training is None else training
  fields = {"workers": 8, "epochs": len(validation), "warmup": "none", **recipe}
  work_dir = root / name
  work_dir.mkdir()
  (work_dir / "recipe.json").write_text(json.dumps({"recipe": Recipe(**fields).to_dict()}))
  records = []
  for epoch, (error, train_error) in enumerate(zip(validation, training, strict=True), 1):
    first, second = train_error + 0.01, train_error - 0.03  # Their mean by span is train_error.
    records += [
      {"kind": "train", "step": 8 * epoch - 2, "epoch": epoch - 0.25, "error": first},
      {"kind": "train", "step": 8 * epoch, "epoch": float(epoch), "error": second},
      {"kind": "eval", "step": 8 * epoch, "epoch": epoch, "error": error},
    ]
  (work_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
  if complete:
    (work_dir / "result.json").write_text('{"status": "complete"}')
  return str(work_dir)
