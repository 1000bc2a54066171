"""The trunk's weights as plain tensors; reading them from files happens elsewhere.

Shape letters: H hidden size, Q query width (heads · D), P query + key + value width, E experts, F ffn size,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.ffn import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer. `ffn` is the shared expert of an MoE layer or the MLP of a dense one; `gate_EH` is None
    in dense layers. `qkv_PH` stacks the query, key and value projections."""

    attention_norm_H: torch.Tensor
    qkv_PH: torch.Tensor
    out_HQ: torch.Tensor
    ffn_norm_H: torch.Tensor
    gate_EH: torch.Tensor | None
    ffn: ExpertWeights


@dataclass(frozen=True, kw_only=True)
class TrunkWeights:
    """Everything of the text model but its routed experts."""

    embedding_VH: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_H: torch.Tensor
    head_VH: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VH.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VH.device
