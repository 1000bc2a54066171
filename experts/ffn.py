"""The feed-forward network of one expert: its weights and the plain matmuls. Torch only, no I/O.

Shape letters: T rows, H hidden size, F expert size (gate_up stacks gate rows, then up rows: 2F).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """One SwiGLU network, out-features first: `gate_up_FH` [2F, H] (gate rows, then up rows), `down_HF` [H, F]."""

    gate_up_FH: torch.Tensor
    down_HF: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.gate_up_FH.nbytes + self.down_HF.nbytes

    def to(self, device: torch.device) -> ExpertWeights:
        """These on `device`; the same where they are."""
        return ExpertWeights(gate_up_FH=self.gate_up_FH.to(device), down_HF=self.down_HF.to(device))


def expert_ffn(weights: ExpertWeights, x_TH: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) · up x), [T, H] to [T, H]."""
    gate_TF, up_TF = F.linear(x_TH, weights.gate_up_FH).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TF) * up_TF, weights.down_HF)
