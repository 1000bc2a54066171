"""What processes tell the controller and what it tells them, besides the cluster view. Immutable values.

Hosts, routers and ingresses fill reports from their own numbers; the wire and the controller only read them.
"""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class HostOrder:
    """`target` is the whole set to hold: load what is missing, evict the rest. `retire`: exit for good."""

    target: frozenset[ExpertKey] = frozenset()
    retire: bool = False


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
    KV cache, both in tokens.
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
