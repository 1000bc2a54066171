"""What processes tell the controller and what it tells them, besides the cluster view. Immutable values.

Hosts, routers and ingresses fill reports from their own numbers; the wire and the controller only read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from experts.placement import ComputeCost, ExpertKey, HostInfo, IngressInfo, RouterInfo


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """A host as it sees itself. `incarnation` names one life of the process and grows from life to life.

    `held` are the experts in its slots, computable now. `problem` says why an ordered one is not among them;
    it is empty while loading goes well.
    """

    name: str
    incarnation: int
    address: str = ""
    node: str = ""
    pid: int = 0
    metrics_address: str = ""
    transport: str = "grpc"
    held: frozenset[ExpertKey] = frozenset()
    held_bytes: int = 0
    rows_total: int = 0
    problem: str = ""
    cost: ComputeCost | None = None
    """What its arithmetic takes; None until it was measured."""
    failed: frozenset[ExpertKey] = frozenset()
    """What it could not load when it followed order number `order`."""
    order: int = 0
    rows: Mapping[ExpertKey, int] = field(default_factory=dict)
    """Rows computed since its start, of every expert that had any."""
    num_shipments: int = 0
    compute_s: float = 0.0
    num_damaged: int = 0
    """Slots whose weights were found changed, fenced and loaded anew since its start."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A host to load an expert from: it is asked for it as `name` at `address`."""

    name: str
    address: str


@dataclass(frozen=True, kw_only=True)
class HostOrder:
    """`target` is the whole set to hold: load what is missing, evict the rest. `retire`: exit for good.

    What has one of `peers` is loaded from there, at no more than `bytes_per_s` (0: as fast as it goes), the rest and
    what fails from disk. `number` differs from order to order.
    """

    target: frozenset[ExpertKey] = frozenset()
    retire: bool = False
    peers: Mapping[ExpertKey, Peer] = field(default_factory=dict)
    bytes_per_s: float = 0.0
    number: int = 0


class MemberKind(StrEnum):
    """Who attends to the cluster view."""

    ROUTER = "router"
    INGRESS = "ingress"


@dataclass(frozen=True, kw_only=True)
class MemberReport:
    """A router or an ingress as it sees itself.

    `address` is a router's Submit listener, `http` an ingress's URL. `view_version` and `view_epoch` are
    those of the last view it has. `inner_host` is the host inside a router that computes experts itself.
    `max_model_len` is a router's limit on prompt and answer together, `kv_tokens` what all its requests can have in the
    KV cache, both in tokens. `hosts` are the states of hosts as a router sees them; for `longest_wait_s` waits the
    request that came first of those that have not begun, None where nobody knows.
    """

    kind: MemberKind
    name: str
    address: str = ""
    node: str = ""
    pid: int = 0
    state: str = "ready"
    running: int = 0
    waiting: int = 0
    metrics_address: str = ""
    http: str = ""
    view_version: int = 0
    view_epoch: int = 0
    inner_host: HostReport | None = None
    problem: str = ""
    max_model_len: int = 0
    kv_tokens: int = 0
    hosts: Mapping[str, str] = field(default_factory=dict)
    longest_wait_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class ControllerInfo:
    """The controller itself. `term` counts its lives; `version` is that of the last published view; `prometheus` is the
    URL that it reads the load from, empty where it reads the pages itself."""

    pid: int = 0
    address: str = ""
    node: str = ""
    epoch: int = 0
    version: int = 0
    term: int = 0
    metrics_address: str = ""
    prometheus: str = ""


@dataclass(frozen=True, kw_only=True)
class PlacementStatus:
    """How experts are placed and moved. Imbalances (slowest host over mean) are by layer, of the last trusted load;
    balances (mean over slowest) are those of the last plan whose moves are done. `held_by` says what keeps the load
    from being acted upon; empty when nothing does."""

    rebalances: bool = False
    held_by: str = ""
    is_moving: bool = False
    loading: int = 0
    draining: int = 0
    loaded_total: int = 0
    given_up_total: int = 0
    plans_total: int = 0
    expert_bytes: int = 0
    imbalance: Mapping[int, float] = field(default_factory=dict)
    replicas: Mapping[ExpertKey, int] = field(default_factory=dict)
    predicted: float | None = None
    realised: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """All that `herd status` shows. `problems` are plain sentences on what is wrong now."""

    name: str = ""
    controller: ControllerInfo = field(default_factory=ControllerInfo)
    ingresses: tuple[IngressInfo, ...] = ()
    routers: tuple[RouterInfo, ...] = ()
    hosts: tuple[HostInfo, ...] = ()
    replicas_held: int = 0
    replicas_wanted: int = 0
    draining: bool = False
    problems: tuple[str, ...] = ()
    placement: PlacementStatus = field(default_factory=PlacementStatus)


@dataclass(frozen=True, kw_only=True)
class AppliedPlan:
    """A plan that was applied `age_s` ago, while the placement was that of `epoch`. Balances are mean over slowest
    host, of the worst layer that it changed; None where nobody knows."""

    age_s: float
    epoch: int
    loads: int
    moved_bytes: int
    before: float | None
    predicted: float | None
    realised: float | None
    took_s: float | None
    why: str
    is_undone: bool


@dataclass(frozen=True, kw_only=True)
class CountedRows:
    """Rows of every expert that one life of a host has computed."""

    host: str
    incarnation: int
    rows: Mapping[ExpertKey, int]
