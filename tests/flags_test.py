"""The flagfiles of `flags/`, read by the binary's own flags, against the paper's tables."""

import copy
import dataclasses
import re
import shlex

import pytest
from absl import flags

from tests.launching import ROOT
from tf_largebatch import train  # noqa: F401 - Defines the flags.
from tf_largebatch.command_line import recipe_from_flags
from tf_largebatch.recipe import Recipe

_TRAIN_EXAMPLES = {"imagenet2012": 1_281_167, "cifar10": 50_000, "fashion_mnist": 60_000}

# Worked out from the paper: kn, k, peak rate, steps an epoch, steps, warmup, last gamma, network.
_DERIVED = """
cifar10_resnet20                     256    8  0.5     195    1170 gradual  0 resnet20
cifar10_resnet20_he                  128    2  0.1     390   63960 none     1 resnet20
fashion_mnist_kn16                    16    1  0.05   3750   67500 gradual  0 resnet8
fashion_mnist_kn32                    32    2  0.1    1875   33750 gradual  0 resnet8
fashion_mnist_kn64                    64    4  0.2     937   16866 gradual  0 resnet8
fashion_mnist_kn128                  128    8  0.4     468    8424 gradual  0 resnet8
fashion_mnist_kn256                  256   16  0.8     234    4212 gradual  0 resnet8
fashion_mnist_kn512                  512   32  1.6     117    2106 gradual  0 resnet8
fashion_mnist_kn1024                1024   64  3.2      58    1044 gradual  0 resnet8
fashion_mnist_kn2048                2048  128  6.4      29     522 gradual  0 resnet8
fashion_mnist_kn4096                4096  256  12.8     14     252 gradual  0 resnet8
fashion_mnist_kn512_none             512   32  1.6     117    2106 none     0 resnet8
fashion_mnist_kn512_constant         512   32  1.6     117    2106 constant 0 resnet8
fashion_mnist_kn512_uncorrected      512   32  1.6     117    2106 gradual  0 resnet8
fashion_mnist_kn512_constant_uncorrected 512 32 1.6    117    2106 constant 0 resnet8
imagenet_resnet50_table1_kn256_baseline 256 8  0.1    5004  450360 gradual  0 resnet50
imagenet_resnet50_table1_kn8192_none    8192 256 3.2   156   14040 none     0 resnet50
imagenet_resnet50_table1_kn8192_constant 8192 256 3.2  156   14040 constant 0 resnet50
imagenet_resnet50_table1_kn8192_gradual 8192 256 3.2   156   14040 gradual  0 resnet50
imagenet_resnet50_figure3_kn64        64    2  0.025 20018 1801620 gradual  0 resnet50
imagenet_resnet50_figure3_kn128      128    4  0.05  10009  900810 gradual  0 resnet50
imagenet_resnet50_figure3_kn256      256    8  0.1    5004  450360 gradual  0 resnet50
imagenet_resnet50_figure3_kn512      512   16  0.2    2502  225180 gradual  0 resnet50
imagenet_resnet50_figure3_kn1024    1024   32  0.4    1251  112590 gradual  0 resnet50
imagenet_resnet50_figure3_kn2048    2048   64  0.8     625   56250 gradual  0 resnet50
imagenet_resnet50_figure3_kn4096    4096  128  1.6     312   28080 gradual  0 resnet50
imagenet_resnet50_figure3_kn8192    8192  256  3.2     156   14040 gradual  0 resnet50
imagenet_resnet50_figure3_kn16384  16384  512  6.4      78    7020 gradual  0 resnet50
imagenet_resnet50_figure3_kn32768  32768 1024 12.8      39    3510 gradual  0 resnet50
imagenet_resnet50_figure3_kn65536  65536 2048 25.6      19    1710 gradual  0 resnet50
imagenet_resnet50_table2a_kn256_eta0.05 256 8  0.05   5004  450360 gradual  0 resnet50
imagenet_resnet50_table2a_kn256_eta0.1  256 8  0.1    5004  450360 gradual  0 resnet50
imagenet_resnet50_table2a_kn256_eta0.2  256 8  0.2    5004  450360 gradual  0 resnet50
imagenet_resnet50_table2a_kn8192_eta0.05 8192 256 1.6  156   14040 gradual  0 resnet50
imagenet_resnet50_table2a_kn8192_eta0.1 8192 256 3.2   156   14040 gradual  0 resnet50
imagenet_resnet50_table2a_kn8192_eta0.2 8192 256 6.4   156   14040 gradual  0 resnet50
imagenet_resnet50_table2a_kn8192_fixed  8192 256 0.1   156   14040 gradual  0 resnet50
imagenet_resnet50_table2a_kn8192_sqrt   8192 256 0.565685424949238 156 14040 gradual 0 resnet50
imagenet_resnet50_table2b_kn256_gamma1  256 8  0.1    5004  450360 gradual  1 resnet50
imagenet_resnet50_table2b_kn256_gamma0  256 8  0.1    5004  450360 gradual  0 resnet50
imagenet_resnet50_table2b_kn8192_gamma1 8192 256 3.2   156   14040 gradual  1 resnet50
imagenet_resnet50_table2b_kn8192_gamma0 8192 256 3.2   156   14040 gradual  0 resnet50
imagenet_resnet101_table2c_kn256     256    8  0.1    5004  450360 gradual  0 resnet101
imagenet_resnet101_table2c_kn8192   8192  256  3.2     156   14040 gradual  0 resnet101
"""
_DERIVED = {row.split()[0]: row.split()[1:] for row in _DERIVED.strip().splitlines()}

