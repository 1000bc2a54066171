"""The attention sublayer over a packed batch: project, turn, store, attend, project back.

Shape letters: T packed tokens, H hidden size, N query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from experts.arithmetic import Arithmetic
from experts.config import ModelConfig
from router.model.attend import Attend
from router.model.kv_store import KVStore
from router.model.norms import rms_norm
from router.model.rope import rotate
from router.model.spans import Span
from router.model.weights import LayerWeights


def attention(
    x_TH: torch.Tensor,
    layer: int,
    weights: LayerWeights,
    config: ModelConfig,
    spans: Sequence[Span],
    slots_T: torch.Tensor,
    rotation: torch.Tensor,
    temperature: torch.Tensor,
    store: KVStore,
    arithmetic: Arithmetic,
    attend: Attend,
) -> torch.Tensor:
    """Normalise, project, write this step's keys and values, attend per span, project back: [T, H] to [T, H]."""
    project = partial(_project, layer=layer, weights=weights, config=config, arithmetic=arithmetic)
    query_TND, key_TGD, value_TGD = arithmetic.by_rows(project, x_TH, rotation, temperature)
    store.write(layer, slots_T, key_TGD, value_TGD)
    mixed_TND = attend(query_TND, *store.layer(layer), spans, config.chunked_layers[layer])
    return arithmetic.linear(mixed_TND.flatten(1), weights.out_HQ)


def _project(
    x_TH: torch.Tensor,
    rotation: torch.Tensor,
    temperature: torch.Tensor,
    *,
    layer: int,
    weights: LayerWeights,
    config: ModelConfig,
    arithmetic: Arithmetic,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, N, D], keys and values [T, G, D], as they are stored and attended to."""
    normed_TH = rms_norm(x_TH, config.norm_eps, weights.attention_norm_H)
    num_keyed = config.num_heads + config.num_kv_heads
    heads = arithmetic.linear(normed_TH, weights.qkv_PH).view(len(x_TH), -1, config.head_dim)
    keyed, value_TGD = heads[:, :num_keyed], heads[:, num_keyed:]
    if config.rope_layers[layer]:
        # Queries and keys alike, in one go.
        keyed = rotate(keyed, rotation)
        keyed = rms_norm(keyed, config.norm_eps) if config.use_qk_norm else keyed
    query_TND, key_TGD = keyed[:, : config.num_heads], keyed[:, config.num_heads :]
    if config.attn_temperature_tuning and not config.rope_layers[layer]:
        query_TND = (query_TND * temperature).to(query_TND.dtype)
    return query_TND, key_TGD, value_TGD
