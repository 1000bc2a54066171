"""The usual way to balance experts, from its description: replicate by largest load per copy, then pack heaviest first.

Every host has as many slots as any other; rows of an expert are split evenly over its copies.
"""

from __future__ import annotations

from collections.abc import Sequence


def eplb(loads: Sequence[float], num_hosts: int, num_extra: int) -> tuple[list[set[int]], float]:
    """What each host holds, and the balance (mean over slowest host). A host may get two copies of an expert."""
    copies = [1] * len(loads)
    for _ in range(num_extra):
        candidates = [expert for expert, count in enumerate(copies) if count < num_hosts]
        copies[max(candidates, key=lambda expert: loads[expert] / copies[expert])] += 1
    slots = (len(loads) + num_extra) // num_hosts
    pieces = sorted(
        ((loads[expert] / count, expert) for expert, count in enumerate(copies) for _ in range(count)), reverse=True
    )
    times, room = [0.0] * num_hosts, [slots] * num_hosts
    held: list[set[int]] = [set() for _ in range(num_hosts)]
    for piece, expert in pieces:
        host = min((host for host in range(num_hosts) if room[host] > 0), key=times.__getitem__)
        times[host] += piece
        room[host] -= 1
        held[host].add(expert)
    return held, sum(times) / num_hosts / max(times)


def even_balance(loads: Sequence[float], held: Sequence[set[int]]) -> float:
    """Mean over slowest host when every copy gets an equal share."""
    copies = [sum(expert in experts for experts in held) for expert in range(len(loads))]
    times = [sum(loads[expert] / copies[expert] for expert in experts) for experts in held]
    return sum(times) / len(times) / max(times)
