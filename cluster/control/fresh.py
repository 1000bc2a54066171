"""Packs experts onto hosts from nothing: how many replicas each gets, then where they go, heaviest first.

`improve` takes it from there. A host's slots are shared by all layers, in proportion to what each layer has.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.control.balance import LayerBalance
from cluster.control.draft import Draft
from cluster.control.fleet import HostSpec


def fresh(draft: Draft, layers: Sequence[int], free: Sequence[int], dispatches: float) -> Draft:
    """A draft of `layers` alone, packed from nothing into `free[host]` slots, as like the old one as that may be.

    There must be room for `min_replicas` of every expert. What cools down is not heeded.
    """
    targets = set(draft.targets)
    room = [slots if host in targets else 0 for host, slots in enumerate(free)]
    counts = replicate(draft, layers, sum(room), len([slots for slots in room if slots > 0]))
    packed: dict[int, LayerBalance] = {}
    left = sum(sum(count) for count in counts.values())
    for layer in sorted(layers, key=lambda layer: -sum(counts[layer])):
        num_copies = sum(counts[layer])
        caps = _shares(room, num_copies, left, len(counts[layer]))
        left -= num_copies
        rows = draft.layers[layer].rows
        homes = pack_layer(rows, counts[layer], caps, draft.hosts, dispatches)
        for where in homes:
            for host in where:
                room[host] -= 1
        if any(draft.layers[layer].shares):
            homes = relabel(homes, draft.layers[layer].all_homes, draft.hosts)
        packed[layer] = LayerBalance(rows, homes, draft.hosts, dispatches)
    return replace(draft, layers=packed, experts={layer: draft.experts[layer] for layer in layers}, free=room)


def replicate(draft: Draft, layers: Sequence[int], room: int, num_hosts: int) -> Mapping[int, list[int]]:
    """Copies of each expert: the next one goes to whoever has most rows per copy, beside its layer's mean host.

    Copies that cannot save their price are not made.
    """
    counts = {layer: [min(draft.min_replicas, num_hosts)] * len(draft.experts[layer]) for layer in layers}
    room -= sum(sum(count) for count in counts.values())
    worth = min((draft.hosts[host].slot_price for host in draft.targets), default=0.0)
    heap: list[tuple[float, int, int]] = []
    per_host: dict[int, float] = {}
    for layer in layers:
        rows = draft.layers[layer].rows
        per_host[layer] = sum(rows) / max(1, num_hosts)
        heap += [(-_ratio(amount, per_host[layer]) / counts[layer][e], layer, e) for e, amount in enumerate(rows)]
    heapq.heapify(heap)
    while room > 0 and heap:
        ratio, layer, expert = heapq.heappop(heap)
        count = counts[layer][expert]
        if ratio >= 0.0 or count >= num_hosts or -ratio / (count + 1) < worth:
            continue
        counts[layer][expert] = count + 1
        room -= 1
        heapq.heappush(heap, (ratio * count / (count + 1), layer, expert))
    return counts


def _ratio(amount: float, mean: float) -> float:
    return amount / mean if mean > 0.0 else 0.0


def _shares(room: Sequence[int], num_copies: int, left: int, num_experts: int) -> list[int]:
    """How many of a layer's `num_copies` each host may take, where `left` copies are still to come in all."""
    caps = [min(slots, num_experts, -(-slots * num_copies // max(left, 1))) for slots in room]
    if sum(room) == left:
        # Every slot will be taken. Rounded up everywhere, the first layers would leave crooked rests to the last.
        caps = [min(slots, num_experts, slots * num_copies // max(left, 1)) for slots in room]
        rests = sorted(range(len(room)), key=lambda host: -(room[host] * num_copies % max(left, 1)))
        for host in rests:
            if sum(caps) >= num_copies:
                break
            caps[host] += caps[host] < min(room[host], num_experts)
    return caps


def pack_layer(
    rows: Sequence[float], counts: Sequence[int], caps: Sequence[int], hosts: Sequence[HostSpec], dispatches: float
) -> list[tuple[int, ...]]:
    """Put `counts[expert]` copies on distinct hosts, heaviest copies first, each where it is done first.

    Hosts on nodes that have none of the expert come first. `caps[host]` bounds what a host gets. A second copy for
    which no host is left, or only room that others need for their first, is not made.
    """
    caps, room, firsts = list(caps), sum(caps), len(rows)
    homes: list[list[int]] = [[] for _ in rows]
    weigh = LayerBalance(rows, homes, hosts, dispatches)
    queues = _queues(caps, hosts)
    for expert in sorted(range(len(rows)), key=lambda expert: -rows[expert] / counts[expert]):
        firsts -= 1
        count = counts[expert]
        # Hosts that have the expert wait here until all its copies are placed.
        aside: list[tuple[_Queue, float, int]] = []
        for copy in range(count):
            if copy > 0 and room <= firsts:
                break
            nodes = {hosts[host].node for host in homes[expert]}
            done, queue = _first_done(queues, nodes, weigh, expert, count)
            if queue is None:
                break
            _, _, host = heapq.heappop(queue)
            homes[expert].append(host)
            caps[host] -= 1
            room -= 1
            aside.append((queue, done, host))
        for queue, done, host in aside:
            if caps[host] > 0:
                heapq.heappush(queue, (done, -caps[host], host))
    return [tuple(where) for where in homes]


_Queue = list[tuple[float, int, int]]
"""A heap of (time, -room, host), of hosts that have room."""


def _queues(caps: Sequence[int], hosts: Sequence[HostSpec]) -> list[tuple[str, _Queue]]:
    """(node, queue) for hosts of each kind, of which the one with least to do is the best for any expert."""
    queues: dict[tuple[str, float, float], _Queue] = {}
    for host, spec in enumerate(hosts):
        if caps[host] > 0:
            queues.setdefault((spec.node, spec.row_s + spec.link_s, spec.touch_s), []).append((0.0, -caps[host], host))
    for queue in queues.values():
        heapq.heapify(queue)
    return [(node, queue) for (node, _, _), queue in queues.items()]


def _first_done(
    queues: list[tuple[str, _Queue]], nodes: set[str], weigh: LayerBalance, expert: int, count: int
) -> tuple[float, _Queue | None]:
    best: tuple[bool, float, int, int] | None = None
    chosen: _Queue | None = None
    for node, queue in queues:
        if not queue:
            continue
        seconds, room, host = queue[0]
        key = (node in nodes, seconds + weigh.weight(expert, host, count) / count, room, host)
        if best is None or key < best:
            best, chosen = key, queue
    return (best[1] if best is not None else 0.0), chosen


def relabel(
    homes: Sequence[Sequence[int]], current: Sequence[Sequence[int]], hosts: Sequence[HostSpec]
) -> list[tuple[int, ...]]:
    """`homes` of a layer, with hosts exchanged so that most experts stay where `current` has them.

    Only hosts of one kind and one node change places, and only such that have equally many experts of the layer.
    """
    kind = _kinds(homes, hosts)
    common: Counter[tuple[int, int]] = Counter()
    for where, was in zip(homes, current, strict=True):
        common.update((place, host) for place in where for host in was if kind[place] == kind[host])
    name: dict[int, int] = {}
    taken: set[int] = set()
    for (place, host), _ in sorted(common.items(), key=lambda item: (-item[1], item[0])):
        if place not in name and host not in taken:
            name[place] = host
            taken.add(host)
    left: dict[object, list[int]] = {}
    for host, what in enumerate(kind):
        if host not in taken:
            left.setdefault(what, []).append(host)
    return [
        tuple(name[host] if host in name else _name(name, host, left[kind[host]]) for host in where) for where in homes
    ]


def _name(name: dict[int, int], place: int, left: list[int]) -> int:
    name[place] = left.pop()
    return name[place]


def _kinds(homes: Sequence[Sequence[int]], hosts: Sequence[HostSpec]) -> list[object]:
    held = Counter(host for where in homes for host in where)
    return [(spec.row_s, spec.touch_s, spec.link_s, spec.node, held[host]) for host, spec in enumerate(hosts)]
