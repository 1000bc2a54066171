"""Where experts live while some of their hosts stay away. Numbers in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cluster.control.replicas import Replicas


def rehome(target: Replicas, away: frozenset[str], hosts: Iterable[str]) -> Replicas:
    """`target` with every replica of a host in `away` given to another of `hosts` that has none of that expert.

    The host that has least of the layer gets it, then the one that has least at all. Where no other is left, an expert
    has fewer replicas; one that would have none keeps its hosts, whoever they are.
    """
    present = [name for name in hosts if name not in away]
    if not away or not present:
        return target
    held: Counter[str] = Counter()
    held_in: Counter[tuple[int, str]] = Counter()
    for (layer, _), names in target.items():
        held.update(names)
        held_in.update((layer, name) for name in names)
    wanted = {}
    for key, names in target.items():
        stay = [name for name in names if name not in away]
        for _ in range(len(names) - len(stay)):
            free = [name for name in present if name not in stay]
            if not free:
                break
            heir = min(free, key=lambda name: (held_in[key[0], name], held[name]))
            held[heir] += 1
            held_in[key[0], heir] += 1
            stay.append(heir)
        wanted[key] = tuple(stay)
    return wanted
