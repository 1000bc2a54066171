"""The attention sublayer over a packed batch: normalise, project, turn, store, attend, project back, add.

Shape letters: T packed tokens, H hidden size, P heads (queries, keys, values), D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from experts.arithmetic import Arithmetic
from experts.config import ModelConfig
from router.model.attend import Attend, Turn
from router.model.kv_store import KVStore
from router.model.spans import Span
from router.model.weights import LayerWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a step's tokens stand, the same for all layers: spans of rows, slots [T] in both kinds of layers, rotation
    and temperature by position, and the store."""

    spans: tuple[Span, ...]
    global_slots_T: torch.Tensor
    local_slots_T: torch.Tensor
    rotation: torch.Tensor
    temperature: torch.Tensor
    store: KVStore

    def slots(self, chunked: bool) -> torch.Tensor:
        return self.local_slots_T if chunked else self.global_slots_T


class Attention(Protocol):
    """x + attention of the layer, [T, H]; writes the step's keys and values. May be called for one layer at a time."""

    def __call__(self, x_TH: torch.Tensor, layer: int, weights: LayerWeights, place: Place) -> torch.Tensor: ...


class Sublayer:
    """Part by part, by whatever computes products and attention."""

    def __init__(self, config: ModelConfig, arithmetic: Arithmetic, attend: Attend) -> None:
        self.arithmetic = arithmetic
        self.attend = attend
        self._config = config

    def __call__(self, x_TH: torch.Tensor, layer: int, weights: LayerWeights, place: Place) -> torch.Tensor:
        config, arithmetic, chunked = self._config, self.arithmetic, self._config.chunked_layers[layer]
        normed_TH = arithmetic.norm(x_TH, config.norm_eps, weights.attention_norm_H)
        heads_TPD = arithmetic.linear(normed_TH, weights.qkv_PH).view(len(x_TH), -1, config.head_dim)
        keys_SGD, values_SGD = place.store.layer(layer)
        turn, slots_T = self._turn(layer, place), place.slots(chunked)
        query_TND = self.attend.place(heads_TPD, config.num_heads, turn, keys_SGD, values_SGD, slots_T)
        mixed_TND = self.attend(query_TND, keys_SGD, values_SGD, place.spans, chunked)
        return x_TH + arithmetic.linear(mixed_TND.flatten(1), weights.out_HQ)

    def _turn(self, layer: int, place: Place) -> Turn:
        config = self._config
        if config.rope_layers[layer]:
            return Turn(rotation=place.rotation, norm_eps=config.norm_eps if config.use_qk_norm else None)
        return Turn(temperature=place.temperature if config.attn_temperature_tuning else None)
