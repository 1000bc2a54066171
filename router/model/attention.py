"""Attention of one layer over a packed batch and the key/value store behind it.

A *slot* of the store holds keys and values of one token; which slots belong to which request is decided elsewhere.
Shape letters: T packed tokens, n tokens of one span, m visible keys, H hidden size, N query heads, G key/value heads,
D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experts.config import ModelConfig
from router.model.rope import rotate
from router.model.weights import LayerWeights


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens of one request in a packed batch.

    Rows [row, row + count) hold positions [position, position + count). `global_slots` lists the slots of positions
    0 … position + count − 1, `local_slots` those from the start of the current attention chunk on: a span never
    crosses a chunk border, so plain causal order among these is all the masking there is.
    """

    row: int
    count: int
    position: int
    global_slots: torch.Tensor
    local_slots: torch.Tensor

    def slots(self, chunked: bool) -> torch.Tensor:
        return self.local_slots if chunked else self.global_slots


class KVStore:
    """Keys and values of every layer; chunked layers have slots of their own, fewer than the others."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_global_slots: int,
        num_local_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Not zeroed: a slot is only read once it was written, and pages of a CPU's memory are taken when first touched.
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for chunked in config.chunked_layers:
            shape = (num_local_slots if chunked else num_global_slots, config.num_kv_heads, config.head_dim)
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            self._layers.append((keys, values))

    def write(self, layer: int, slots_T: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor) -> None:
        """Store keys and values of T tokens in their slots."""
        keys, values = self._layers[layer]
        keys.index_copy_(0, slots_T, key_TGD)
        values.index_copy_(0, slots_T, value_TGD)

    def read(self, layer: int, slots_m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [m, G, D] of the given slots, in their order."""
        keys, values = self._layers[layer]
        return keys.index_select(0, slots_m), values.index_select(0, slots_m)


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Root-mean-square norm over the last dimension: statistics in float32, the product with `weight` after the
    cast back, as the reference does."""
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def attention(
    x_TH: torch.Tensor,
    layer: int,
    weights: LayerWeights,
    config: ModelConfig,
    spans: tuple[Span, ...],
    slots_T: torch.Tensor,
    rotation: torch.Tensor,
    temperature: torch.Tensor,
    store: KVStore,
) -> torch.Tensor:
    """Project, write this step's keys and values, attend per span, project back: [T, H] to [T, H]."""
    query_TND, key_TGD, value_TGD = _project(x_TH, weights, config)
    if config.rope_layers[layer]:
        query_TND, key_TGD = rotate(query_TND, rotation), rotate(key_TGD, rotation)
        if config.use_qk_norm:
            query_TND, key_TGD = rms_norm(query_TND, config.norm_eps), rms_norm(key_TGD, config.norm_eps)
    elif config.attn_temperature_tuning:
        query_TND = (query_TND * temperature).to(query_TND.dtype)
    store.write(layer, slots_T, key_TGD, value_TGD)
    chunked = config.chunked_layers[layer]
    mixed_TND = torch.empty_like(query_TND)
    for span in spans:
        keys, values = store.read(layer, span.slots(chunked))
        rows = slice(span.row, span.row + span.count)
        mixed_TND[rows] = _attend(query_TND[rows], keys, values)
    return F.linear(mixed_TND.flatten(1), weights.out_HQ)


def _project(
    x_TH: torch.Tensor, weights: LayerWeights, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    heads = F.linear(x_TH, weights.qkv_PH).view(-1, sum(sizes), config.head_dim)
    query_TND, key_TGD, value_TGD = torch.split(heads, sizes, dim=1)
    return query_TND, key_TGD, value_TGD


def _attend(query_nND: torch.Tensor, key_mGD: torch.Tensor, value_mGD: torch.Tensor) -> torch.Tensor:
    """Causal attention where the last query sees every key and each earlier one sees one key less."""
    num_queries, num_keys = query_nND.shape[0], key_mGD.shape[0]
    mask = None
    if 1 < num_queries < num_keys:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_nND.device)
        mask = ones.tril(diagonal=num_keys - num_queries)
    mixed = F.scaled_dot_product_attention(
        query_nND.transpose(0, 1).unsqueeze(0),
        key_mGD.transpose(0, 1).unsqueeze(0),
        value_mGD.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=True,
    )
    return mixed.squeeze(0).transpose(0, 1)
