"""All that a router knows of its hosts and of what is under way to them; core has the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from experts.placement import ComputeCost, ExpertKey, Placement
from router.failover.attention import Attention
from router.failover.budget import HedgeBudget
from router.failover.flight import Dispatch, Flight
from router.failover.health import Link

ASSUMED_COST = ComputeCost(per_expert_s=3e-4, per_row_s=1e-5)
"""Of a host that has not told what it measured."""
TYPICAL_WEIGHT = 1 / 32
WAY_S, WAY_WITHIN_NODE_S = 1e-3, 5e-4


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The patience of a router, in seconds."""

    base_s: float = 2.0
    """The hard bound of a dispatch, `per_row_s` more for each of its rows: what is not answered then is lost to the
    step."""
    per_row_s: float = 0.02
    floor_s: float = 0.02
    """An answer is never overdue before this."""
    probe_s: float = 2.0
    """The same bound for a probe."""


@dataclass(slots=True, kw_only=True, eq=False)
class FailoverState:
    """One router's. `placement` is that of the current step, `newest` the one that the next step begins with."""

    policy: Policy = field(default_factory=Policy)
    node: str = ""
    placement: Placement = field(default_factory=Placement)
    newest: Placement = field(default_factory=Placement)
    give_up_at: float = float("inf")
    links: dict[str, Link] = field(default_factory=dict)
    flights: dict[int, Flight] = field(default_factory=dict)
    dispatches: dict[int, Dispatch] = field(default_factory=dict)
    """Those that still wait for rows."""
    attention: Attention = field(default_factory=Attention)
    budget: HedgeBudget = field(default_factory=HedgeBudget)
    next_shipment: int = 0
    check_at: float = float("inf")
    """No verdict is due before this, in time of attention."""
    probe_at: float = float("inf")
    """Nor a probe before this."""
    hedges: Counter[str] = field(default_factory=Counter)
    """By outcome: `won` when they brought rows, `late` when not, `failed`, and `denied` by the budget."""
    failovers: Counter[str] = field(default_factory=Counter)
    """By reason: shipments whose rows went, or were to go, to another host."""
    late_answers: int = 0
    """Answers that nobody waited for."""
    typical_pace: float = 1.0
    """Follows the paces of the hosts that answer: what those were that were not asked for long says nothing of now."""

    def usable(self, placement: Placement, key: ExpertKey) -> Iterator[Link]:
        """Links to the hosts that `placement` names and that may be sent rows."""
        for host in placement.hosts_of(key):
            link = self.links.get(host)
            if link is not None and link.rank() is not None:
                yield link


def is_available(state: FailoverState, keys: frozenset[ExpertKey]) -> bool:
    """Whether a step begun now would find a host for every one of `keys`."""
    return all(any(state.usable(state.newest, key)) for key in keys)


def next_timer(state: FailoverState) -> float:
    """When to look again, whatever comes: the earliest verdict, probe or deadline. Inf with nothing under way."""
    deadlines = [flight.deadline for flight in state.flights.values()]
    return min([state.check_at + state.attention.forgiven, state.probe_at, *deadlines])
