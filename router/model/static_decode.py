"""One decode step in fixed shapes, in segments that are cut wherever rows leave for routed experts.

Nothing in a segment looks at a number on the host, and every segment reads and writes the same tensors each time, so a
segment can be recorded once and repeated. Equal to `Decoder.forward` up to rounding.
Shape letters: B rows, one token each, M slots gathered for all rows, m for one, H hidden size, N query heads,
G key/value heads, Q = N ÷ G, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from experts.arithmetic import rms_norm
from experts.config import ModelConfig
from experts.ffn import expert_ffn
from router.gate import gate
from router.model.attend import TorchPlace, Turn
from router.model.kv_store import KVStore
from router.model.rope import inverse_frequencies, rotations, temperatures
from router.model.static_inputs import DecodeInputs, Sight, sight
from router.model.weights import TrunkWeights
from router.routed import Routing


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """Rows on their way to the routed experts of `layer`."""

    layer: int
    x_BH: torch.Tensor
    routing: Routing


class ExpertsAtHand(Protocol):
    """Routed experts that compute in fixed shapes, without a copy to the host; see `Routing` for the sum."""

    def compute(self, leaving: Leaving, live_B: torch.Tensor) -> torch.Tensor:
        """[B, H]. Rows where `live_B` is 0 count for nothing."""
        ...


Segment = Callable[[], Leaving | torch.Tensor | None]
"""A part of the step: ends with rows that leave, with None where what came back of them is due, or with the logits."""


class StaticStep:
    """A step over `inputs`, on whose numbers each run of the segments depends, and on `y_BH`: what the experts made of
    the rows that left last, which whoever runs the segments writes there."""

    def __init__(
        self, config: ModelConfig, weights: TrunkWeights, store: KVStore, inputs: DecodeInputs, *, block_size: int
    ) -> None:
        self.inputs = inputs
        self.y_BH = weights.embedding_VH.new_zeros((inputs.shape.batch, config.hidden_size))
        self._config = config
        self._weights = weights
        self._store = store
        self._block_size = block_size
        self._place = TorchPlace()
        self._inverse_frequency = inverse_frequencies(config).to(weights.device)

    def segments(self) -> Iterator[Segment]:
        """To be run in this order, all of them."""
        parts: list[Callable[[], None]] = [self._start]
        for layer, weights in enumerate(self._weights.layers):
            parts.append(partial(self._attend, layer))
            if weights.gate_EH is None:
                parts += [partial(self._compute_beside, layer), self._add_beside]
                continue
            yield partial(self._until_rows_leave, tuple(parts), layer)
            # Recorded alone: it runs while the rows travel.
            yield partial(self._compute_beside, layer)
            parts = [self._add_both]
        yield partial(self._until_logits, tuple(parts))

    def whole(self, experts: ExpertsAtHand) -> torch.Tensor:
        """[B, V] logits, with experts that are at hand: all segments as one."""
        for segment in self.segments():
            result = segment()
            if isinstance(result, Leaving):
                self.y_BH = experts.compute(result, self.inputs.live_B)
        assert isinstance(result, torch.Tensor), "the last segment ends with the logits"
        return result

    def _until_rows_leave(self, parts: tuple[Callable[[], None], ...], layer: int) -> Leaving:
        for part in parts:
            part()
        gate_EH = self._weights.layers[layer].gate_EH
        assert gate_EH is not None, layer
        routing = gate(F.linear(self._normed_BH, gate_EH), self._config.experts_per_token)
        return Leaving(layer=layer, x_BH=self._normed_BH, routing=routing)

    def _until_logits(self, parts: tuple[Callable[[], None], ...]) -> torch.Tensor:
        for part in parts:
            part()
        normed_BH = rms_norm(self._x_BH, self._config.norm_eps, self._weights.norm_H)
        return F.linear(normed_BH, self._weights.head_VH)

    def _start(self) -> None:
        inputs, config = self.inputs, self._config
        self._x_BH = F.embedding(inputs.ids_B, self._weights.embedding_VH)
        self._rotation = rotations(inputs.positions_B, self._inverse_frequency)
        self._temperature = temperatures(inputs.positions_B, config)
        self._sights = {chunked: self._sight(chunked) for chunked in set(config.chunked_layers)}

    def _sight(self, chunked: bool) -> Sight:
        return sight(
            self.inputs,
            chunked=chunked,
            chunk_size=self._config.chunk_size,
            block_size=self._block_size,
            blank_slot=self._store.blank_slot(chunked),
            scratch_slot=self._store.scratch_slot(chunked),
            dtype=self._weights.dtype,
        )

    def _attend(self, layer: int) -> None:
        config, weights = self._config, self._weights.layers[layer]
        seen = self._sights[config.chunked_layers[layer]]
        normed_BH = rms_norm(self._x_BH, config.norm_eps, weights.attention_norm_H)
        heads_BPD = F.linear(normed_BH, weights.qkv_PH).view(len(normed_BH), -1, config.head_dim)
        keys_SGD, values_SGD = self._store.layer(layer)
        query_BND = self._place.place(heads_BPD, config.num_heads, self._turn(layer), keys_SGD, values_SGD, seen.own_B)
        mixed_BND = attend_gathered(query_BND, keys_SGD, values_SGD, seen)
        self._x_BH = self._x_BH + F.linear(mixed_BND.flatten(1), weights.out_HQ)
        self._normed_BH = rms_norm(self._x_BH, config.norm_eps, weights.ffn_norm_H)

    def _turn(self, layer: int) -> Turn:
        config = self._config
        if config.rope_layers[layer]:
            return Turn(rotation=self._rotation, norm_eps=config.norm_eps if config.use_qk_norm else None)
        return Turn(temperature=self._temperature if config.attn_temperature_tuning else None)

    def _compute_beside(self, layer: int) -> None:
        """The shared expert, or the network of a dense layer."""
        self._beside_BH = expert_ffn(self._weights.layers[layer].ffn, self._normed_BH)

    def _add_beside(self) -> None:
        self._x_BH = self._x_BH + self._beside_BH

    def _add_both(self) -> None:
        self._x_BH = self._x_BH + (self._beside_BH + self.y_BH)


def attend_gathered(
    query_BND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, seen: Sight
) -> torch.Tensor:
    """Mixed values [B, N, D] of one query per row over what it sees. The heads that share keys are taken as queries of
    one head, so that keys are neither read nor copied more than once."""
    batch, _, dim = query_BND.shape
    groups = keys_SGD.shape[1]
    key_BGmD, value_BGmD = (
        whole.index_select(0, seen.slots_M).view(batch, -1, groups, dim).transpose(1, 2)
        for whole in (keys_SGD, values_SGD)
    )
    query_BGQD = query_BND.reshape(batch, groups, -1, dim)
    mixed_BGQD = F.scaled_dot_product_attention(query_BGQD, key_BGmD, value_BGmD, attn_mask=seen.mask_B11m)
    return mixed_BGQD.reshape(query_BND.shape)
