"""How many rows a host was given lately, so that replicas that are equals take turns in every layer."""

from __future__ import annotations

HALF_S = 1.0
"""Rows this long ago count half: turns are taken within seconds, and a host that is new owes nothing for the past."""


class RecentRows:
    """Rows of each layer, fading. Instants are in time of attention."""

    __slots__ = ("_by_layer",)

    def __init__(self) -> None:
        self._by_layer: dict[int, tuple[float, float]] = {}

    def add(self, layer: int, rows: int, at: float) -> None:
        self._by_layer[layer] = (self.of(layer, at) + rows, at)

    def of(self, layer: int, at: float) -> float:
        rows, then = self._by_layer.get(layer, (0.0, at))
        return rows * 0.5 ** ((at - then) / HALF_S) if rows else 0.0
