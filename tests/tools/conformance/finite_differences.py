"""Gradients by central differences."""

import numpy as np


def slope(function, array, direction, step):
  """Returns the central difference of function(), which reads `array`, along a direction."""
  original = array.copy()
  array[...] = original + step * direction
  ahead = function()
  array[...] = original - step * direction
  behind = function()
  array[...] = original
  return (ahead - behind) / (2 * step)


def assert_gradient(function, array, gradient, *, step=1e-5, tolerance=1e-8):
  """Checks every element of an array's gradient; the tolerance is relative to the largest."""
  assert gradient.shape == array.shape
  numeric = np.zeros_like(array)
  for index in np.ndindex(array.shape):
    direction = np.zeros_like(array)
    direction[index] = 1.0
    numeric[index] = slope(function, array, direction, step)
  np.testing.assert_allclose(gradient, numeric, rtol=0, atol=tolerance * np.abs(numeric).max())
