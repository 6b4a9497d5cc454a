"""Which of a strategy's replicas this task has."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Place:
  """Which replicas this task has.

  Attributes:
    strategy: of the model.
    first: index of this task's first replica.
    local: this task's replicas.
  """

  strategy: tf.distribute.Strategy
  first: int
  local: int

  @classmethod
  def of(cls, strategy: tf.distribute.Strategy) -> "Place":
    resolver = strategy.cluster_resolver
    tasks = len(resolver.cluster_spec().as_dict().get("worker", [])) if resolver else 0
    local = strategy.num_replicas_in_sync // max(tasks, 1)
    return cls(strategy, (resolver.task_id if tasks else 0) * local, local)

  @property
  def replicas(self) -> int:
    return self.strategy.num_replicas_in_sync

  @property
  def alone(self) -> bool:
    """Whether there is no other task."""
    return self.local == self.replicas

  @property
  def is_chief(self) -> bool:
    return self.first == 0

  def distribute(self, parts: list):
    """One value per local replica, as an argument of `strategy.run`."""
    if self.replicas == 1:
      return parts[0]
    return self.strategy.experimental_distribute_values_from_function(
      lambda context: parts[context.replica_id_in_sync_group - self.first]
    )
