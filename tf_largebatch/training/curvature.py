"""The curvature of a step's loss, measured by Hessian-vector products.

With L the mean loss over the kn images of a step, in training mode and without weight decay, G its
gradient and H its Hessian with respect to the weights,

    batch sharpness       G·HG / |G|²            the curvature along the step's gradient
    largest eigenvalue    max of v·Hv, |v| = 1

On a quadratic with this largest eigenvalue, gradient descent at a rate η is stable below 2 / η,
with the momentum m below (2 + 2m) / η, and with Nesterov's below (2 + 2m) / (η (1 + 2m)).

Both come from the Lanczos iteration that begins at G. After j products with H,

    β_j v_{j+1} = H v_j − α_j v_j − β_{j−1} v_{j−1},   α_j = v_j·H v_j,   |v_{j+1}| = 1,

so α_1 is the batch sharpness. The largest eigenvalue θ of the tridiagonal matrix of the α and β
approaches that of H. With s its unit eigenvector, an eigenvalue of H lies within the residual
β_j |s_j| of θ. Power iteration would need more products, and finds nothing where the smallest
eigenvalue is near minus the largest, as in ReLU networks. Only the last two vectors are kept: as
the others lose their orthogonality, eigenvalues that have been found come again, which does not
change the largest.

Like the step, a product is a sum over workers with one all-reduce: where they run changes the order
of the sums only.

Source: Andreyev and Beneventano 2024 (arXiv 2412.20553) for the sharpness; Cohen et al. 2021 (arXiv
2103.00065), appendix B, for the bounds; Pearlmutter 1994 for the products; Paige 1972 for Lanczos.
"""

import math
import re
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tf_largebatch.errors import UserError
from tf_largebatch.options import RunOptions
from tf_largebatch.recipe import Recipe
from tf_largebatch.training import passes
from tf_largebatch.training.passes import Variables
from tf_largebatch.training.step import make_forward

_MAX_PRODUCTS = 100
# A LookupError with this message, which AutoGraph raises as an error of its own.
_NO_DERIVATIVE = re.compile(r"gradient registry has no entry for: (\w+)")


def make_curvature(
  strategy: tf.distribute.Strategy,
  model: keras.Model,
  precise: keras.Model,
  recipe: Recipe,
  options: RunOptions,
  tolerance: float = 0.01,
) -> Callable:
  """Builds the measurement.

  Args:
    strategy: whose replicas share it.
    model: whose weights are measured.
    precise: the same network in the weights' dtype, in which it is computed: differences of
      bfloat16 numbers are too coarse for a second derivative.
    recipe: resolved.
    options: of these, workers_per_pass (None: 1) and those of the all-reduce.
    tolerance: of the residual, as a share of the eigenvalue.

  Returns:
    A function of one element of a distributed `input_pipeline.train_dataset`. It changes nothing
    and returns scalars by name: batch_sharpness, largest_eigenvalue, and eigenvalue_residual, which
    is above the tolerance only if 100 products were not enough. It returns none of them if the
    gradient is 0 or not finite.

    It raises a UserError if an operation of the network has no second derivative.
  """
  begin, advance = _make_iteration(strategy, model, precise, recipe, options)

  def curvature(batch) -> dict[str, float]:
    alphas, betas = [], []
    try:
      vector, previous = begin(batch)
      for _ in range(_MAX_PRODUCTS):
        beta = tf.constant(betas[-1] if betas else 0.0, tf.float64)
        (vector, previous), alpha, beta = advance(batch, vector, previous, beta)
        alphas.append(float(alpha))
        betas.append(float(beta))
        if not math.isfinite(alphas[-1] + betas[-1]):
          return {}
        largest, residual = _largest_eigenvalue(alphas, betas)
        if residual <= tolerance * abs(largest):
          break
    except Exception as error:
      operation = _NO_DERIVATIVE.search(str(error))
      if not operation:
        raise
      raise UserError(
        f"--curvature_every_steps does not work with network={recipe.network}, which has no second "
        f"derivative (that of {operation[1]} is unknown); leave it out."
      ) from error
    return {
      "batch_sharpness": alphas[0],
      "largest_eigenvalue": largest,
      "eigenvalue_residual": residual,
    }

  return curvature


def _largest_eigenvalue(alphas: list[float], betas: list[float]) -> tuple[float, float]:
  """The largest eigenvalue of the tridiagonal matrix, and its residual in H."""
  values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], -1))  # Its lower half.
  return float(values[-1]), betas[-1] * abs(float(vectors[-1, -1]))


def _make_iteration(strategy, model, precise, recipe: Recipe, options: RunOptions):
  """Builds two functions of a batch.

  Returns:
    begin: returns (v_1, v_0), where v_0 = 0.
    advance: of v_j, v_{j−1} and β_{j−1} too; returns (v_{j+1}, v_j), α_j and β_j, the latter the
      same numbers on all tasks.
  """
  variables, forward = Variables.of(model), make_forward(precise, recipe)
  workers_on_replica = recipe.workers // strategy.num_replicas_in_sync

  def total_gradient(forward, batch):
    """The gradient of what `forward` returns, summed over all workers."""
    replica = tf.distribute.get_replica_context()
    scalar = tf.TensorSpec([], model.trainable_variables[0].dtype)
    sums = passes.make_replica_sums(
      forward, recipe.workers, [scalar, scalar], options.workers_per_pass or 1
    )
    first = replica.replica_id_in_sync_group * workers_on_replica
    gradients, *_ = sums(variables.values(), first, batch)
    return passes.total(gradients, [], options)[0]

  def replica_begin(*batch):
    gradient = total_gradient(forward, batch)
    norm = tf.linalg.global_norm(gradient)
    return [part / norm for part in gradient], [tf.zeros_like(part) for part in gradient]

  def replica_advance(batch, vector, previous, beta):
    def slope(values, worker, batch):
      with tf.GradientTape() as tape:
        tape.watch(values.weights)
        loss, *others = forward(values, worker, batch)
      return (_dot(tape.gradient(loss, values.weights), vector), *others)

    product, beta = total_gradient(slope, batch), tf.cast(beta, vector[0].dtype)
    alpha = _dot(vector, product)
    triples = zip(product, vector, previous, strict=True)
    rest = [p - alpha * v - beta * before for p, v, before in triples]
    beta = tf.linalg.global_norm(rest)
    # Tasks with other processors may round these otherwise, and would end after other products.
    replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    _, scalars = passes.total([], [alpha / replicas, beta / replicas])
    return ([part / beta for part in rest], vector), *scalars

  @tf.function(autograph=False)
  def begin(batch):
    return strategy.run(replica_begin, args=tuple(batch))

  @tf.function(autograph=False)
  def advance(batch, vector, previous, beta):
    vectors, *scalars = strategy.run(replica_advance, args=(batch, vector, previous, beta))
    return vectors, *(strategy.experimental_local_results(value)[0] for value in scalars)

  return begin, advance


def _dot(some: list, others: list):
  return tf.add_n([tf.reduce_sum(a * b) for a, b in zip(some, others, strict=True)])
