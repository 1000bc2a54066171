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
    """Fulfils `ExpertsAtHand`. `stacks` are the experts of each MoE layer, in order of the layers.

    `rows_LE` are the rows computed since the start, by MoE layer and expert. They are counted where they are computed,
    and read when somebody asks.
    """

    def __init__(self, stacks: Mapping[int, ExpertStack]) -> None:
        self._stacks = dict(stacks)
        self.layers = tuple(self._stacks)
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        num_experts = max(map(len, self._stacks.values()), default=0)
        device = next((stack.down_EHF.device for stack in self._stacks.values()), None)
        self.rows_LE = torch.zeros((len(self._stacks), num_experts), dtype=torch.int64, device=device)

    def compute(self, leaving: Leaving, live_B: torch.Tensor) -> torch.Tensor:
        """[B, H]: the sum of each row's experts."""
        stack, routing = self._stacks[leaving.layer], leaving.routing
        live_BK = live_B[:, None].expand_as(routing.expert_TK)
        self.rows_LE[self._index[leaving.layer]].scatter_add_(0, routing.expert_TK.flatten(), live_BK.flatten())
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
            for layer, counts in zip(self._stacks, self.rows_LE.tolist(), strict=True)
            for expert, count in enumerate(counts)
            if count
        }
