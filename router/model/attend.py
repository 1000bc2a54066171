"""Attention of queries over stored keys and values: what it is, and two ways that equal each other up to rounding.

`PlainAttend` says what is computed, `FlashAttend` reads the store in place.
Shape letters: T packed tokens, n tokens of one span, m visible keys, S slots, N query heads, G key/value heads,
D head dimension, P heads (queries, keys, values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from experts.arithmetic import rms_norm
from router.model.kv_store import gather
from router.model.rope import rotate
from router.model.spans import Runs, Span


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a layer does to its heads after their projection: complex64 `rotation` [T, 1, D/2] and then the norm, or the
    float32 `temperature` [T, 1, 1] of queries, or nothing."""

    rotation: torch.Tensor | None = None
    norm_eps: float | None = None
    temperature: torch.Tensor | None = None


class Attend(Protocol):
    """Causal attention of every span over its own runs of the store."""

    def place(
        self,
        heads_TPD: torch.Tensor,
        num_queries: int,
        turn: Turn,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        """Turn the heads (queries, keys, values), write keys and values to their slots; queries [T, N, D] are left.
        May overwrite `heads_TPD`."""
        ...

    def __call__(
        self,
        query_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> torch.Tensor:
        """Mixed values [T, N, D]. The spans' own keys and values are in the store already."""
        ...


def turn_heads(
    heads_TPD: torch.Tensor, num_queries: int, num_keys: int, turn: Turn
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, N, D], keys and values [T, G, D], as they are attended to and stored."""
    num_keyed = num_queries + num_keys
    keyed, value_TGD = heads_TPD[:, :num_keyed], heads_TPD[:, num_keyed:]
    if turn.rotation is not None:
        # Queries and keys alike, in one go.
        keyed = rotate(keyed, turn.rotation)
        keyed = keyed if turn.norm_eps is None else rms_norm(keyed, turn.norm_eps)
    query_TND, key_TGD = keyed[:, :num_queries], keyed[:, num_queries:]
    if turn.temperature is not None:
        query_TND = (query_TND * turn.temperature).to(query_TND.dtype)
    return query_TND, key_TGD, value_TGD


class TorchPlace:
    """`place` by torch."""

    def place(
        self,
        heads_TPD: torch.Tensor,
        num_queries: int,
        turn: Turn,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        query_TND, key_TGD, value_TGD = turn_heads(heads_TPD, num_queries, keys_SGD.shape[1], turn)
        keys_SGD.index_copy_(0, slots_T, key_TGD)
        values_SGD.index_copy_(0, slots_T, value_TGD)
        return query_TND


class PlainAttend(TorchPlace):
    """Gathers each span's keys and values and leaves the rest to torch."""

    def __call__(
        self,
        query_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> torch.Tensor:
        mixed_TND = torch.empty_like(query_TND)
        for span in spans:
            runs = span.runs(chunked)
            mixed_TND[span.rows] = _causal(query_TND[span.rows], gather(keys_SGD, runs), gather(values_SGD, runs))
        return mixed_TND


def _causal(query_nND: torch.Tensor, key_mGD: torch.Tensor, value_mGD: torch.Tensor) -> torch.Tensor:
    """The last query sees every key and each earlier one sees one key less."""
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


class FlashAttend(TorchPlace):
    """Torch's fused attention for CPUs over views of the store, run by run, joined by their log-sum-exps.

    Nothing is copied, and no mask is made: what a span sees is all of the past and the causal part of itself.
    """

    def __call__(
        self,
        query_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> torch.Tensor:
        mixed_TND = torch.empty_like(query_TND)
        self.fill(mixed_TND, query_TND, keys_SGD, values_SGD, spans, chunked)
        return mixed_TND

    def fill(
        self,
        mixed_TND: torch.Tensor,
        query_TND: torch.Tensor,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        spans: Sequence[Span],
        chunked: bool,
    ) -> None:
        """Write the rows of `spans` in `mixed_TND`."""
        for span in spans:
            query_nND = query_TND[span.rows]
            if span.count == 1:
                mixed_TND[span.rows] = _decode(query_nND, keys_SGD, values_SGD, span.runs(chunked))
            else:
                mixed_TND[span.rows] = _prefill(query_nND, keys_SGD, values_SGD, span, chunked)


_Part = tuple[torch.Tensor, torch.Tensor]
"""Mixed values and the log-sum-exp of the scores behind them, [heads, queries, D] and [heads, queries]."""


def _flash(query_hqD: torch.Tensor, key_GmD: torch.Tensor, value_GmD: torch.Tensor, *, causal: bool) -> _Part:
    mixed, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_hqD.unsqueeze(0), key_GmD.unsqueeze(0), value_GmD.unsqueeze(0), is_causal=causal
    )
    return mixed.squeeze(0), log_sum.squeeze(0)


def _decode(query_1ND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, runs: Runs) -> torch.Tensor:
    """One query. The heads that share keys are taken as queries of one head, so that keys are read once."""
    num_groups = keys_SGD.shape[1]
    query_GqD = query_1ND.reshape(num_groups, -1, query_1ND.shape[-1])
    return _join([_over(query_GqD, keys_SGD, values_SGD, run) for run in runs]).reshape(query_1ND.shape)


def _prefill(
    query_nND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, span: Span, chunked: bool
) -> torch.Tensor:
    query_NnD = query_nND.transpose(0, 1)
    own = span.own(chunked)
    parts = [_over(query_NnD, keys_SGD, values_SGD, run) for run in span.past(chunked)]
    key, value = (gather(whole, own).transpose(0, 1) for whole in (keys_SGD, values_SGD))
    parts.append(_flash(query_NnD, key, value, causal=True))
    return _join(parts).transpose(0, 1)


def _over(query_hqD: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, run: range) -> _Part:
    key, value = (whole[run.start : run.stop].transpose(0, 1) for whole in (keys_SGD, values_SGD))
    return _flash(query_hqD, key, value, causal=False)


def _join(parts: Sequence[_Part]) -> torch.Tensor:
    """Attention over all keys from attention over parts of them."""
    if len(parts) == 1:
        return parts[0][0]
    mixed_phqD = torch.stack([mixed for mixed, _ in parts])
    weight_phq = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), dim=0)
    return (mixed_phqD.float() * weight_phq.unsqueeze(-1)).sum(dim=0).to(mixed_phqD.dtype)
