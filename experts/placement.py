"""Where experts live: the placement and the cluster view that carries it. Immutable; time is no concern.

Everything that routes rows reads these; only the controller makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ExpertKey = tuple[int, int]
"""(layer, expert): the one name of a routed expert everywhere outside a host."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """(layer, expert) → names of the hosts that serve a replica. `epoch` only grows."""

    epoch: int = 0
    replicas: Mapping[ExpertKey, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def hosts_of(self, key: ExpertKey) -> tuple[str, ...]:
        """Names of the hosts that serve `key`; empty when none does."""
        return self.replicas.get(key, ())


@dataclass(frozen=True, kw_only=True)
class ComputeCost:
    """What a host's arithmetic takes, in seconds: an expert that is touched at all, and each of its rows besides.

    Few rows cost what one costs, since the expert's weights are read once whatever their number.
    """

    per_expert_s: float
    per_row_s: float

    def of(self, num_experts: int, num_rows: int) -> float:
        """Seconds for `num_rows` rows of `num_experts` experts."""
        return num_experts * self.per_expert_s + num_rows * self.per_row_s


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """A host as the controller last saw it. `address` is where routers reach it ("ip:port").

    `incarnation` names one life of the host's process: it differs after every restart.
    """

    name: str
    incarnation: int
    address: str
    node: str = ""
    pid: int = 0
    state: str = "loading"
    """"loading" until it holds all it was told to hold, then "ready"; "lost" when its reports stopped."""
    transport: str = "grpc"
    slots: int = 0
    """Number of experts it holds in slots now."""
    slots_target: int = 0
    rows_total: int = 0
    metrics_address: str = ""
    cost: ComputeCost | None = None
    """As the host measured it; None until it has."""


@dataclass(frozen=True, kw_only=True)
class RouterInfo:
    """A router as the controller last saw it. `address` is its internal Submit listener ("ip:port"). One request can
    have `max_model_len` tokens, all of them together `kv_tokens`."""

    name: str
    address: str
    node: str = ""
    pid: int = 0
    state: str = "ready"
    running: int = 0
    waiting: int = 0
    metrics_address: str = ""
    max_model_len: int = 0
    kv_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class IngressInfo:
    """An ingress as the controller last saw it. `http` is the URL that its node's proxy listens on."""

    name: str
    node: str = ""
    pid: int = 0
    http: str = ""
    metrics_address: str = ""


@dataclass(frozen=True, kw_only=True)
class ClusterView:
    """What the controller streams to everyone; receivers keep the last one when it is gone.

    `placement` lists only replicas that are loaded and serving. `version` grows with every published view,
    `placement.epoch` only when the placement changed. `draining`: the cluster takes no new requests.
    """

    version: int = 0
    placement: Placement = field(default_factory=Placement)
    hosts: Mapping[str, HostInfo] = field(default_factory=lambda: MappingProxyType({}))
    routers: Mapping[str, RouterInfo] = field(default_factory=lambda: MappingProxyType({}))
    draining: bool = False