# The paper's top-1 validation errors in %, as the headers must quote them; None: not given.
_PAPER_ERRORS = {
  "imagenet_resnet50_table1_kn256_baseline": "23.60 +/- 0.12",
  "imagenet_resnet50_table1_kn8192_none": "24.84 +/- 0.37",
  "imagenet_resnet50_table1_kn8192_constant": "25.88 +/- 0.56",
  "imagenet_resnet50_table1_kn8192_gradual": "23.74 +/- 0.09",
  "imagenet_resnet50_figure3_kn64": None,
  "imagenet_resnet50_figure3_kn128": "23.49 +/- 0.12",
  "imagenet_resnet50_figure3_kn256": "23.60 +/- 0.12",
  "imagenet_resnet50_figure3_kn512": "23.48 +/- 0.09",
  "imagenet_resnet50_figure3_kn1024": "23.53 +/- 0.08",
  "imagenet_resnet50_figure3_kn2048": "23.49 +/- 0.11",
  "imagenet_resnet50_figure3_kn4096": "23.56 +/- 0.12",
  "imagenet_resnet50_figure3_kn8192": "23.74 +/- 0.09",
  "imagenet_resnet50_figure3_kn16384": "24.79 +/- 0.27",
  "imagenet_resnet50_figure3_kn32768": "27.55 +/- 0.28",
  "imagenet_resnet50_figure3_kn65536": "33.96 +/- 0.80",
  "imagenet_resnet50_table2a_kn256_eta0.05": "23.92 +/- 0.10",
  "imagenet_resnet50_table2a_kn256_eta0.1": "23.60 +/- 0.12",
  "imagenet_resnet50_table2a_kn256_eta0.2": "23.68 +/- 0.09",
  "imagenet_resnet50_table2a_kn8192_eta0.05": "24.27 +/- 0.08",
  "imagenet_resnet50_table2a_kn8192_eta0.1": "23.74 +/- 0.09",
  "imagenet_resnet50_table2a_kn8192_eta0.2": "24.05 +/- 0.18",
  "imagenet_resnet50_table2a_kn8192_fixed": "41.67 +/- 0.10",
  "imagenet_resnet50_table2a_kn8192_sqrt": "26.22 +/- 0.03",
  "imagenet_resnet50_table2b_kn256_gamma1": "23.84 +/- 0.18",
  "imagenet_resnet50_table2b_kn256_gamma0": "23.60 +/- 0.12",
  "imagenet_resnet50_table2b_kn8192_gamma1": "24.11 +/- 0.07",
  "imagenet_resnet50_table2b_kn8192_gamma0": "23.74 +/- 0.09",
  "imagenet_resnet101_table2c_kn256": "22.08 +/- 0.06",
  "imagenet_resnet101_table2c_kn8192": "22.36 +/- 0.09",
}

