"""Replicas that are equals take turns, layer by layer, whatever the past was."""

from __future__ import annotations

from collections import Counter

from router.failover.recent import HALF_S, RecentRows
from router.failover.split import Lane, split


def test_rows_fade_and_layers_do_not_mix() -> None:
    recent = RecentRows()
    recent.add(3, 1, at=10.0)
    recent.add(3, 1, at=10.0 + HALF_S)
    assert recent.of(3, at=10.0 + HALF_S) == 1.5
    assert recent.of(3, at=10.0 + 2 * HALF_S) == 0.75
    assert recent.of(4, at=10.0) == 0.0


def test_equal_replicas_of_a_hot_expert_take_turns_in_every_layer() -> None:
    """Also where layers come one after the other, and one host has done much more in the past."""
    works = {host: RecentRows() for host in "ab"}
    works["a"].add(0, 100000, at=0.0)
    rows: Counter[tuple[int, str]] = Counter()
    for number in range(400):
        layer, at = number % 2, 60.0 + 0.005 * number
        lanes = [Lane(host, 1e-4, 3e-4, 1e-6, work.of(layer, at)) for host, work in works.items()]
        for host, pieces in split([(True, -8, (layer, 5), lanes)]).items():
            works[host].add(layer, 8, at)
            rows[layer, host] += sum(stop - start for _, start, stop in pieces)
    for layer in range(2):
        shares = sorted(rows[layer, host] for host in "ab")
        assert shares[1] <= 1.1 * shares[0], rows
