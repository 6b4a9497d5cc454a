"""The recipe: everything that decides what a run computes, with the paper's values as defaults."""

import dataclasses
import itertools
import math
import re

from tf_largebatch import fields
from tf_largebatch.errors import UserError
from tf_largebatch.fields import declare


@dataclasses.dataclass(frozen=True)
class Stages:
  """A residual network's shape.

  Attributes:
    block: "basic" (two 3×3 convolutions) or "bottleneck" (1×1, 3×3, 1×1).
    width: channels of the first stage's 3×3 convolutions; each further stage has twice as many.
    blocks: residual blocks in each stage.
  """

  block: str
  width: int
  blocks: tuple[int, ...]


# He et al. 2016 (arXiv 1512.03385), Table 1 for ImageNet and §4.2 for CIFAR. ResNet-8 is ours: the
# CIFAR design at half the width, so that a run takes minutes on one CPU core.
NETWORKS = {
  "resnet8": Stages("basic", 8, (1, 1, 1)),
  "resnet20": Stages("basic", 16, (3, 3, 3)),
  "resnet32": Stages("basic", 16, (5, 5, 5)),
  "resnet56": Stages("basic", 16, (9, 9, 9)),
  "resnet50": Stages("bottleneck", 64, (3, 4, 6, 3)),
  "resnet101": Stages("bottleneck", 64, (3, 4, 23, 3)),
  "resnet152": Stages("bottleneck", 64, (3, 8, 36, 3)),
}
# The name of a class, as in keras.applications, or module:function.
_OTHER_NETWORK = re.compile(r"[A-Z]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Peak rate over η, by the ratio kn / reference batch size (§2.1, Table 2a).
_SCALINGS = {"linear": lambda ratio: ratio, "sqrt": math.sqrt, "none": lambda ratio: 1.0}
SCALINGS = tuple(_SCALINGS)
WARMUPS = ("gradual", "constant", "none")
DECAYS = ("steps", "cosine", "polynomial")
OPTIMIZERS = ("momentum_corrected_sgd", "lars")
AUGMENTATIONS = ("area_crop", "pad_crop", "none")
DTYPES = ("float32", "bfloat16", "float16", "float64")
EVALUATION_DTYPES = ("weights", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """k workers of n images, the seed, the schedule, the network and the data (Goyal et al. 2017).

  Two runs with equal recipes train on the same samples in the same order with the same
  augmentation and take the same steps on any cluster. The data set or the cluster chooses the
  fields that are None before the run starts (see each field's help).

  Raises:
    UserError: a value is out of range or does not fit another.
  """

  dataset: str = declare(
    "imagenet2012", "Name of a TensorFlow Datasets image classification set, or 'synthetic'."
  )
  train_split: str = declare("train", "Split to train on; slices such as train[:5120] are allowed.")
  validation_split: str | None = declare(
    None, "Split to evaluate on. Default: 'validation' if the data set has one, else 'test'."
  )
  image_size: int | None = declare(
    None,
    "Side of the square images in pixels. Default: that of the data set's images if they are all "
    "squares of one size up to 64, else 224.",
    at_least=1,
    below=2**16,
  )
  augmentation: str | None = declare(
    None,
    "area_crop: random crop of 8-100% of the area, aspect 3/4-4/3, and flip (the paper's). "
    "pad_crop: pad by 4, random crop, flip (CIFAR). none: no augmentation. "
    "Default: pad_crop for square images of one size up to 64 pixels, else area_crop.",
    choices=AUGMENTATIONS,
  )
  channel_mean: tuple[float, ...] | None = declare(
    None,
    "Mean of each channel, 0 to 255. Default: the data set's if known, else ImageNet's.",
    at_least=0,
    at_most=255,
  )
  channel_std: tuple[float, ...] | None = declare(
    None, "Standard deviation of each channel, 0 to 255. Default: as for channel_mean.", above=0
  )
  network: str = declare(
    "resnet50",
    "resnet50, resnet101, resnet152: for ImageNet. resnet20, resnet32, resnet56: for CIFAR. "
    "resnet8: half as wide as those for CIFAR, for scale models. Or the name of a model of "
    "keras.applications, such as EfficientNetV2B0, or module:function of your own, which is called "
    "with the input shape and the number of classes. Those keep their own initial values and "
    "settings of batch normalisation.",
  )
  last_gamma: float = declare(
    0.0, "Initial gamma of the last batch normalisation of each residual block."
  )
  batch_norm_momentum: float = declare(
    0.9, "Momentum of batch normalisation's moving averages.", at_least=0, below=1
  )
  batch_norm_epsilon: float = declare(1e-5, "Epsilon of batch normalisation.", above=0)
  dtype: str = declare(
    "float32",
    "Precision of the computation. bfloat16 and float16 keep weights, statistics and loss in "
    "float32; float16 scales the loss dynamically.",
    choices=DTYPES,
  )
  evaluation_dtype: str = declare(
    "weights",
    "Precision of the evaluations. weights: that of the weights, float32 unless dtype is float64. "
    "training: dtype, which in 16 bits is faster and changes the errors slightly.",
    choices=EVALUATION_DTYPES,
  )
  workers: int | None = declare(
    None,
    "k, the number of workers: groups of images that normalise together, on any number of "
    "devices. Default: one per device.",
    at_least=1,
    below=2**31,
  )
  per_worker_batch_size: int = declare(
    32, "n, images per worker in each step.", at_least=1, below=2**31
  )
  epochs: int = declare(90, "Passes over the training split.", at_least=1, below=2**31)
  reference_learning_rate: float = declare(
    0.1, "eta, the learning rate for a minibatch of reference_batch_size images.", above=0
  )
  reference_batch_size: int = declare(
    256, "Images in the minibatch that eta belongs to.", at_least=1, below=2**31
  )
  learning_rate_scaling: str = declare(
    "linear",
    "Peak rate. linear: eta * kn / reference_batch_size (the paper's rule). sqrt: eta * "
    "sqrt(kn / reference_batch_size). none: eta.",
    choices=SCALINGS,
  )
  warmup: str = declare(
    "gradual",
    "For minibatches above reference_batch_size. gradual: from eta to the peak by a constant "
    "amount each step. constant: eta during warmup. none: the peak from the first step.",
    choices=WARMUPS,
  )
  warmup_epochs: float = declare(5.0, "Length of the warmup in epochs.", at_least=0)
  decay: str = declare(
    "steps",
    "How the rate falls after the warmup. steps: at decay_epochs (the paper's). cosine: by half a "
    "cosine to 0 at the end. polynomial: by (1 - p)^decay_power, p from 0 to 1 at the end.",
    choices=DECAYS,
  )
  decay_power: float = declare(2.0, "Power of the polynomial decay.", above=0)
  decay_epochs: tuple[float, ...] = declare(
    (30.0, 60.0, 80.0),
    "Epochs at which the rate is multiplied by decay_factor, in increasing order.",
    above=0,
    below=2**31,
  )
  decay_factor: float = declare(0.1, "Factor of each decay of the rate.", above=0)
  optimizer: str = declare(
    "momentum_corrected_sgd",
    "momentum_corrected_sgd: the paper's. lars: the same with each kernel's gradient scaled to "
    "trust_coefficient times the kernel's norm.",
    choices=OPTIMIZERS,
  )
  trust_coefficient: float = declare(0.001, "Trust coefficient of lars.", above=0)
  momentum: float = declare(0.9, "m, the momentum of SGD.", at_least=0, below=1)
  nesterov: bool = declare(True, "Use Nesterov momentum.")
  momentum_correction: bool = declare(
    True, "Rescale the momentum buffer when the rate changes (the paper's remark 2)."
  )
  weight_decay: float = declare(
    1e-4,
    "lambda of lambda/2 |w|^2, applied to the kernels of convolutions and dense layers only.",
    at_least=0,
  )
  label_smoothing: float = declare(
    0.0, "Share of the target spread evenly over all classes.", at_least=0, below=1
  )
  seed: int = declare(
    0,
    "Seed of the initial weights, the shuffles and the augmentation.",
    at_least=0,
    below=2**31,
  )

  def __post_init__(self):
    fields.convert_and_check(self)
    if self.network not in NETWORKS and not _OTHER_NETWORK.fullmatch(self.network):
      raise UserError(
        f"network={self.network!r} is unknown; use one of {', '.join(NETWORKS)}, a model of "
        "keras.applications, or module:function."
      )
    if self.workers is None or self.warms_up:
      fields.require(
        self,
        "warmup_epochs",
        self.warmup == "none" or self.warmup_epochs < self.epochs,
        f"below epochs={self.epochs}, or warmup=none",
      )
    increase = all(a < b for a, b in itertools.pairwise(self.decay_epochs))
    fields.require(self, "decay_epochs", increase, "in increasing order")
    if self.workers is not None:
      finite = math.isfinite(self.peak_learning_rate)
      expected = "finite when scaled to the minibatch too"
      fields.require(self, "reference_learning_rate", finite, expected)

  @property
  def global_batch_size(self) -> int:
    """kn, images in one step."""
    if self.workers is None:
      raise ValueError("workers is not chosen yet.")
    return self.workers * self.per_worker_batch_size

  @property
  def warms_up(self) -> bool:
    """Whether the run begins with a warmup."""
    return warms_up(self.warmup, self.global_batch_size, self.reference_batch_size)

  @property
  def peak_learning_rate(self) -> float:
    """η̂, the rate after the warmup: the linear scaling rule (§2.1), or its ablations."""
    return scaled_learning_rate(
      self.reference_learning_rate,
      self.global_batch_size,
      self.reference_batch_size,
      self.learning_rate_scaling,
    )

  def steps_per_epoch(self, train_examples: int) -> int:
    """Whole steps of kn images in an epoch; each epoch leaves out the last train_examples mod kn.

    Raises:
      UserError: the training split is smaller than one step.
    """
    steps = train_examples // self.global_batch_size
    if steps < 1:
      raise UserError(
        f"A step of workers={self.workers} x per_worker_batch_size={self.per_worker_batch_size} = "
        f"{self.global_batch_size} images is more than the {train_examples} of {self.dataset} "
        f"{self.train_split}; choose fewer workers or images per worker."
      )
    return steps

  def total_steps(self, train_examples: int) -> int:
    """Steps of the whole run."""
    return self.epochs * self.steps_per_epoch(train_examples)

  def derived(self, train_examples: int, replicas: int) -> dict:
    """What follows from the recipe, its training split and the number of replicas, by name."""
    return {
      "train_examples": train_examples,
      "global_batch_size": self.global_batch_size,
      "peak_learning_rate": self.peak_learning_rate,
      "steps_per_epoch": self.steps_per_epoch(train_examples),
      "total_steps": self.total_steps(train_examples),
      "workers_per_replica": self.workers // replicas,
    }

  def to_dict(self) -> dict:
    """All fields by name, as JSON values."""
    return {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in dataclasses.asdict(self).items()
    }


def warms_up(warmup: str, global_batch_size: int, reference_batch_size: int) -> bool:
  """Whether there is a warmup: only for kn above the reference's minibatch (§5.3)."""
  return warmup != "none" and global_batch_size > reference_batch_size


def scaled_learning_rate(
  reference_learning_rate: float, global_batch_size: int, reference_batch_size: int, scaling: str
) -> float:
  """η̂ for a minibatch of kn images: η·kn/256 (§2.1, "linear"), η·√(kn/256) ("sqrt") or η ("none").

  Raises:
    UserError: an unknown scaling.
  """
  if scaling not in _SCALINGS:
    raise UserError(
      f"learning_rate_scaling={scaling!r} is unknown; use one of {', '.join(SCALINGS)}."
    )
  return reference_learning_rate * _SCALINGS[scaling](global_batch_size / reference_batch_size)