# The recipe of each family of flagfiles, written out: a flagfile leaves out what equals a default
# of `Recipe`, so these literals, not the defaults, pin what the experiments are.
_IMAGENET = {
  "dataset": "imagenet2012",
  "train_split": "train",
  "validation_split": "validation",
  "image_size": 224,
  "augmentation": "area_crop",
  "channel_mean": (123.675, 116.28, 103.53),
  "channel_std": (58.395, 57.12, 57.375),
  "last_gamma": 0.0,
  "batch_norm_momentum": 0.9,
  "batch_norm_epsilon": 1e-5,
  "dtype": "float32",
  "evaluation_dtype": "weights",
  "per_worker_batch_size": 32,
  "epochs": 90,
  "reference_learning_rate": 0.1,
  "reference_batch_size": 256,
  "learning_rate_scaling": "linear",
  "warmup": "gradual",
  "warmup_epochs": 5.0,
  "decay_epochs": (30.0, 60.0, 80.0),
  "decay_factor": 0.1,
  "momentum": 0.9,
  "nesterov": True,
  "decay": "steps",
  "decay_power": 2.0,
  "optimizer": "momentum_corrected_sgd",
  "trust_coefficient": 0.001,
  "momentum_correction": True,
  "weight_decay": 1e-4,
  "label_smoothing": 0.0,
  "seed": 0,
}
_FASHION_MNIST = _IMAGENET | {
  "dataset": "fashion_mnist",
  "validation_split": "test",
  "image_size": 14,
  "augmentation": "none",
  "channel_mean": (72.940,),
  "channel_std": (90.021,),
  "per_worker_batch_size": 16,
  "epochs": 18,
  "reference_learning_rate": 0.05,
  "reference_batch_size": 16,
  "warmup_epochs": 2.0,
  "decay_epochs": (6.0, 12.0, 16.0),
}
_CIFAR10 = _IMAGENET | {
  "dataset": "cifar10",
  "validation_split": "test",
  "image_size": 32,
  "augmentation": "pad_crop",
  "channel_mean": (125.307, 122.950, 113.865),
  "channel_std": (62.993, 62.089, 66.705),
  "dtype": "bfloat16",
  "epochs": 6,
  "reference_learning_rate": 0.25,
  "reference_batch_size": 128,
  "warmup_epochs": 0.5,
  "decay_epochs": (3.0, 4.25, 5.0, 5.5, 5.75),
  "decay_factor": 0.5,
  "weight_decay": 5e-4,
}
_CIFAR10_HE = _CIFAR10 | {
  "dtype": "float32",
  "per_worker_batch_size": 64,
  "epochs": 164,
  "reference_learning_rate": 0.1,
  "warmup_epochs": 0.0,
  "decay_epochs": (82.0513, 123.0769),
  "decay_factor": 0.1,
  "nesterov": False,
  "weight_decay": 1e-4,
}


def expected_recipe(name):
  """Every field of a flagfile's recipe: its family's, `_DERIVED`'s, and what its name says."""
  _, workers, _, _, _, warmup, last_gamma, network = _DERIVED[name]
  family = _CIFAR10_HE if name == "cifar10_resnet20_he" else _CIFAR10
  if not name.startswith("cifar10"):
    family = _IMAGENET if name.startswith("imagenet") else _FASHION_MNIST
  fields = family | {
    "workers": int(workers),
    "warmup": warmup,
    "last_gamma": float(last_gamma),
    "network": network,
  }
  # The warmup starts from η, so the row's own η counts and not its peak rate alone.
  if eta := re.search(r"_eta([\d.]+)$", name):
    fields["reference_learning_rate"] = float(eta[1])
  if name.endswith("_uncorrected"):
    fields["momentum_correction"] = False
  scaling = {"fixed": "none", "sqrt": "sqrt"}.get(name.rpartition("_")[2], "linear")
  return fields | {"learning_rate_scaling": scaling}


