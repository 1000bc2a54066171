"""Routed experts of this process for steps in fixed shapes: all weights of a layer in one place, nothing asks the host.

Shape letters: B rows, K experts per row, R = B · K rows to compute, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from experts.ffn import ExpertWeights
from experts.placement import ExpertKey
from experts.stack import ExpertStack, stack_ffn
from router.model.static_decode import Leaving
from router.routed import sum_choices


class StackedExperts:
    """Fulfils `ExpertsAtHand`. `stacks` are the experts of each MoE layer."""

    def __init__(self, stacks: Mapping[int, ExpertStack]) -> None:
        self._stacks = dict(stacks)
        # Rows by expert are counted where they are computed, and read when somebody asks.
        self._rows_E = {
            layer: torch.zeros(len(stack), dtype=torch.int64, device=stack.down_EHF.device)
            for layer, stack in self._stacks.items()
        }

    def compute(self, leaving: Leaving, live_B: torch.Tensor) -> torch.Tensor:
        """[B, H]: the sum of each row's experts."""
        layer, routing = leaving.layer, leaving.routing
        stack = self._stacks[layer]
        live_BK = live_B[:, None].expand_as(routing.expert_TK)
        self._rows_E[layer].scatter_add_(0, routing.expert_TK.flatten(), live_BK.flatten())
        expert_R, choice_R = torch.sort(routing.expert_TK.flatten(), stable=True)
        score_R1 = routing.score_TK.flatten()[choice_R][:, None]
        rows_RH = leaving.x_BH[choice_R // routing.expert_TK.shape[1]] * score_R1
        every_E = torch.arange(len(stack), device=expert_R.device)
        ends_E = torch.searchsorted(expert_R, every_E, right=True, out_int32=True)
        return sum_choices(choice_R, stack_ffn(stack, rows_RH, ends_E), routing)

    def experts(self) -> dict[ExpertKey, ExpertWeights]:
        """Every expert, as views of the stacks."""
        return {
            (layer, expert): stack.expert(expert)
            for layer, stack in self._stacks.items()
            for expert in range(len(stack))
        }

    def rows(self) -> dict[ExpertKey, int]:
        """Rows computed since the start, of experts that had any."""
        return {
            (layer, expert): count
            for layer, rows_E in self._rows_E.items()
            for expert, count in enumerate(rows_E.tolist())
            if count
        }
