"""The attention sublayer over a packed batch: normalise, project, turn, store, attend, project back.

Shape letters: T packed tokens, H hidden size, P heads (queries, keys, values), D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experts.arithmetic import Arithmetic
from experts.config import ModelConfig
from router.model.attend import Attend, Turn
from router.model.kv_store import KVStore
from router.model.spans import Span
from router.model.weights import LayerWeights


def attention(
    x_TH: torch.Tensor,
    layer: int,
    weights: LayerWeights,
    config: ModelConfig,
    spans: Sequence[Span],
    slots_T: torch.Tensor,
    turn: Turn,
    store: KVStore,
    arithmetic: Arithmetic,
    attend: Attend,
) -> torch.Tensor:
    """What the sublayer adds to `x_TH`, [T, H]; writes this step's keys and values."""
    normed_TH = arithmetic.norm(x_TH, config.norm_eps, weights.attention_norm_H)
    heads_TPD = arithmetic.linear(normed_TH, weights.qkv_PH).view(len(x_TH), -1, config.head_dim)
    keys_SGD, values_SGD = store.layer(layer)
    query_TND = attend.place(heads_TPD, config.num_heads, turn, keys_SGD, values_SGD, slots_T)
    mixed_TND = attend(query_TND, keys_SGD, values_SGD, spans, config.chunked_layers[layer])
    return arithmetic.linear(mixed_TND.flatten(1), weights.out_HQ)
