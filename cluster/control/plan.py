"""Where experts should be, and on how many hosts: a function of load, fleet, placement, policy and state.

Nothing changes without a trusted load, except what has to: an expert without a host gets one, a host that is drained
is emptied. "No change" is a plan like any other, and every plan says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from cluster.control.balance import LayerBalance
from cluster.control.draft import Draft, Replica
from cluster.control.fleet import Fleet, Load
from cluster.control.rebalance import Futile, LayerNote, place_all, rebalance, uneven_layers
from cluster.control.repair import repair
from cluster.control.replicas import Replicas
from cluster.control.scale import ScaleState, Scaling, Size, size
from cluster.control.trust import doubt_load
from experts.errors import InvalidInput
from experts.placement import ExpertKey

MUCH_LOST = 1 / 3
"""Share of a layer's time."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a change must be worth. Gains and prices are shares of a layer's time."""

    min_gain: float = 0.1
    """A layer is changed when its slowest host becomes faster by this, and more where few rows were counted."""
    load_price: float = 0.002
    """What each replica that is loaded must save."""
    settle_s: float = 2.5
    """An imbalance must last so long, and so must the load that makes it: one by which a third of a layer's time is
    lost. A smaller one must last longer, in proportion: what comes and goes is not worth moving weights for."""
    cool_down_s: float = 20.0
    """What was added stays, and what was removed stays away, for so long."""
    retry_s: float = 60.0
    """Where nothing was found to be better, nothing is looked for again so soon, unless the load changes."""
    max_age_s: float = 30.0
    """An older load is not acted upon."""
    min_replicas: int = 1
    bytes_per_s: float = 1e9
    """At what rate replicas are loaded, all together; for estimates."""
    max_trials: int = 800
    """Bounds the time that a plan takes."""
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        for name in ("min_gain", "load_price", "settle_s", "cool_down_s", "retry_s", "max_age_s"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise InvalidInput(name, getattr(self, name), "must be a number of at least 0")
        for name in ("min_replicas", "bytes_per_s", "max_trials"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise InvalidInput(name, getattr(self, name), "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanState:
    """What one plan leaves to the next. Replicas that were lately added and removed, with the time of it; the last load
    that was trusted; since when layers are uneven; layers for which nothing better was found."""

    added: Mapping[Replica, float] = field(default_factory=lambda: MappingProxyType({}))
    removed: Mapping[Replica, float] = field(default_factory=lambda: MappingProxyType({}))
    trusted: Load | None = None
    uneven_since: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    futile: Mapping[int, Futile] = field(default_factory=lambda: MappingProxyType({}))
    scale: ScaleState = field(default_factory=ScaleState)


Outcome = Literal["change", "no_change", "held"]
"""What comes of a plan; "held": nothing, because something speaks against acting at all."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`target` is the whole placement that shall be; without a change it is the one that is.

    `held_by` says in words what keeps the plan from acting; empty when nothing does. `alarms` are for people.
    """

    target: Replicas
    loads: tuple[Replica, ...] = ()
    evictions: tuple[Replica, ...] = ()
    layers: tuple[LayerNote, ...] = ()
    moved_bytes: int = 0
    seconds: float = 0.0
    hottest: tuple[tuple[ExpertKey, float], ...] = ()
    size: Size
    why: str = ""
    held_by: str = ""
    alarms: tuple[str, ...] = ()

    @property
    def is_change(self) -> bool:
        return bool(self.loads or self.evictions)

    @property
    def outcome(self) -> Outcome:
        return "change" if self.is_change else "held" if self.held_by else "no_change"


def plan(
    load: Load | None, fleet: Fleet, placement: Replicas, policy: Policy, state: PlanState, now: float
) -> tuple[Plan, PlanState]:
    """What should be next, and the state to hand in then.

    `placement` names every expert there is, with no host where none holds it. Raises InvalidInput when it is empty.
    """
    if not placement:
        raise InvalidInput("placement", placement, "must name at least one expert")
    state = _forget(state, policy, now)
    doubt = doubt_load(load, placement, now, policy.max_age_s)
    if load is not None and not doubt:
        state = replace(state, trusted=load)
    basis = _basis(state.trusted, placement)
    draft = Draft.of(fleet, placement, basis.rows, basis.dispatches, policy.min_replicas)
    draft.cool(state.added, state.removed)
    if not fleet.staying:
        told = "there is no host that could be given anything"
        return _no_change(placement, "nothing can be done", told, (f"{told}",)), state
    is_new = not any(placement.values())
    alarms = place_all(draft, basis.dispatches, policy.max_trials) if is_new else repair(draft)
    notes, why, state = _rebalance(draft, basis, doubt, policy, state, now, is_new=is_new)
    return _finish(draft, fleet, placement, basis, notes, why, doubt, alarms, policy, state, load, now)


def _basis(trusted: Load | None, placement: Replicas) -> Load:
    """What the placement is judged by: without anything measured, all experts alike."""
    if trusted is None or trusted.rows.keys() != placement.keys():
        return Load(at=0.0, rows=dict.fromkeys(placement, 1.0))
    return trusted


def _forget(state: PlanState, policy: Policy, now: float) -> PlanState:
    """What has cooled down is free again, and so are all layers to be looked at: they share the slots."""
    if all(now - at < policy.cool_down_s for times in (state.added, state.removed) for at in times.values()):
        return state

    def rest(times: Mapping[Replica, float]) -> Mapping[Replica, float]:
        return MappingProxyType({replica: at for replica, at in times.items() if now - at < policy.cool_down_s})

    return replace(state, added=rest(state.added), removed=rest(state.removed), futile=MappingProxyType({}))


def _rebalance(
    draft: Draft, basis: Load, doubt: str, policy: Policy, state: PlanState, now: float, *, is_new: bool
) -> tuple[tuple[LayerNote, ...], str, PlanState]:
    if is_new:
        return (), "everything is placed anew", state
    if doubt:
        # What was uneven before may be uneven still.
        return (), "", state
    uneven = uneven_layers(draft, basis, policy.min_gain)
    since = {layer: state.uneven_since.get(layer, now) for layer in uneven}
    # What was tried for the load before it shifted says nothing of this one.
    tried = {
        layer: entry
        for layer, entry in state.futile.items()
        if layer in uneven and entry.at >= basis.at - basis.steady_s
    }
    state = replace(state, uneven_since=MappingProxyType(since), futile=MappingProxyType(tried))
    if not uneven:
        return (), "every layer is as even as it has to be", state
    lasted = {layer: min(now - at, basis.steady_s) for layer, at in since.items()}
    settled = [layer for layer in uneven if lasted[layer] >= _patience_s(draft.layers[layer], policy)]
    if not settled:
        return (), f"{len(uneven)} layers are uneven, but only since {max(lasted.values()):.1f} s", state
    due = {
        layer: uneven[layer]
        for layer in settled
        if layer not in tried or tried[layer].is_over(draft.layers[layer].imbalance, uneven[layer], now, policy.retry_s)
    }
    notes = rebalance(draft, due, basis.dispatches, policy.load_price, policy.max_trials)
    futile = dict(tried)
    for note in notes:
        futile.pop(note.layer, None)
        if not note.is_changed:
            futile[note.layer] = Futile(imbalance=draft.layers[note.layer].imbalance, needed=due[note.layer], at=now)
    changed = sum(note.is_changed for note in notes)
    why = f"{len(uneven)} layers are uneven, {changed} of them become faster by enough to be changed"
    return notes, why, replace(state, futile=MappingProxyType(futile))


def _patience_s(balance: LayerBalance, policy: Policy) -> float:
    lost = 1.0 - 1.0 / balance.imbalance
    return policy.settle_s * max(1.0, MUCH_LOST / max(lost, 1e-9))


def _finish(
    draft: Draft,
    fleet: Fleet,
    placement: Replicas,
    basis: Load,
    notes: tuple[LayerNote, ...],
    why: str,
    doubt: str,
    alarms: tuple[str, ...],
    policy: Policy,
    state: PlanState,
    load: Load | None,
    now: float,
) -> tuple[Plan, PlanState]:
    target: Replicas = draft.replicas() if draft.is_touched else placement
    loads, evictions = difference(placement, target)
    if loads:
        target = _hottest_first(target, loads, basis)
    wanted, scale = _size(load, doubt, fleet, target, policy, state, now)
    if loads or evictions:
        added = {**state.added, **dict.fromkeys(loads, now)}
        removed = {**state.removed, **dict.fromkeys(evictions, now)}
        changed = {layer for (layer, _), _ in (*loads, *evictions)}
        since = MappingProxyType({layer: at for layer, at in state.uneven_since.items() if layer not in changed})
        state = replace(state, added=MappingProxyType(added), removed=MappingProxyType(removed), uneven_since=since)
    moved = len(loads) * fleet.expert_bytes
    # Hosts of an expert that only changed their order are no change.
    made = Plan(
        target=target if loads or evictions else placement,
        loads=loads,
        evictions=evictions,
        layers=_all_notes(draft, notes, is_new=not any(placement.values())) if loads or evictions else notes,
        moved_bytes=moved,
        seconds=moved / policy.bytes_per_s,
        hottest=_hottest(basis) if loads or evictions else (),
        size=wanted,
        why=why,
        held_by=doubt,
        alarms=(*alarms, *((f"the load is not to be trusted, nothing is rebalanced: {doubt}",) if doubt else ())),
    )
    return made, replace(state, scale=scale)


def _all_notes(draft: Draft, notes: tuple[LayerNote, ...], *, is_new: bool) -> tuple[LayerNote, ...]:
    """Layers that nobody looked at are in the plan too."""
    told = {note.layer: note for note in notes}
    for layer, balance in draft.layers.items():
        if layer not in told:
            before = None if is_new else balance.imbalance
            why = "placed for the first time" if is_new else "as even as it has to be"
            told[layer] = LayerNote(layer=layer, before=before, after=balance.imbalance, is_changed=is_new, why=why)
    return tuple(told[layer] for layer in sorted(told))


def _size(
    load: Load | None, doubt: str, fleet: Fleet, target: Replicas, policy: Policy, state: PlanState, now: float
) -> tuple[Size, ScaleState]:
    if load is None or doubt:
        return Size(hosts=len(fleet.staying), why=f"hosts stay: {doubt}"), ScaleState()
    held = Counter(name for names in target.values() for name in names)
    needed = len(target) * policy.min_replicas
    return size(load, fleet, held, needed, policy.scaling, state.scale, now)


def _no_change(placement: Replicas, why: str, held_by: str, alarms: tuple[str, ...]) -> Plan:
    return Plan(target=placement, size=Size(hosts=0, why=held_by), why=why, held_by=held_by, alarms=alarms)


def _hottest_first(target: Replicas, loads: tuple[Replica, ...], load: Load) -> Replicas:
    """`target` in the order in which its replicas are best loaded: moves go by it."""
    moved = sorted({key for key, _ in loads}, key=lambda key: (-load.rows[key], key))
    return MappingProxyType({key: target[key] for key in (*moved, *target)})


def _hottest(load: Load, most: int = 5) -> tuple[tuple[ExpertKey, float], ...]:
    return tuple(sorted(load.rows.items(), key=lambda item: (-item[1], item[0]))[:most])


def difference(before: Replicas, after: Replicas) -> tuple[tuple[Replica, ...], tuple[Replica, ...]]:
    """(to be loaded, to be evicted)."""
    loads: list[Replica] = []
    evictions: list[Replica] = []
    for key in (before.keys() | after.keys()) if before is not after else ():
        old, new = before.get(key, ()), after.get(key, ())
        if old != new:
            loads += [(key, name) for name in new if name not in old]
            evictions += [(key, name) for name in old if name not in new]
    return tuple(sorted(loads)), tuple(sorted(evictions))
