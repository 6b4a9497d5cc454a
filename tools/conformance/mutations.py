"""The paper's subtle mistakes, as changes to the package's source, one at a time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A mistake.

  Attributes:
    name: of the mistake.
    caught_by: the property of `tools.verify` that must fail.
    edits: (module of the package, text that occurs there once, text that replaces it).
  """

  name: str
  caught_by: str
  edits: tuple[tuple[str, str, str], ...]


MUTATIONS = (
  Mutation(
    "loss over n instead of kn",
    "aggregation",
    (
      (
        "training/step",
        "images_in_step = recipe.global_batch_size",
        "images_in_step = recipe.per_worker_batch_size",
      ),
    ),
  ),
  Mutation(
    "sum of replicas not scaled",
    "aggregation",
    (
      (
        "training/step",
        "    gradient_norm = tf",
        "    gradients = [g * strategy.num_replicas_in_sync for g in gradients]\n"
        "    gradient_norm = tf",
      ),
    ),
  ),
  Mutation(
    "decay on γ and β",
    "weight decay",
    (("optim/sgd", "return kernel and self._use_weight_decay", "return self._use_weight_decay"),),
  ),
  Mutation(
    "decay twice (L2 without the half)",
    "weight decay",
    (
      (
        "optim/sgd",
        "tf.constant(self.coupled_weight_decay, gradient.dtype)",
        "tf.constant(2 * self.coupled_weight_decay, gradient.dtype)",
      ),
    ),
  ),
  Mutation(
    "decoupled decay",
    "weight decay",
    (
      (
        "optim/sgd",
        "      gradient = self._decay(gradient, variable)\n",
        "      decay = self._decay(tf.zeros_like(gradient), variable)\n"
        '      self.assign_sub(variable, by["rate"] * decay)\n',
      ),
      ("optim/sgd", '      "scale": scale,\n', '      "scale": scale, "rate": learning_rate,\n'),
    ),
  ),
  Mutation(
    "no momentum correction",
    "momentum correction",
    (("optim/sgd", '"decay": self.momentum * factor,', '"decay": self.momentum,'),),
  ),
  Mutation(
    "correction applied after instead of before",
    "momentum correction",
    (
      ("optim/sgd", '"decay": self.momentum * factor,', '"decay": self.momentum, "after": factor,'),
      ("optim/sgd", "buffer.assign(velocity)", 'buffer.assign(by["after"] * velocity)'),
    ),
  ),
  Mutation(
    "BN over all workers",
    "BN groups",
    (
      (
        "training/passes",
        "    # [workers, n, …] → [passes, g·n",
        "    nonlocal workers_per_pass\n"
        "    workers_per_pass = batch[0].shape[0]\n"
        "    # [workers, n, …] → [passes, g·n",
      ),
      (
        "models/networks",
        "PerWorkerBatchNormalization, per_worker_batch_size=recipe.per_worker_batch_size",
        "PerWorkerBatchNormalization",
      ),
    ),
  ),
  Mutation(
    "BN statistics of the first worker only",
    "moving statistics",
    (
      (
        "training/passes",
        "      new = tf.nest",
        "      statistics = [tf.where(index == 0, s * count, 0 * s) for s in statistics]\n"
        "      new = tf.nest",
      ),
    ),
  ),
  Mutation(
    "moving statistics per replica",
    "replicas identical",
    (
      (
        "training/step",
        "    statistics, loss, error, *squared_norms, stop = totals\n",
        "    local = recipe.workers / images.shape[0]\n"
        "    statistics = [local * value for value in statistics]\n"
        "    _, loss, error, *squared_norms, stop = totals\n",
      ),
    ),
  ),
  Mutation(
    "shuffle per worker",
    "shared shuffle",
    (
      (
        "data/input_pipeline",
        "    ids = shuffle.example_id("
        "recipe, source.num_examples, epoch, tf.range(first, first + size))\n",
        "    share = source.num_examples // recipe.workers\n"
        "    own = step_in_epoch * n + start + tf.range(size, dtype=tf.int64)\n"
        "    ids = worker * share + shuffle.example_id(recipe, share, epoch, own)\n",
      ),
    ),
  ),
  Mutation(
    "shuffle the same every epoch",
    "reshuffled each epoch",
    (("data/shuffle", "tf.cast(epoch, tf.int64)]", "tf.zeros([], tf.int64)]"),),
  ),
  Mutation(
    "warmup from 0",
    "warmup",
    (
      (
        "optim/schedule",
        "progress: reference + (peak - reference) * progress",
        "progress: peak * progress",
      ),
    ),
  ),
  Mutation(
    "warmup per epoch",
    "warmup",
    (
      (
        "optim/schedule",
        "step / self.warmup_steps",
        "step // self.steps_per_epoch * self.steps_per_epoch / self.warmup_steps",
      ),
    ),
  ),
  Mutation(
    "decay one step late",
    "step decay",
    (("optim/schedule", "tf.cast(step >= boundary", "tf.cast(step > boundary"),),
  ),
  Mutation(
    "stride on the 1×1",
    "network",
    (
      (
        "models/resnet",
        'layers.unit(x, filters, 1, 1, f"{name}_1")',
        'layers.unit(x, filters, 1, strides, f"{name}_1")',
      ),
      (
        "models/resnet",
        'layers.unit(y, filters, 3, strides, f"{name}_2")',
        'layers.unit(y, filters, 3, 1, f"{name}_2")',
      ),
    ),
  ),
  Mutation(
    "last γ not zero",
    "initial γ",
    (("models/resnet", 'f"{name}_bn", self.last_gamma)', 'f"{name}_bn")'),),
  ),
  Mutation(
    "rate scaled by k alone",
    "scaling rule",
    (
      (
        "optim/optimizers",
        "    global_batch_size=recipe.global_batch_size,\n    reference_learning",
        "    global_batch_size=recipe.workers * recipe.reference_batch_size,\n"
        "    reference_learning",
      ),
    ),
  ),
  Mutation(
    "moving statistics divided by n",
    "moving statistics",
    (
      (
        "training/passes",
        "share = workers_per_pass / workers",
        "share = 1 / batch[0].shape[0]",
      ),
    ),
  ),
  Mutation(
    "second decay lost",
    "step decay",
    (("optim/schedule", "** decays", "** tf.minimum(decays, 1)"),),
  ),
  Mutation(
    "the same images left out of every epoch",
    "every image once",
    (
      (
        "data/shuffle",
        "  return permute(recipe.seed, train_examples, epoch, position)\n",
        "  whole = train_examples // recipe.global_batch_size * recipe.global_batch_size\n"
        "  return permute(recipe.seed, whole, epoch, position)\n",
      ),
    ),
  ),
  Mutation(
    "Keras' own BN",
    "network",
    (
      (
        "models/networks",
        'if purpose != "export":',
        'if purpose == "never":',
      ),
    ),
  ),
  Mutation(
    "biases on the convolutions",
    "variables",
    (("models/resnet", "use_bias=False", "use_bias=True"),),
  ),
  Mutation(
    "one seed for all kernels",
    "initial kernels",
    (("models/resnet", 'return zlib.crc32(f"{self.seed}/{name}".encode())', "return self.seed"),),
  ),
  Mutation(
    "a worker's batch padded",
    "BN groups",
    (
      # As if to reach a multiple of 8: the loss masks the image of zeros, but BN sees it.
      (
        "training/step",
        "    images, labels = batch\n",
        "    images, labels = batch\n"
        "    images = tf.pad(images, [[0, 1], [0, 0], [0, 0], [0, 0]])\n",
      ),
      (
        "training/step",
        "    loss = _loss_sum(recipe, labels, logits) / images_in_step\n",
        "    logits = logits[:-1]\n    loss = _loss_sum(recipe, labels, logits) / images_in_step\n",
      ),
    ),
  ),
)
