"""What moving replicas knows, what happens to it, and what it wants done. Plain values; the rules are in moves.

Times are seconds of any clock that only runs forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster.control.draft import Replica
from cluster.control.replicas import Replicas


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`staging` slots of each host beyond those that are planned with let a full host load before it evicts.

    Loads are started so that all together take `bytes_per_s`, `loads_at_once` of them at a time, one on each host and
    one from each host. Of experts with less than `min_replicas` every host that shall have one loads one at a time, and
    nothing else does meanwhile. A load that takes longer than `patience` times as long as it should, and `base_s`, is
    given up.
    """

    min_replicas: int = 1

    staging: int = 1
    loads_at_once: int = 4
    bytes_per_s: float = 1e9
    patience: float = 4.0
    base_s: float = 10.0
    drain_s: float = 0.25
    """A shipment that comes later is answered that the expert is not there, and goes to another replica."""

    def deadline_s(self, num_bytes: int) -> float:
        return self.base_s + self.patience * num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A load under way since `begun`: from host `source`, or from disk where that is empty."""

    source: str
    begun: float
    deadline: float


@dataclass(frozen=True, kw_only=True)
class MoveState:
    """`published` is what routers are told under `epoch`, `goal` what shall be.

    `draining` maps replicas that are no longer published to when they may be evicted. `next_load_at` keeps the rate.
    """

    published: Replicas
    goal: Replicas
    epoch: int = 0
    loading: Mapping[Replica, Loading] = field(default_factory=lambda: MappingProxyType({}))
    draining: Mapping[Replica, float] = field(default_factory=lambda: MappingProxyType({}))
    next_load_at: float = float("-inf")

    @property
    def is_done(self) -> bool:
        return not self.loading and not self.draining and same_replicas(self.published, self.goal)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Go to `replicas` from now on, whatever was under way."""

    replicas: Replicas


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """`replica` can be computed now."""

    replica: Replica


@dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """A host could not load `replica`: from its source, or at all when that was the disk."""

    replica: Replica
    why: str


@dataclass(frozen=True, kw_only=True)
class HostAway:
    """A host and all that it held is gone."""

    name: str


@dataclass(frozen=True, kw_only=True)
class TimePassed:
    """Nothing happened."""


MoveEvent = Goal | Loaded | NotLoaded | HostAway | TimePassed


@dataclass(frozen=True, kw_only=True)
class LoadReplica:
    """Tell its host to load `replica` from host `source`, or from disk where that is empty."""

    replica: Replica
    source: str


@dataclass(frozen=True, kw_only=True)
class PublishReplicas:
    """Tell routers to use `replicas`."""

    epoch: int
    replicas: Replicas


@dataclass(frozen=True, kw_only=True)
class EvictReplica:
    """Tell its host to give up `replica`, or to stop loading it."""

    replica: Replica


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Tell people. What was given up is out of the goal; the next plan decides anew."""

    text: str


MoveEffect = LoadReplica | PublishReplicas | EvictReplica | Alarm


def same_replicas(one: Replicas, other: Replicas) -> bool:
    """Whether both have the same experts on the same hosts, in whatever order."""
    return one is other or all(names is other[key] or set(names) == set(other[key]) for key, names in one.items())
