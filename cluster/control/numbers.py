"""What the controller shows on its metrics page, as plain values taken from its state. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster.control.plan import Outcome
from cluster.control.state import ControllerState, HostState
from cluster.control.status import placement_of
from cluster.control.steer import doubt_of
from experts.placement import ExpertKey
from experts.reports import ClusterStatus

REPLICA_STATES = ("serving", "loading", "draining", "lost")
"""In the placement; ordered and not there yet; there and not wanted any more; wanted of a host that is lost."""


@dataclass(frozen=True, kw_only=True)
class PlannerNumbers:
    """What the control loop measured, decided and did; as it stands here where there are no experts to place.

    `holding` is why it acts on no load, empty while it does; `load_age_s` how old the last load is that it trusted.
    `imbalance` by layer: time of the slowest host over the mean, as measured. Balances are mean over slowest, of the
    worst layer that the last plan changed whose moves are done; before the first is done, what it was to bring.
    `decisions` by what came of them, `moves` now by state, `moves_ended` by outcome, `moved_bytes` and `move_s` of all
    moves that ended well. `hosts_wanted` is 0 until somebody counted.
    """

    is_planning: bool = False
    holding: str = ""
    load_age_s: float = 0.0
    imbalance: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    balance_before: float = 0.0
    balance_predicted: float = 0.0
    balance_realised: float = 0.0
    decisions: Mapping[Outcome, int] = field(default_factory=lambda: MappingProxyType({}))
    moves: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    moves_ended: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    moved_bytes: int = 0
    move_s: float = 0.0
    hosts_wanted: int = 0


@dataclass(frozen=True, kw_only=True)
class ControllerNumbers:
    """All of it. `replicas` counts those of each expert by state."""

    status: ClusterStatus
    replicas: Mapping[ExpertKey, Mapping[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    planner: PlannerNumbers = field(default_factory=PlannerNumbers)


def planner_of(state: ControllerState) -> PlannerNumbers:
    """What the control loop is at."""
    placement, trusted, history = placement_of(state), state.planning.trusted, state.journal.history
    measured = [applied for applied in history if applied.realised is not None]
    last = (measured or history or (None,))[-1]
    return PlannerNumbers(
        is_planning=placement.rebalances,
        holding=doubt_of(state) if placement.rebalances and state.moving.goal else "",
        load_age_s=max(0.0, state.ticked_at - trusted.at) if trusted is not None else 0.0,
        imbalance=placement.imbalance,
        balance_before=(last.before if last else None) or 0.0,
        balance_predicted=(last.predicted if last else None) or 0.0,
        balance_realised=(last.realised if last else None) or 0.0,
        decisions=state.decisions,
        moves={"loading": placement.loading, "draining": placement.draining},
        moves_ended={
            "done": state.num_loaded,
            "failed": state.num_not_loaded,
            "abandoned": state.num_given_up - state.num_not_loaded,
        },
        moved_bytes=state.num_loaded * placement.expert_bytes,
        move_s=state.move_s,
        hosts_wanted=state.plan.size.hosts if state.plan is not None else 0,
    )


def replicas_of(state: ControllerState) -> dict[ExpertKey, Counter[str]]:
    """How many replicas of each expert are in which of REPLICA_STATES."""
    counts: dict[ExpertKey, Counter[str]] = {key: Counter() for key in state.journal.target}
    for host in state.hosts.values():
        for key, where in _replicas_on(host):
            counts.setdefault(key, Counter())[where] += 1
    return counts


def _replicas_on(host: HostState) -> Iterable[tuple[ExpertKey, str]]:
    if host.lost:
        return [(key, "lost") for key in host.duty]
    held = frozenset() if host.report is None else host.report.held
    wanted = [(key, "serving" if key in host.serving else "loading") for key in host.duty]
    return [*wanted, *((key, "draining") for key in held - host.duty)]
