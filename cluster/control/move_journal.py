"""Moves under way and plans that were applied, as JSON values for the journal. What hosts hold is not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from cluster.control.draft import Replica
from cluster.control.loop import Applied
from cluster.control.move_state import Loading, MoveState
from cluster.control.replicas import decode_replicas, encode_replicas
from experts.placement import ExpertKey


def encode_moves(state: MoveState) -> dict[str, Any]:
    """All that outlives the controller. Deadlines do not: clocks begin anew."""
    return {
        "epoch": state.epoch,
        "published": encode_replicas(state.published),
        "goal": encode_replicas(state.goal),
        "loading": [[*key, name, entry.source] for (key, name), entry in state.loading.items()],
        "draining": [[*key, name] for key, name in state.draining],
    }


def decode_moves(raw: Mapping[str, Any]) -> MoveState:
    """The inverse, to be handed to `moves.resume`. Raises ValueError, KeyError, TypeError or IndexError for anything
    else."""
    published, goal = decode_replicas(raw["published"]), decode_replicas(raw["goal"])
    epoch = int(raw["epoch"])
    if epoch < 0 or published.keys() != goal.keys():
        raise ValueError("the moves in the journal do not fit together")
    loading: dict[Replica, Loading] = {}
    for layer, expert, name, source in raw["loading"]:
        loading[(int(layer), int(expert)), str(name)] = Loading(
            source=str(source), begun=float("inf"), deadline=float("inf")
        )
    draining: dict[Replica, float] = {}
    for layer, expert, name in raw["draining"]:
        draining[(int(layer), int(expert)), str(name)] = float("inf")
    if not all(key in published for key, _ in (*loading, *draining)):
        raise ValueError("the moves in the journal are of unknown experts")
    return MoveState(
        published=published,
        goal=goal,
        epoch=epoch,
        loading=MappingProxyType(loading),
        draining=MappingProxyType(draining),
    )


def encode_history(history: Sequence[Applied]) -> list[dict[str, Any]]:
    """Plans that were applied. Times are of the machine's clock that only runs forward, which outlives processes."""
    return [{**asdict(applied), "changes": [_change(change) for change in applied.changes]} for applied in history]


def decode_history(raw: Sequence[Mapping[str, Any]]) -> tuple[Applied, ...]:
    """The inverse, with the errors of `decode_moves`."""
    return tuple(_applied(entry) for entry in raw)


def _change(change: tuple[ExpertKey, tuple[str, ...], tuple[str, ...]]) -> list[Any]:
    (layer, expert), before, after = change
    return [layer, expert, list(before), list(after)]


def _applied(raw: Mapping[str, Any]) -> Applied:
    def number(name: str) -> float | None:
        return None if raw[name] is None else float(raw[name])

    return Applied(
        at=float(raw["at"]),
        epoch=int(raw["epoch"]),
        loads=int(raw["loads"]),
        moved_bytes=int(raw["moved_bytes"]),
        before=number("before"),
        predicted=number("predicted"),
        why=str(raw["why"]),
        realised=number("realised"),
        took_s=number("took_s"),
        changes=tuple(
            ((int(layer), int(expert)), tuple(map(str, before)), tuple(map(str, after)))
            for layer, expert, before, after in raw["changes"]
        ),
        is_undone=bool(raw["is_undone"]),
    )
