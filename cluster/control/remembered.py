"""Puts into the history what was decided otherwise than by a turn of the loop."""

from __future__ import annotations

from dataclasses import replace

from cluster.control.loop import HISTORY, Applied, changes_of, imbalances
from cluster.control.plan import Plan, difference
from cluster.control.replicas import Replicas
from cluster.control.state import ControllerState
from cluster.control.steer import cooling, expert_bytes, fleet_of
from experts.placement import ExpertKey


def remembered(
    state: ControllerState, target: Replicas, why: str, now: float, made: Plan | None = None, *, is_undone: bool = False
) -> ControllerState:
    """The state in which `target` was begun `now`; what it changes cools down."""
    before = state.journal.target
    loads, _ = difference(before, target)
    changes = changes_of(before, target)
    applied = Applied(
        at=now,
        epoch=state.journal.epoch,
        loads=len(loads),
        moved_bytes=len(loads) * expert_bytes(state),
        before=_balance(state, before, changes),
        predicted=_balance(state, target, changes),
        why=why,
        changes=changes,
        is_undone=is_undone,
    )
    history = (*state.journal.history, applied)[-HISTORY:]
    state = replace(state, journal=replace(state.journal, history=history), plan=made or state.plan)
    return replace(state, planning=cooling(state))


def _balance(
    state: ControllerState,
    replicas: Replicas,
    changes: tuple[tuple[ExpertKey, tuple[str, ...], tuple[str, ...]], ...],
) -> float | None:
    """Mean over slowest host of the worst layer that changes; None while nobody knows the load."""
    load = state.planning.trusted
    if load is None or load.rows.keys() != replicas.keys() or not changes:
        return None
    found = imbalances(load, fleet_of(state), replicas)
    return 1.0 / max(found[layer] for layer in {key[0] for key, _, _ in changes})
