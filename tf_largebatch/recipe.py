"""The recipe: everything that decides what a run computes, with the paper's values as defaults."""

import dataclasses
import itertools
import math
import types
import typing

from tf_largebatch.errors import UserError

NETWORKS = (
  *("resnet8", "resnet20", "resnet32", "resnet56"),
  *("resnet50", "resnet101", "resnet152"),
)
SCALINGS = ("linear", "sqrt", "none")
WARMUPS = ("gradual", "constant", "none")
AUGMENTATIONS = ("area_crop", "pad_crop", "none")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _field(default, help_text: str, choices: tuple[str, ...] | None = None):
  return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


def _checked(field: dataclasses.Field, value):
  """The value as the field's type (a whole number will do for a float), or a UserError."""
  kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
  if value is None and types.NoneType in kinds:
    return None
  kind = kinds[0]
  choices = field.metadata["choices"]
  if choices and value not in choices:
    raise UserError(f"{field.name}={value!r} is unknown; one of {', '.join(choices)} would do.")
  if typing.get_origin(kind) is tuple and isinstance(value, tuple | list):
    if all(_is_finite_number(item) for item in value):
      return tuple(float(item) for item in value)
  elif kind is float and _is_finite_number(value):
    return float(value)
  elif type(value) is kind and kind is not float:
    return value
  kind_name = {int: "a whole number", bool: "True or False", str: "text"}.get(kind, "finite")
  raise UserError(f"{field.name}={value!r} is refused; it must be {kind_name}.")


