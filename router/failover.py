"""Decides where the rows of one dispatch go and what to do when a shipment fails: state + event → state + effects.

Pure: no clock, no network, no tensors. One state lives from `Begin` until nothing is waiting. Experts are named by key,
rows only counted; what a row contains is the shell's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from experts.placement import ExpertKey, Placement

ROWS_PER_WEIGHT_READ = 30
"""An expert touched by one row costs a host about what it costs for this many rows: one read of its weights."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How long a shipment may take: `base_s` plus `per_row_s` for each row it carries."""

    base_s: float = 2.0
    per_row_s: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a router knows when it decides: the placement and the hosts it can use now."""

    placement: Placement
    usable: frozenset[str]

    def hosts_of(self, key: ExpertKey) -> list[str]:
        """Usable hosts that serve `key`, in placement order."""
        return [host for host in self.placement.hosts_of(key) if host in self.usable]


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A layer's rows are known: how many for each expert."""

    rows: Mapping[ExpertKey, int]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A shipment's result is here, whole."""

    shipment: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A shipment got no result, for whatever reason."""

    shipment: int


Event = Begin | Answered | Failed


@dataclass(frozen=True, kw_only=True)
class Send:
    """Ship the rows of `keys` to `host`; the answer is wanted by `deadline`."""

    shipment: int
    host: str
    keys: tuple[ExpertKey, ...]
    deadline: float


@dataclass(frozen=True, kw_only=True)
class Lose:
    """Nobody can compute `keys` now: their rows leave the step."""

    keys: tuple[ExpertKey, ...]


Effect = Send | Lose


@dataclass(frozen=True, kw_only=True)
class DispatchState:
    """`waiting`: shipment → (host, keys) on the way. `tried`: hosts a key was already shipped to; a key is never
    shipped to one host twice, so re-sends are bounded by the number of its replicas."""

    rows: Mapping[ExpertKey, int] = field(default_factory=dict)
    waiting: Mapping[int, tuple[str, tuple[ExpertKey, ...]]] = field(default_factory=dict)
    tried: Mapping[ExpertKey, frozenset[str]] = field(default_factory=dict)
    num_shipments: int = 0


def step(
    state: DispatchState, event: Event, reach: Reach, now: float, policy: Policy
) -> tuple[DispatchState, list[Effect]]:
    """What follows from `event` at the monotonic instant `now`."""
    if isinstance(event, Begin):
        return _ship(replace(state, rows=event.rows), event.rows, reach, now, policy)
    host, keys = state.waiting[event.shipment]
    rest = {shipment: where for shipment, where in state.waiting.items() if shipment != event.shipment}
    state = replace(state, waiting=rest)
    if isinstance(event, Answered):
        return state, []
    tried = {key: state.tried.get(key, frozenset()) | {host} for key in keys}
    return _ship(replace(state, tried={**state.tried, **tried}), keys, reach, now, policy)


def _ship(
    state: DispatchState, keys: Iterable[ExpertKey], reach: Reach, now: float, policy: Policy
) -> tuple[DispatchState, list[Effect]]:
    """Give every key to the replica whose host would finish first; keys without one are lost."""
    cargo: dict[str, list[ExpertKey]] = {}
    load: dict[str, int] = {}
    lost = []
    for key in sorted(keys, key=lambda key: (-state.rows[key], key)):
        hosts = [host for host in reach.hosts_of(key) if host not in state.tried.get(key, ())]
        if not hosts:
            lost.append(key)
            continue
        host = min(hosts, key=lambda host: load.get(host, 0))
        load[host] = load.get(host, 0) + ROWS_PER_WEIGHT_READ + state.rows[key]
        cargo.setdefault(host, []).append(key)
    effects: list[Effect] = []
    waiting, number = dict(state.waiting), state.num_shipments
    for host, shipped in cargo.items():
        ordered = tuple(sorted(shipped))
        waiting[number] = (host, ordered)
        num_rows = sum(state.rows[key] for key in ordered)
        deadline = now + policy.base_s + policy.per_row_s * num_rows
        effects.append(Send(shipment=number, host=host, keys=ordered, deadline=deadline))
        number += 1
    if lost:
        effects.append(Lose(keys=tuple(sorted(lost))))
    return replace(state, waiting=waiting, num_shipments=number), effects
