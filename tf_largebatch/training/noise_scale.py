"""The gradient noise scale, measured from the spread of the passes' gradients in a step.

With g_i the mean gradient of the b = g·n images of pass i (of P), Ḡ their mean over the kn images
of the step, and N training images, drawn without replacement,

    tr Σ = b · P / (P − 1) · (mean_i |g_i|² − |Ḡ|²)         variance of one image's gradient
    |G|² = |Ḡ|² − tr Σ / kn · (1 − kn / N)                  square of the true gradient
    B    = tr Σ / |G|²                                      the noise scale, "B_simple"
    r    = k (B + n) / (B + kn)                             AdaScale's gain

Both estimates are unbiased. A single step's are noisy, so B and r come from running averages.
At a minibatch of B images, noise and signal of the gradient are equal. k workers with k times the
rate get as far in one step as one worker in r steps: r is near k while kn is far below B, and
near 1 + B / n far above it.

With batch normalisation, an image's gradient depends on the n images that it is normalised with;
tr Σ is then n times the variance of a worker's gradient.

Source: McCandlish et al. 2018 (arXiv 1812.06162), appendix A; Johnson et al. 2020 (arXiv
2007.05105), proposition 1.
"""

import math

from tf_largebatch.recipe import Recipe

# Steps in which a running average forgets all but 1/e.
_MEMORY = 100


def estimate(squared_norms, squared_norm, passes: int, images: int, population: int | None = None):
  """The estimates of one step.

  Args:
    squared_norms: Σ_i |p_i|², where p_i is what pass i adds to the step's gradient: g_i / P.
    squared_norm: |Ḡ|².
    passes: P, at least 2.
    images: kn.
    population: N; None: without end.

  Returns:
    (tr Σ, |G|²); each can be negative.
  """
  mean = passes * squared_norms  # Of the |g_i|².
  variance = images / (passes - 1) * (mean - squared_norm)
  left = 1 - images / population if population else 1.0
  return variance, squared_norm - variance / images * left


class NoiseScale:
  """Running averages of the estimates, from one training record to the next.

  Args:
    recipe: resolved.
    records: the training records so far, as in `metrics.jsonl`, from which a run that continues
      takes up its averages.
  """

  def __init__(self, recipe: Recipe, records: list[dict] = ()):
    self._recipe = recipe
    self._variance = self._squared_norm = 0.0
    self._step = 0
    for record in records:
      if record["kind"] == "train" and "gradient_variance" in record:
        self.update(record["step"], record["gradient_variance"], record["squared_gradient"])

  def update(self, step: int, variance: float, squared_norm: float) -> dict[str, float]:
    """Takes in a record's means and returns its scalars.

    Args:
      step: steps done.
      variance, squared_norm: means of tr Σ and |G|² over the steps since the last record.

    Returns:
      adascale_gain, and, unless the averages see no gradient above the noise, noise_scale.
    """
    kept = math.exp((self._step - step) / _MEMORY)
    self._step = step
    # Both begin at 0, which cancels in their ratio.
    self._variance = kept * self._variance + (1 - kept) * variance
    self._squared_norm = kept * self._squared_norm + (1 - kept) * squared_norm
    k, n = self._recipe.workers, self._recipe.per_worker_batch_size
    noise, signal = max(self._variance, 0.0), max(self._squared_norm, 0.0)
    scalars = {}
    if signal > 0:
      scalars["noise_scale"] = noise / signal
    if noise + signal > 0:
      # k (B + n) / (B + kn), for |G|² = 0 too.
      scalars["adascale_gain"] = k * (noise + n * signal) / (noise + k * n * signal)
    return scalars
