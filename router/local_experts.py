"""Routed experts computed in the router's own process: no host, no shipment, nothing can be away."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experts.arithmetic import Arithmetic, PlainArithmetic
from experts.ffn import ExpertWeights
from experts.load import LoadSnapshot, LoadWindow
from experts.placement import ExpertKey
from experts.transport.base import Segment
from router.routed import Combined, Routing, RowGroups, group_rows, ungroup_rows
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
        """Group the rows; they are computed when the result is asked for."""
        return LocalPending(self, layer, group_rows(x_TH, routing), routing)

    def compute(self, layer: int, groups: RowGroups) -> torch.Tensor:
        """Every touched expert on its rows, results in the groups' row order."""
        started = time.perf_counter()
        touched = [self.weights[layer, expert] for expert in groups.experts]
        y_RH = self._arithmetic.ffn(groups.rows_RH, groups.counts, touched)
        segments = [
            Segment(layer=layer, expert=expert, num_rows=count)
            for expert, count in zip(groups.experts, groups.counts, strict=True)
        ]
        self._load.record(segments, time.perf_counter() - started)
        return y_RH


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
