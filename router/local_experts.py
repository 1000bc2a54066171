"""Routed experts computed in the router's own process: no host, no shipment, nothing can be away."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experts.ffn import ExpertWeights, expert_ffn
from experts.load import LoadWindow
from experts.placement import ExpertKey
from experts.transport.base import Segment
from router.routed import Combined, Routing, RowGroups, group_rows, ungroup_rows


class LocalExperts:
    """Fulfils the decoder's `RoutedExperts` with weights held here; `load` counts what was computed."""

    def __init__(self, weights: Mapping[ExpertKey, ExpertWeights]) -> None:
        self.weights = weights
        self.load = LoadWindow()

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.weights.values())

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> LocalPending:
        """Group the rows; they are computed when the result is asked for."""
        return LocalPending(self, layer, group_rows(x_TH, routing), routing)

    def compute(self, layer: int, groups: RowGroups) -> torch.Tensor:
        """One matmul chain per touched expert, results in the groups' row order."""
        started = time.perf_counter()
        rows = torch.split(groups.rows_RH, list(groups.counts))
        parts = [
            expert_ffn(self.weights[layer, expert], rows_TH)
            for expert, rows_TH in zip(groups.experts, rows, strict=True)
        ]
        segments = [
            Segment(layer=layer, expert=expert, num_rows=count)
            for expert, count in zip(groups.experts, groups.counts, strict=True)
        ]
        self.load.record(segments, time.perf_counter() - started)
        return torch.cat(parts)


@dataclass(frozen=True)
class LocalPending:
    """Rows that wait for nothing but the processor."""

    experts: LocalExperts
    layer: int
    groups: RowGroups
    routing: Routing

    def combine(self) -> Combined:
        y_RH = self.experts.compute(self.layer, self.groups)
        return Combined(y_TH=ungroup_rows(self.groups, y_RH, self.routing), lost={})
