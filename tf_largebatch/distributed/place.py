"""Which of a strategy's replicas this task has."""

import dataclasses

import tensorflow as tf

from tf_largebatch.distributed.cluster import Cluster


@dataclasses.dataclass(frozen=True)
class Place:
  """A task's replicas among those of all tasks.

  Attributes:
    strategy: of the model.
    cluster: the tasks that the strategy connects, and which of them this is.
  """

  strategy: tf.distribute.Strategy
  cluster: Cluster

  @classmethod
  def of(cls, strategy: tf.distribute.Strategy) -> "Place":
    """Finds the tasks of any strategy for one task or for tasks that mirror each other."""
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict() if resolver else {}
    chiefs, workers = (list(jobs.get(job, [])) for job in ("chief", "worker"))
    if not workers:
      return cls(strategy, Cluster())
    before = len(chiefs) if resolver.task_type == "worker" else 0
    return cls(strategy, Cluster((*chiefs, *workers), before + resolver.task_id))

  @property
  def replicas(self) -> int:
    """How many there are over all tasks."""
    return self.strategy.num_replicas_in_sync

  @property
  def local(self) -> int:
    """How many this task has."""
    return self.replicas // self.cluster.num_tasks

  @property
  def first(self) -> int:
    """Index of this task's first replica."""
    return self.cluster.task_index * self.local

  @property
  def alone(self) -> bool:
    """Whether this is the only task."""
    return self.cluster.num_tasks == 1

  def distribute(self, parts: list):
    """One value per local replica, as an argument of `strategy.run`."""
    if self.replicas == 1:
      return parts[0]
    return self.strategy.experimental_distribute_values_from_function(
      lambda context: parts[context.replica_id_in_sync_group - self.first]
    )
