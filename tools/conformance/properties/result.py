"""The result of checking one property."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Result:
  """One property, which holds if the measured deviation is at most the limit.

  Attributes:
    name: of the property.
    deviation, limit: what was measured, and the most that is allowed.
    meaning: what the deviation measures, and its unit.
  """

  name: str
  deviation: float
  limit: float
  meaning: str

  @property
  def holds(self) -> bool:
    return self.deviation <= self.limit  # False for NaN.
