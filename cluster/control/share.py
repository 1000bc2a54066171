"""What a host that has nothing is given: about as much of every layer as others have. Numbers in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cluster.control.fleet import Fleet
from cluster.control.replicas import Replicas
from experts.placement import ExpertKey


def with_share(replicas: Replicas, name: str, fleet: Fleet, rows: Mapping[ExpertKey, float]) -> Replicas:
    """`replicas` with some of them on host `name` instead of where they are, in layers of which it has none.

    In each it gets as many as there are to a host, from whoever has most rows there.
    """
    layers: dict[int, list[ExpertKey]] = {}
    for key in sorted(replicas):
        layers.setdefault(key[0], []).append(key)
    shared = dict(replicas)
    left = fleet.hosts[name].slots - sum(name in names for names in replicas.values())
    for keys in layers.values():
        num = sum(len(shared[key]) for key in keys)
        wanted = min(left, num // len(fleet.staying))
        if any(name in shared[key] for key in keys):
            continue
        for _ in range(wanted):
            left -= _take_one(shared, keys, name, fleet, rows, num // len(fleet.staying))
    return shared


def _take_one(
    shared: dict[ExpertKey, tuple[str, ...]],
    keys: list[ExpertKey],
    name: str,
    fleet: Fleet,
    rows: Mapping[ExpertKey, float],
    share: int,
) -> bool:
    """Take from the host with most rows, of those with more than their `share`, what makes the two most alike."""
    does: Counter[str] = Counter()
    held = Counter(other for key in keys for other in shared[key])
    for key in keys:
        does.update(dict.fromkeys(shared[key], rows[key] / len(shared[key])))
    givers = [host for host in fleet.hosts if held[host] > share and host != name]
    if not givers:
        return False
    giver = max(givers, key=lambda host: (does[host], held[host], host))
    half = (does[giver] - does[name]) / 2
    able = [key for key in keys if giver in shared[key] and name not in shared[key]]
    if not able:
        return False
    key = min(able, key=lambda key: (abs(rows[key] / len(shared[key]) - half), key))
    shared[key] = tuple(name if host == giver else host for host in shared[key])
    return True
