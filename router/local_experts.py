"""Routed experts computed in the router's own process: no host, no shipment, nothing can be away."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experts.arithmetic import Arithmetic, PlainArithmetic
from experts.ffn import ExpertWeights
from experts.kernels.native import LayerOfExperts, NativeArithmetic
from experts.load import LoadSnapshot, LoadWindow
from experts.placement import ExpertKey
from router.routed import Combined, Routing, group_rows, ungroup_rows
from router.stacked_experts import StackedExperts


class LocalExperts:
    """Fulfils the decoder's `RoutedExperts` with weights held here. `stacked` are the same weights for steps in fixed
    shapes, where there are such steps."""

    def __init__(
        self,
        weights: Mapping[ExpertKey, ExpertWeights],
        arithmetic: Arithmetic | None = None,
        stacked: StackedExperts | None = None,
    ) -> None:
        self.weights = weights
        self.stacked = stacked
        self._arithmetic = arithmetic or PlainArithmetic()
        self._load = LoadWindow()
        self._layers = _layers_of(weights) if isinstance(arithmetic, NativeArithmetic) else {}

    @classmethod
    def over(cls, stacked: StackedExperts, arithmetic: Arithmetic | None = None) -> LocalExperts:
        """All experts of the stacks."""
        return cls(stacked.experts(), arithmetic, stacked)

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.weights.values())

    def load_snapshot(self) -> LoadSnapshot:
        """What was computed since the start; `compute_s` and `num_shipments` leave out steps in fixed shapes."""
        snapshot = self._load.snapshot()
        return snapshot if self.stacked is None else snapshot.with_rows(self.stacked.rows())

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> LocalPending:
        """Nothing is computed before the result is asked for."""
        return LocalPending(self, layer, x_TH, routing)

    def compute(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[T, H]: the sum of every token's experts on its scaled row."""
        started = time.perf_counter()
        y_TH, rows = self._fused(layer, x_TH, routing) or self._grouped(layer, x_TH, routing)
        self._load.count({(layer, expert): count for expert, count in rows}, time.perf_counter() - started)
        return y_TH

    def _fused(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> _Computed | None:
        """In one call, where there is one for such shapes."""
        if layer not in self._layers or not isinstance(self._arithmetic, NativeArithmetic):
            return None
        computed = self._arithmetic.routed(x_TH, routing.expert_TK, routing.score_TK, self._layers[layer])
        if computed is None:
            return None
        return computed[0], [(expert, count) for expert, count in enumerate(computed[1]) if count]

    def _grouped(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> _Computed:
        """Every touched expert on its rows."""
        groups = group_rows(x_TH, routing)
        touched = [self.weights[layer, expert] for expert in groups.experts]
        y_RH = self._arithmetic.ffn(groups.rows_RH, groups.counts, touched)
        return ungroup_rows(groups, y_RH, routing), list(zip(groups.experts, groups.counts, strict=True))


_Computed = tuple[torch.Tensor, list[tuple[int, int]]]
"""Results [T, H], and how many rows each touched expert had."""


def _layers_of(weights: Mapping[ExpertKey, ExpertWeights]) -> dict[int, LayerOfExperts]:
    """The layers that have all their experts, 0 … E − 1, in a form that one call can read."""
    by_layer: dict[int, dict[int, ExpertWeights]] = {}
    for (layer, expert), one in weights.items():
        by_layer.setdefault(layer, {})[expert] = one
    ordered = {layer: [one for _, one in sorted(experts.items())] for layer, experts in by_layer.items()}
    whole = {layer for layer, experts in by_layer.items() if sorted(experts) == list(range(len(experts)))}
    return {layer: LayerOfExperts(ordered[layer]) for layer in whole if LayerOfExperts.fits(ordered[layer])}


@dataclass(frozen=True)
class LocalPending:
    """Rows that wait for nothing but the processor."""

    experts: LocalExperts
    layer: int
    x_TH: torch.Tensor
    routing: Routing

    def combine(self) -> Combined:
        return Combined(y_TH=self.experts.compute(self.layer, self.x_TH, self.routing), lost={})
