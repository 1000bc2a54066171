"""Moves under way as JSON values, for the journal. What hosts hold is not in it: they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cluster.control.draft import Replica
from cluster.control.journal import decode_replicas, encode_replicas
from cluster.control.move_state import Loading, MoveState


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
        loading[(int(layer), int(expert)), str(name)] = Loading(source=str(source), deadline=float("inf"))
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
