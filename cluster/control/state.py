"""What the controller knows, what happens to it, and what it wants done. Plain values; the rules are in core.

Times are seconds of any clock that only runs forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster.control.fleet import Load
from cluster.control.loop import Applied, Planned
from cluster.control.move_state import Limits, MoveState
from cluster.control.plan import Outcome, Plan, PlanState, Policy
from cluster.control.replicas import Replicas
from cluster.control.scale import ScaleState, Scaling
from cluster.control.trouble import Trouble
from experts.placement import ClusterView, ExpertKey, Placement
from experts.reports import HostOrder, HostReport, MemberReport


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The controller's patience, in seconds."""

    lost_after: float = 3.0
    """Without a report for so long, a host is lost and a member is gone."""
    batch: float = 0.5
    """Additions to the placement are published at most this often while hosts are still loading."""
    restart_lost: float = 10.0
    """A lost host is started again after this, should nobody else have done it."""
    rehome: float = 30.0
    """The experts of a host that says nothing for so long go to others until it is back."""
    rehome_at_start: float = 300.0
    """The same for a host of a new cluster that never said anything."""
    ensure_again: float = 20.0
    """A host that was started and still says nothing is started once more after this."""
    stall: float = 1.5
    """A pause between ticks longer than this was the controller's own: nobody is blamed for it."""
    alone: float = 60.0
    """Without any router or ingress for so long, the cluster is not wanted any more."""
    alone_at_start: float = 600.0
    """The same before the first one came."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How experts are placed: whether the load is acted upon, and what hosts have room for.

    Each host has room for its share of `num_replicas` of every expert, and `extra_slots` in every layer. Without
    `scaling` only persons add and drain hosts.
    """

    rebalances: bool = False
    num_replicas: int = 1
    extra_slots: int = 0
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    scaling: Scaling | None = None


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What outlives the controller. `replicas` is the placement published under `epoch`, `target` what shall be once
    every host is there, and `moves` the way there; None before the first life.

    `away` are hosts whose experts others hold meanwhile, `draining` those that are emptied for good, or were. `added`
    are hosts beyond those that the cluster began with; until they first report, they are away. Names from number
    `next_host` on were never used. Until `sized_until` the load neither adds nor drains hosts, since a person has.
    `history` are the plans that were applied, the last one last. Until `kept_until` the load moves nothing, since a
    person has. `digest` names the settings that `target` was made from; `port` is that of the control listener.
    """

    digest: str
    target: Replicas
    term: int = 0
    epoch: int = 0
    replicas: Replicas = field(default_factory=lambda: MappingProxyType({}))
    port: int = 0
    away: frozenset[str] = frozenset()
    draining: frozenset[str] = frozenset()
    added: tuple[str, ...] = ()
    next_host: int = 0
    sized_until: float = 0.0
    moves: MoveState | None = None
    history: tuple[Applied, ...] = ()
    kept_until: float = 0.0


@dataclass(frozen=True, kw_only=True)
class HostState:
    """One wanted host. `target` is what it shall hold, `duty` what of it routers shall use, `serving` what it holds
    and the placement may list.

    `stream` names the connection that its reports come on; orders go there, and `ordered` is the last one.
    """

    target: frozenset[ExpertKey]
    duty: frozenset[ExpertKey]
    start_at: float
    """When to start it unless it reports before."""
    report: HostReport | None = None
    heard_at: float = 0.0
    stream: int | None = None
    ordered: HostOrder | None = None
    lost: bool = False
    serving: frozenset[ExpertKey] = frozenset()
    trouble: Trouble = field(default_factory=Trouble)


@dataclass(frozen=True, kw_only=True)
class MemberState:
    """A router or an ingress that reports."""

    report: MemberReport
    heard_at: float


@dataclass(frozen=True, kw_only=True)
class ControllerState:
    """All of it. `view` is the last published one; None until the first. `moving` is the one owner of where an expert
    shall be: hosts hold what it says, and what it publishes is published of what they hold.

    `hold_until`: after a restart nothing is published or moved before this, or before every host has reported,
    because a view made from half of the reports would take serving replicas away. `is_resumed`: that is over.
    `sizing` is how long hosts have been too busy or too idle; `welcomed` are added hosts that were given their share.
    `plan` is the last one made, `load` what was read last, `load_missing` why nothing was;
    `alarms` are the last ones, with their times. Numbers are of this life; `decisions` counts plans by what came of
    them, `move_s` is how long loads took that ended well, from order to serving.
    """

    journal: Journal
    moving: MoveState
    hosts: Mapping[str, HostState]
    ticked_at: float
    alone_since: float
    hold_until: float
    published_at: float = float("-inf")
    members: Mapping[str, MemberState] = field(default_factory=lambda: MappingProxyType({}))
    had_members: bool = False
    view: ClusterView | None = None
    version: int = 0
    draining: bool = False
    timing: Timing = field(default_factory=Timing)
    steering: Steering = field(default_factory=Steering)
    is_resumed: bool = False
    planning: PlanState = field(default_factory=PlanState)
    planned_at: float = float("-inf")
    plan: Plan | None = None
    load: Load | None = None
    load_missing: str = ""
    sizing: ScaleState = field(default_factory=ScaleState)
    welcomed: frozenset[str] = frozenset()
    num_orders: int = 0
    num_loaded: int = 0
    num_given_up: int = 0
    num_not_loaded: int = 0
    move_s: float = 0.0
    decisions: Mapping[Outcome, int] = field(default_factory=lambda: MappingProxyType({}))
    alarms: tuple[tuple[float, str], ...] = ()

    @property
    def placement(self) -> Placement:
        """The published placement."""
        return Placement(epoch=self.journal.epoch, replicas=self.journal.replicas)


@dataclass(frozen=True, kw_only=True)
class HostReported:
    """A host's report came on connection `stream`."""

    report: HostReport
    stream: int


