"""Which hosts have which experts, as everything in here names it, and as JSON values for files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from experts.placement import ExpertKey

Replicas = Mapping[ExpertKey, tuple[str, ...]]
"""(layer, expert) → host names, as in a placement."""


def encode_replicas(replicas: Replicas) -> dict[str, Any]:
    """As JSON values."""
    names = sorted({name for hosts in replicas.values() for name in hosts})
    index = {name: position for position, name in enumerate(names)}
    rows = [[layer, expert, [index[name] for name in hosts]] for (layer, expert), hosts in replicas.items()]
    return {"hosts": names, "experts": rows}


def decode_replicas(raw: Mapping[str, Any]) -> Replicas:
    """The inverse of `encode_replicas`. Raises ValueError, KeyError, TypeError or IndexError for anything else."""
    names = [str(name) for name in raw["hosts"]]
    replicas: dict[ExpertKey, tuple[str, ...]] = {}
    for layer, expert, hosts in raw["experts"]:
        if min(layer, expert, *hosts, 0) < 0:
            raise ValueError("the journal holds a negative number")
        replicas[(int(layer), int(expert))] = tuple(names[position] for position in hosts)
    return MappingProxyType(replicas)