def parse(*arguments):
  """A copy of the binary's flags, parsed; absl's own, global ones stay untouched."""
  values = copy.deepcopy(flags.FLAGS)
  values.unparse_flags()
  assert values(["train", *arguments]) == ["train"]
  return values


def split(name):
  """The comment that heads a flagfile, as text, and its other lines."""
  lines = (ROOT / "flags" / f"{name}.flags").read_text().splitlines()
  body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
  return "\n".join(line.removeprefix("#").strip() for line in lines[:body]), lines[body:]


def test_the_tables_and_the_folder_hold_the_same_names():
  names = {path.name for path in (ROOT / "flags").iterdir()}
  assert names == {f"{name}.flags" for name in _DERIVED}
  assert {name for name in _DERIVED if name.startswith("imagenet_")} == set(_PAPER_ERRORS)


@pytest.mark.parametrize("name", _DERIVED)
def test_derived_values(name):
  recipe = recipe_from_flags(parse(f"--flagfile={ROOT}/flags/{name}.flags"))
  kn, k, peak, steps_per_epoch, steps, warmup, last_gamma, network = _DERIVED[name]
  assert (recipe.global_batch_size, recipe.workers) == (int(kn), int(k))
  assert recipe.peak_learning_rate == pytest.approx(float(peak), rel=1e-12)
  examples = _TRAIN_EXAMPLES[recipe.dataset]
  assert recipe.steps_per_epoch(examples) == int(steps_per_epoch)
  assert recipe.total_steps(examples) == int(steps)
  assert (recipe.warmup, recipe.network) == (warmup, network)
  assert recipe.last_gamma == float(last_gamma)


@pytest.mark.parametrize("name", _DERIVED)
def test_every_field_is_pinned(name):
  recipe = recipe_from_flags(parse(f"--flagfile={ROOT}/flags/{name}.flags"))
  assert dataclasses.asdict(recipe) == expected_recipe(name)


@pytest.mark.parametrize("name", _DERIVED)
def test_flat_and_only_what_differs_from_the_defaults(name):
  _, lines = split(name)
  given = [re.fullmatch(r"--(\w+)=\S.*", line)[1] for line in lines]
  # No file in the file, no directory of the author's, nothing twice.
  recipe, default = expected_recipe(name), dataclasses.asdict(Recipe())
  assert sorted(given) == sorted(field for field in recipe if recipe[field] != default[field])


@pytest.mark.parametrize("name", _DERIVED)
def test_the_header_holds_the_command(name, monkeypatch):
  header, _ = split(name)
  words = shlex.split(re.search(r"^python .*$", header.replace("\\\n", ""), re.MULTILINE)[0])
  assert words[:3] == ["python", "-m", "tf_largebatch.train"]
  assert f"--flagfile=flags/{name}.flags" in words
  monkeypatch.chdir(ROOT)  # Where a reader runs it.
  values = parse(*words[3:])
  assert values.work_dir == f"runs/{name}"
  assert recipe_from_flags(values).global_batch_size == int(_DERIVED[name][0])


@pytest.mark.parametrize("name", _PAPER_ERRORS)
def test_the_header_tells_the_papers_result_from_ours(name):
  header, _ = split(name)
  kn, k = _DERIVED[name][:2]
  error = _PAPER_ERRORS[name]
  result = "The paper gives no number for this point."
  if error:
    result = f"The paper's result, not ours: {error} % top-1 validation error"
  assert f"\n{result}" in header
  assert header.endswith("\nNot run by this project.")
  # No second figure, which could be taken for ours.
  assert header.count("+/-") == header.count(" % ") == bool(error)
  assert f"\nk = {k} workers of n = 32 images, kn = {kn}.\n" in header
  assert f"\nHardware: any number of GPUs that divides k = {k}." in header