@dataclass(frozen=True, kw_only=True)
class HostGone:
    """Connection `stream` of a host ended."""

    name: str
    stream: int


@dataclass(frozen=True, kw_only=True)
class MemberReported:
    """A router's or ingress's report came."""

    report: MemberReport


@dataclass(frozen=True, kw_only=True)
class MemberLeft:
    """A router or an ingress said that it ends. One that only falls silent is given time."""

    name: str


@dataclass(frozen=True, kw_only=True)
class DrainAsked:
    """No new requests from now on."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, kw_only=True)
class LoadRead:
    """What was measured lately; None when it could not be read, for the reason `missing`. The control loop takes its
    turn. `ahead` is a plan that was made elsewhere meanwhile; None: it is made now, if there is to be one."""

    load: Load | None
    missing: str = ""
    ahead: Planned | None = None


@dataclass(frozen=True, kw_only=True)
class PlanAsked:
    """A person wants a plan applied now, made from `load`, or from what is measured where that is None."""

    load: Load | None


@dataclass(frozen=True, kw_only=True)
class TargetAsked:
    """A person wants experts to be on these hosts."""

    replicas: Replicas


@dataclass(frozen=True, kw_only=True)
class MoveAsked:
    """A person wants an expert on host `to` instead of on one that has it."""

    key: ExpertKey
    to: str


@dataclass(frozen=True, kw_only=True)
class HostDrainAsked:
    """A person wants a host emptied, and its process ended."""

    name: str


@dataclass(frozen=True, kw_only=True)
class RollbackAsked:
    """A person wants experts to be where they were meant to be under `epoch`; None: before the last plan."""

    epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class HostsAsked:
    """A person wants so many hosts."""

    number: int


Asked = PlanAsked | TargetAsked | MoveAsked | HostDrainAsked | RollbackAsked | HostsAsked
"""These raise InvalidInput when they cannot be done, and then change nothing."""

Event = HostReported | HostGone | MemberReported | MemberLeft | DrainAsked | Tick | LoadRead | Asked


@dataclass(frozen=True, kw_only=True)
class PublishView:
    """Send `view` to every member."""

    view: ClusterView


@dataclass(frozen=True, kw_only=True)
class SendOrder:
    """Send `order` on connection `stream` of host `name`."""

    name: str
    stream: int
    order: HostOrder


@dataclass(frozen=True, kw_only=True)
class EnsureHost:
    """Start the process of host `name` unless there is one."""

    name: str


@dataclass(frozen=True, kw_only=True)
class EndHost:
    """Host `name` is not waited for any more: let its process not start, or end."""

    name: str


@dataclass(frozen=True, kw_only=True)
class AskRoom:
    """So many hosts are wanted: have machines added or released, where somebody can."""

    num_hosts: int


@dataclass(frozen=True, kw_only=True)
class WriteJournal:
    """Make `journal` durable before any later effect."""

    journal: Journal


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Nobody wants this cluster any more: end its hosts and the controller."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Alarmed:
    """Tell people."""

    text: str


Effect = PublishView | SendOrder | EnsureHost | EndHost | AskRoom | WriteJournal | Leave | Alarmed