def _is_finite_number(value) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """k workers of n images, the seed, the schedule, the network and the data (Goyal et al. 2017).

  Two runs with equal recipes train on the same samples in the same order with the same
  augmentation and take the same steps, whatever the cluster. A field that is None is chosen by
  the data set or the cluster before the run starts (see each field's help).

  Raises:
    UserError: a value is out of range or does not fit another; one line says what would do.
  """

  dataset: str = _field(
    "imagenet2012", "Name of a TensorFlow Datasets image classification set, or 'synthetic'."
  )
  train_split: str = _field("train", "Split to train on; slices such as train[:5120] are allowed.")
  validation_split: str | None = _field(
    None, "Split to evaluate on; left out: 'validation' if the data set has one, else 'test'."
  )
  image_size: int | None = _field(
    None, "Side of the square images in pixels; left out: the data set's own, or 224."
  )
  augmentation: str | None = _field(
    None,
    "area_crop: random crop of 8-100% of the area, aspect 3/4-4/3, and flip (the paper's). "
    "pad_crop: pad by 4, random crop, flip (CIFAR). none: no augmentation. "
    "Left out: pad_crop for images of one fixed size up to 64 pixels, else area_crop.",
    AUGMENTATIONS,
  )
  channel_mean: tuple[float, ...] | None = _field(
    None, "Mean of each channel, 0 to 255; left out: the data set's, where known, or ImageNet's."
  )
  channel_std: tuple[float, ...] | None = _field(
    None, "Standard deviation of each channel, 0 to 255; left out: as for channel_mean."
  )
  network: str = _field(
    "resnet50",
    "Network: resnet50, resnet101 or resnet152 (ImageNet), resnet20, resnet32 or resnet56 (CIFAR), "
    "resnet8 (half as wide as those, for scale models).",
    NETWORKS,
  )
  last_gamma: float = _field(
    0.0, "Initial gamma of the last batch normalisation of each residual block."
  )
  batch_norm_momentum: float = _field(0.9, "Momentum of batch normalisation's running averages.")
  batch_norm_epsilon: float = _field(1e-5, "Epsilon of batch normalisation.")
  dtype: str = _field(
    "float32",
    "float32, bfloat16 or float16 (computation; float32 weights, statistics and loss, and, for "
    "float16, dynamic loss scaling) or float64.",
    DTYPES,
  )
  workers: int | None = _field(
    None,
    "k, groups of images that normalise together, on any number of devices; left out: one a "
    "device.",
  )
  per_worker_batch_size: int = _field(32, "n, images of each worker in a step.")
  epochs: int = _field(90, "Passes over the training split.")
  reference_learning_rate: float = _field(
    0.1, "eta, the learning rate of a minibatch of reference_batch_size images."
  )
  reference_batch_size: int = _field(256, "Images of the minibatch that eta belongs to.")
  learning_rate_scaling: str = _field(
    "linear",
    "Peak rate: linear = eta * kn / reference_batch_size (the paper's rule), sqrt = eta * "
    "sqrt(kn / reference_batch_size), none = eta.",
    SCALINGS,
  )
  warmup: str = _field(
    "gradual",
    "For minibatches above reference_batch_size. gradual: from eta to the peak by a constant "
    "amount each step. constant: eta during warmup. none: the peak at once.",
    WARMUPS,
  )
  warmup_epochs: float = _field(5.0, "Length of the warmup in epochs.")
  decay_epochs: tuple[float, ...] = _field(
    (30.0, 60.0, 80.0), "Epochs at which the rate is multiplied by decay_factor."
  )
  decay_factor: float = _field(0.1, "Factor of each decay of the rate.")
  momentum: float = _field(0.9, "Momentum m of SGD.")
  nesterov: bool = _field(True, "Nesterov momentum.")
  momentum_correction: bool = _field(
    True, "Rescale the momentum buffer where the rate changes (the paper's remark 2)."
  )
  weight_decay: float = _field(
    1e-4, "lambda of lambda/2 |w|^2, on the kernels of convolutions and dense layers alone."
  )
  label_smoothing: float = _field(0.0, "Share of the target spread evenly over all classes.")
  seed: int = _field(0, "Seed of the initial weights, the shuffles and the augmentation.")

  def __post_init__(self):
    for field in dataclasses.fields(self):
      object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
    for name in ("workers", "per_worker_batch_size", "epochs", "reference_batch_size"):
      value = getattr(self, name)
      self._require(name, value is None or 1 <= value < 2**31, "at least 1 and below 2^31")
    size = self.image_size
    self._require("image_size", size is None or 1 <= size < 2**16, "at least 1 and below 2^16")
    for name in ("reference_learning_rate", "batch_norm_epsilon", "decay_factor"):
      self._require(name, getattr(self, name) > 0, "above 0")
    for name in ("momentum", "batch_norm_momentum", "label_smoothing"):
      self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
    self._require("weight_decay", self.weight_decay >= 0, "at least 0")
    self._require("seed", 0 <= self.seed < 2**31, "in [0, 2^31)")
    self._require("warmup_epochs", self.warmup_epochs >= 0, "at least 0")
    if self.workers is None or self.warms_up:
      limit = f"below epochs={self.epochs}, or warmup=none"
      self._require(
        "warmup_epochs", self.warmup == "none" or self.warmup_epochs < self.epochs, limit
      )
    decays = self.decay_epochs
    self._require(
      "decay_epochs",
      all(0 < x < 2**31 for x in decays) and all(a < b for a, b in itertools.pairwise(decays)),
      "above 0, below 2^31 and each later than the one before",
    )
    if self.channel_mean is not None:
      self._require("channel_mean", all(0 <= x <= 255 for x in self.channel_mean), "in [0, 255]")
    if self.channel_std is not None:
      self._require("channel_std", all(x > 0 for x in self.channel_std), "above 0 in all channels")
    if self.workers is not None:
      finite = math.isfinite(self.peak_learning_rate)
      self._require("reference_learning_rate", finite, "finite when scaled to the minibatch too")

  def _require(self, name: str, holds: bool, would_do: str):
    if not holds:
      raise UserError(f"{name}={getattr(self, name)} is out of range; it must be {would_do}.")

  @property
  def global_batch_size(self) -> int:
    """kn, images in one step."""
    if self.workers is None:
      raise ValueError("workers is not chosen yet.")
    return self.workers * self.per_worker_batch_size

  @property
  def warms_up(self) -> bool:
    """Whether there is a warmup at all: it is for kn above the reference's minibatch (§5.3)."""
    return self.warmup != "none" and self.global_batch_size > self.reference_batch_size

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
    """Whole steps of kn images in an epoch; the tail below kn is left out of that epoch.

    Raises:
      UserError: the training split is smaller than one step.
    """
    steps = train_examples // self.global_batch_size
    if steps < 1:
      raise UserError(
        f"A step of workers={self.workers} x per_worker_batch_size={self.per_worker_batch_size} = "
        f"{self.global_batch_size} images is more than the {train_examples} of {self.dataset} "
        f"{self.train_split}; choose fewer workers or images a worker."
      )
    return steps

  def total_steps(self, train_examples: int) -> int:
    """Steps of the whole run."""
    return self.epochs * self.steps_per_epoch(train_examples)

  def to_dict(self) -> dict:
    """All fields by name, as JSON values."""
    return {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in dataclasses.asdict(self).items()
    }

  def to_flagfile(self) -> str:
    """A flag a line for every field that is not None: a flagfile that repeats the recipe."""
    lines = []
    for name, value in self.to_dict().items():
      if value is not None:
        value = ",".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"--{name}={value}\n")
    return "".join(lines)


def scaled_learning_rate(
  reference_learning_rate: float, global_batch_size: int, reference_batch_size: int, scaling: str
) -> float:
  """η̂ for a minibatch of kn images: η·kn/256 (§2.1, "linear"), η·√(kn/256) ("sqrt") or η ("none").

  Raises:
    UserError: an unknown scaling.
  """
  ratio = global_batch_size / reference_batch_size
  if scaling == "linear":
    return reference_learning_rate * ratio
  if scaling == "sqrt":
    return reference_learning_rate * math.sqrt(ratio)
  if scaling == "none":
    return reference_learning_rate
  raise UserError(f"learning_rate_scaling={scaling!r} is unknown; one of {', '.join(SCALINGS)}.")
