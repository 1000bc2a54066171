"""How much work a host was given lately, so that replicas that are equals take turns in every layer."""

from __future__ import annotations

HALF_S = 1.0
"""Work this long ago counts half: turns are taken within seconds, and a host that is new owes nothing for the past."""


class RecentWork:
    """Seconds of work by the cost model, of each layer, fading. Instants are in time of attention."""

    __slots__ = ("_by_layer",)

    def __init__(self) -> None:
        self._by_layer: dict[int, tuple[float, float]] = {}

    def add(self, layer: int, work_s: float, at: float) -> None:
        self._by_layer[layer] = (self.of(layer, at) + work_s, at)

    def of(self, layer: int, at: float) -> float:
        work_s, then = self._by_layer.get(layer, (0.0, at))
        return work_s * 0.5 ** ((at - then) / HALF_S) if work_s else 0.0
