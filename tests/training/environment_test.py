"""The warning about a CPU without instructions for a dtype."""

import pytest

from tf_largebatch.training import environment


@pytest.mark.parametrize(
  "dtype, flags, warned",
  [
    ("bfloat16", "fpu avx avx2", True),
    ("bfloat16", "avx2 avx512_bf16", False),
    ("bfloat16", "asimd bf16", False),
    ("float16", "avx2 avx512_bf16", True),
    ("float16", "avx512_fp16", False),
    ("float32", "fpu", False),
  ],
)
def test_a_cpu_that_emulates_16_bit_floats_gets_a_warning(tmp_path, caplog, dtype, flags, warned):
  (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags} sse\n")
  with caplog.at_level("WARNING", logger="absl"):
    environment.warn_of_slow_dtype(dtype, str(tmp_path / "cpuinfo"))
    environment.warn_of_slow_dtype(dtype, str(tmp_path / "missing"))
  assert len(caplog.records) == warned
