"""A slot: the weights of one expert in memory, and by what it is told that they are still what was loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.ffn import ExpertWeights
from experts.kernels.crc32 import crc32
from experts.memory import memory_of

Checksum = tuple[int, int]
"""CRC-32 of `gate_up_FH` and of `down_HF`, as they lie in memory."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """`checksum` is that of `weights` when they came."""

    weights: ExpertWeights
    checksum: Checksum

    @staticmethod
    def of(weights: ExpertWeights) -> Slot:
        return Slot(weights=weights, checksum=checksum_of(weights))

    def is_sound(self) -> bool:
        """Whether the weights are the same bits as when they came. Reads all of them."""
        return checksum_of(self.weights) == self.checksum


def checksum_of(weights: ExpertWeights) -> Checksum:
    return _checksum(weights.gate_up_FH), _checksum(weights.down_HF)


def _checksum(tensor: torch.Tensor) -> int:
    here = tensor.cpu().contiguous()
    return crc32(memory_of(here))
