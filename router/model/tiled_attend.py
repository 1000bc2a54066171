"""Attention whose bits depend on nothing but a query and the keys before it.

Shape letters as in `router.model.attend`, Q queries of a tile, K keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from experts.arithmetic import Arithmetic
from router.model.attend import Turn, turn_heads
from router.model.kv_store import gather
from router.model.spans import Runs, Span, clip_runs, num_slots

TILE = 64


class TiledAttend:
    """Tiles of queries and blocks of keys whose places in the sequence are fixed, and one order of blocks.

    A row of a tile is the same bits whatever the other rows hold, and a block that a query does not see changes
    nothing of its sums. Needs one thread, and tiled arithmetic.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic

    def place(
        self,
        heads_TPD: torch.Tensor,
        num_queries: int,
        turn: Turn,
        keys_SGD: torch.Tensor,
        values_SGD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        by_token = {
            name: rows
            for name, rows in (("rotation", turn.rotation), ("temperature", turn.temperature))
            if rows is not None
        }

        def turn_tile(heads: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            there = dict(zip(by_token, rows, strict=True))
            of_tile = replace(turn, rotation=there.get("rotation"), temperature=there.get("temperature"))
            return turn_heads(heads, num_queries, keys_SGD.shape[1], of_tile)

        query_TND, key_TGD, value_TGD = self._arithmetic.by_rows(turn_tile, heads_TPD, *by_token.values())
        keys_SGD.index_copy_(0, slots_T, key_TGD)
        values_SGD.index_copy_(0, slots_T, value_TGD)
        return query_TND

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
            for start, tile, rows in _tiles(span, num_slots(runs)):
                tile_QND = query_TND.new_zeros((TILE, *query_TND.shape[1:]))
                tile_QND[tile] = query_TND[rows]
                seen = clip_runs(runs, start + tile.stop)
                mixed_TND[rows] = _attend_tile(tile_QND, keys_SGD, values_SGD, seen, start)[tile]
        return mixed_TND


def _tiles(span: Span, end: int) -> Iterator[tuple[int, slice, slice]]:
    """Where each tile begins that has queries of `span`, which part of it they are, and their rows; the span's last
    query is at `end` − 1."""
    first = end - span.count
    for start in range(first // TILE * TILE, end, TILE):
        here = range(max(start, first), min(start + TILE, end))
        rows = slice(span.row + here.start - first, span.row + here.stop - first)
        yield start, slice(here.start - start, here.stop - start), rows


def _attend_tile(
    query_QND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, runs: Runs, start: int
) -> torch.Tensor:
    """Mixed values [Q, N, D] of queries at positions `start` … `start` + Q − 1 of the sequence that `runs` hold."""
    shape = query_QND.shape
    query_NQD = query_QND.float().transpose(0, 1).contiguous() / math.sqrt(shape[-1])
    position_Q = start + torch.arange(TILE, device=query_QND.device)
    largest_NQ1 = query_NQD.new_full((shape[1], TILE, 1), float("-inf"))
    total_NQ1 = torch.zeros_like(largest_NQ1)
    mixed_NQD = torch.zeros_like(query_NQD)
    key_NmD, value_NmD = (_block_rows(whole, runs, shape[1]) for whole in (keys_SGD, values_SGD))
    for block in range(0, key_NmD.shape[1], TILE):
        key_NKD, value_NKD = (whole[:, block : block + TILE].contiguous() for whole in (key_NmD, value_NmD))
        score_NQK = torch.bmm(query_NQD, key_NKD.transpose(1, 2))
        visible_QK = block + torch.arange(TILE, device=query_QND.device) <= position_Q[:, None]
        score_NQK = score_NQK.masked_fill(~visible_QK, float("-inf"))
        new_NQ1 = torch.maximum(largest_NQ1, score_NQK.amax(dim=-1, keepdim=True))
        scale_NQ1, share_NQK = torch.exp(largest_NQ1 - new_NQ1), torch.exp(score_NQK - new_NQ1)
        total_NQ1 = total_NQ1 * scale_NQ1 + share_NQK.sum(dim=-1, keepdim=True)
        mixed_NQD = mixed_NQD * scale_NQ1 + torch.bmm(share_NQK, value_NKD)
        largest_NQ1 = new_NQ1
    return (mixed_NQD / total_NQ1).transpose(0, 1).to(query_QND.dtype)


def _block_rows(whole_SGD: torch.Tensor, runs: Runs, num_heads: int) -> torch.Tensor:
    """float32 [N, m, D] of the slots in `runs`, filled up with zeros to whole blocks."""
    rows_mGD = gather(whole_SGD, runs).float()
    filled = F.pad(rows_mGD, (0, 0, 0, 0, 0, -rows_mGD.shape[0] % TILE))
    return filled.transpose(0, 1).repeat_interleave(num_heads // rows_mGD.shape[1], dim=0)
