"""The initial placement: which hosts shall hold which experts. Numbers in, numbers out; knows no load yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from experts.errors import InvalidInput
from experts.placement import ExpertKey


def pack(
    *,
    layers: Sequence[int],
    num_experts: int,
    hosts: Sequence[str],
    num_replicas: int,
    nodes: Mapping[str, str] = MappingProxyType({}),
) -> dict[ExpertKey, tuple[str, ...]]:
    """Give every expert of `layers` to `num_replicas` distinct hosts, on as many distinct `nodes` as there are.

    `nodes` tells where each host is. On one node, no two hosts differ by more than one expert in any layer or over all
    of them. Where that leaves a choice, the experts of one host are replicated on as many different hosts as possible,
    so that the load of a lost host spreads over all others. Raises InvalidInput for more replicas than hosts.
    """
    if not 1 <= num_replicas <= len(hosts):
        raise InvalidInput("replicas", num_replicas, f"must be between 1 and the number of hosts, {len(hosts)}")
    held: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    placement: dict[ExpertKey, tuple[str, ...]] = {}
    for layer in layers:
        held_here: Counter[str] = Counter()
        for expert in range(num_experts):
            chosen: list[str] = []
            for _ in range(num_replicas):
                best = min(
                    (host for host in hosts if host not in chosen),
                    key=lambda host: (
                        sum(nodes.get(other) == nodes.get(host) for other in chosen),
                        held_here[host],
                        held[host],
                        max((together[(other, host)] for other in chosen), default=0),
                    ),
                )
                held_here[best] += 1
                held[best] += 1
                for other in chosen:
                    together[(other, best)] += 1
                    together[(best, other)] += 1
                chosen.append(best)
            placement[(layer, expert)] = tuple(chosen)
    return placement


def spread(
    target: Mapping[ExpertKey, tuple[str, ...]], nodes: Mapping[str, str]
) -> Mapping[ExpertKey, tuple[str, ...]]:
    """`target` packed anew for hosts that are on `nodes`; as it is where one node or one replica leaves no choice."""
    num_replicas = max((len(names) for names in target.values()), default=0)
    if num_replicas < 2 or len(set(nodes.values())) < 2:
        return target
    return pack(
        layers=sorted({layer for layer, _ in target}),
        num_experts=1 + max(expert for _, expert in target),
        hosts=list(nodes),
        num_replicas=num_replicas,
        nodes=nodes,
    )


def target_by_host(
    placement: Mapping[ExpertKey, tuple[str, ...]], hosts: Iterable[str]
) -> dict[str, frozenset[ExpertKey]]:
    """What each of `hosts` shall hold under `placement`; an empty set for one that holds nothing."""
    wanted: dict[str, set[ExpertKey]] = {host: set() for host in hosts}
    for key, names in placement.items():
        for name in names:
            wanted[name].add(key)
    return {host: frozenset(keys) for host, keys in wanted.items()}
