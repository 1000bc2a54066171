"""All experts of one layer in two tensors, and their product with rows in shapes that no row's choice changes.

Torch only, no I/O. Shape letters: R rows sorted by expert, E experts, H hidden size, F expert size, K inputs,
N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from experts.ffn import ExpertWeights

GROUPED_MAJORS = (9, 10)
"""Compute capabilities whose grouped product reads the ends of groups on the device; on others torch asks the host."""


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """`gate_up_EFH` [E, 2F, H] and `down_EHF` [E, H, F], contiguous; rows as in `ExpertWeights`."""

    gate_up_EFH: torch.Tensor
    down_EHF: torch.Tensor

    @classmethod
    def empty(cls, num_experts: int, like: ExpertWeights) -> ExpertStack:
        """Room for experts of the size, dtype and device of `like`."""
        return cls(
            gate_up_EFH=like.gate_up_FH.new_empty((num_experts, *like.gate_up_FH.shape)),
            down_EHF=like.down_HF.new_empty((num_experts, *like.down_HF.shape)),
        )

    def __len__(self) -> int:
        return len(self.gate_up_EFH)

    def expert(self, index: int) -> ExpertWeights:
        """One expert, as views."""
        return ExpertWeights(gate_up_FH=self.gate_up_EFH[index], down_HF=self.down_EHF[index])

    def put(self, index: int, weights: ExpertWeights) -> None:
        """Copy one expert to its place."""
        self.gate_up_EFH[index] = weights.gate_up_FH
        self.down_EHF[index] = weights.down_HF


def stack_ffn(stack: ExpertStack, rows_RH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """[R, H]: rows before `ends_E[0]` through expert 0, from there to `ends_E[1]` through expert 1, and so on.

    `ends_E` is int32, ascending, R at its end. Nothing is copied to the host and no shape depends on it.
    """
    gate_RF, up_RF = _products(rows_RH, stack.gate_up_EFH, ends_E).chunk(2, dim=-1)
    return _products(F.silu(gate_RF) * up_RF, stack.down_EHF, ends_E)


def _products(x_RK: torch.Tensor, weights_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    if _can_group(x_RK, weights_ENK):
        return grouped_products(x_RK, weights_ENK, ends_E)
    return every_product(x_RK, weights_ENK, ends_E)


def grouped_products(x_RK: torch.Tensor, weights_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """One kernel that reads the experts that have rows."""
    return F.grouped_mm(x_RK, weights_ENK.transpose(1, 2), offs=ends_E)


def every_product(x_RK: torch.Tensor, weights_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Every expert on every row, of which each row keeps one: the readable version, and the one for every device."""
    owner_R = torch.searchsorted(ends_E, torch.arange(len(x_RK), device=x_RK.device, dtype=ends_E.dtype), right=True)
    y_RN = x_RK.new_zeros((len(x_RK), weights_ENK.shape[1]))
    for expert, weight_NK in enumerate(weights_ENK):
        y_RN = torch.where((owner_R == expert)[:, None], F.linear(x_RK, weight_NK), y_RN)
    return y_RN


def _can_group(x_RK: torch.Tensor, weights_ENK: torch.Tensor) -> bool:
    """The kernel wants bfloat16 and rows of whole 16 bytes."""
    is_even = not (x_RK.shape[1] % 8 or weights_ENK.shape[1] % 8)
    return (
        x_RK.is_cuda and x_RK.dtype is torch.bfloat16 and is_even and _capability_major(x_RK.device) in GROUPED_MAJORS
    )


@cache
def _capability_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
