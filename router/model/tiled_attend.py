"""Attention whose bits depend on nothing but a query and the keys before it.

Shape letters as in `router.model.attend`, B tiles, Q queries of a tile, K keys of a block, m keys of a tile in whole
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from experts.arithmetic import Arithmetic
from router.model.attend import Turn, turn_heads
from router.model.spans import Runs, Span, clip_runs, num_slots

TILE, BLOCK = 16, 64
"""Queries of a tile and keys of a block."""
MAX_KEYS = 1 << 14
"""So many keys of all tiles together are attended to at a time; of one tile, any."""


@dataclass(frozen=True, eq=False)
class _Tile:
    """Queries at positions `start` … `start` + Q − 1, of which those in `part` are the packed `rows`; `runs` hold the
    keys before the last of them."""

    start: int
    part: slice
    rows: slice
    runs: Runs

    @property
    def num_blocks(self) -> int:
        return -(-num_slots(self.runs) // BLOCK)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tiles that are computed together, those with most blocks first. `slots_Bm` are the slots of their keys, any where
    `empty_Bm` says that there is none; `at_B1` positions of the tiles' first queries."""

    tiles: tuple[_Tile, ...]
    slots_Bm: torch.Tensor
    empty_Bm: torch.Tensor
    at_B1: torch.Tensor

    def num_with(self, block: int) -> int:
        """How many of the tiles have keys in block number `block`: the first ones."""
        return sum(tile.num_blocks > block for tile in self.tiles)


class TiledAttend:
    """Tiles of queries and blocks of keys whose places in the sequence are fixed, and one order of blocks.

    A row of a tile is the same bits whatever the other rows and tiles hold, and a block that a query does not see
    changes nothing of its sums. Needs one thread, and tiled arithmetic.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self._planned: dict[bool, tuple[Sequence[Span], list[_Batch]]] = {}

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
        for batch in self._batches(spans, chunked, query_TND.device):
            query_BQND = query_TND.new_zeros((len(batch.tiles), TILE, *query_TND.shape[1:]))
            for number, tile in enumerate(batch.tiles):
                query_BQND[number, tile.part] = query_TND[tile.rows]
            mixed_BQND = _attend(query_BQND, keys_SGD, values_SGD, batch)
            for number, tile in enumerate(batch.tiles):
                mixed_TND[tile.rows] = mixed_BQND[number, tile.part]
        return mixed_TND

    def _batches(self, spans: Sequence[Span], chunked: bool, device: torch.device) -> list[_Batch]:
        """The same for all layers of a kind in one step."""
        known = self._planned.get(chunked)
        if known is None or known[0] is not spans:
            known = spans, [_batch(tiles, device) for tiles in _together(spans, chunked)]
            self._planned[chunked] = known
        return known[1]


def _together(spans: Sequence[Span], chunked: bool) -> Iterator[list[_Tile]]:
    """All tiles of `spans`, as many at a time as have MAX_KEYS keys, padding included."""
    tiles = sorted(chain.from_iterable(_tiles(span, chunked) for span in spans), key=lambda tile: -tile.num_blocks)
    while tiles:
        count = max(1, MAX_KEYS // (BLOCK * tiles[0].num_blocks))
        yield tiles[:count]
        tiles = tiles[count:]


def _tiles(span: Span, chunked: bool) -> Iterator[_Tile]:
    """The tiles that have queries of `span`, whose last query is the last of its runs' positions."""
    runs = span.runs(chunked)
    end = num_slots(runs)
    first = end - span.count
    for start in range(first // TILE * TILE, end, TILE):
        here = range(max(start, first), min(start + TILE, end))
        rows = slice(span.row + here.start - first, span.row + here.stop - first)
        part = slice(here.start - start, here.stop - start)
        yield _Tile(start, part, rows, clip_runs(runs, here.stop))


def _batch(tiles: Sequence[_Tile], device: torch.device) -> _Batch:
    length = BLOCK * tiles[0].num_blocks
    counts = torch.tensor([num_slots(tile.runs) for tile in tiles])
    slots_Bm = torch.zeros((len(tiles), length), dtype=torch.int64)
    for slots_m, tile in zip(slots_Bm, tiles, strict=True):
        slots_m[: num_slots(tile.runs)] = torch.cat([torch.arange(run.start, run.stop) for run in tile.runs])
    empty_Bm = torch.arange(length) >= counts[:, None]
    at_B1 = torch.tensor([[tile.start] for tile in tiles])
    return _Batch(tuple(tiles), slots_Bm.to(device), empty_Bm.to(device), at_B1.to(device))


def _attend(query_BQND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """Mixed values [B, Q, N, D]."""
    num_tiles, _, num_heads, head_dim = query_BQND.shape
    query_BNQD = query_BQND.float().transpose(1, 2).contiguous() / math.sqrt(head_dim)
    largest_BNQ1 = query_BNQD.new_full((num_tiles, num_heads, TILE, 1), float("-inf"))
    total_BNQ1 = torch.zeros_like(largest_BNQ1)
    mixed_BNQD = torch.zeros_like(query_BNQD)
    key_BNmD, value_BNmD = (_keyed(whole, batch, num_heads) for whole in (keys_SGD, values_SGD))
    position_BQ = batch.at_B1 + torch.arange(TILE, device=query_BQND.device)
    for block in range(key_BNmD.shape[2] // BLOCK):
        # The tiles that have such a block come first; the others' results are complete.
        some = slice(0, batch.num_with(block))
        keys = slice(block * BLOCK, (block + 1) * BLOCK)
        key_BNKD, value_BNKD = key_BNmD[some, :, keys].contiguous(), value_BNmD[some, :, keys].contiguous()
        score_BNQK = torch.matmul(query_BNQD[some], key_BNKD.transpose(2, 3))
        position_K = torch.arange(keys.start, keys.stop, device=query_BQND.device)
        unseen_BQK = position_K > position_BQ[some, :, None]
        score_BNQK = score_BNQK.masked_fill(unseen_BQK[:, None], float("-inf"))
        new_BNQ1 = torch.maximum(largest_BNQ1[some], score_BNQK.amax(dim=-1, keepdim=True))
        scale_BNQ1, share_BNQK = torch.exp(largest_BNQ1[some] - new_BNQ1), torch.exp(score_BNQK - new_BNQ1)
        total_BNQ1[some] = total_BNQ1[some] * scale_BNQ1 + share_BNQK.sum(dim=-1, keepdim=True)
        mixed_BNQD[some] = mixed_BNQD[some] * scale_BNQ1 + torch.matmul(share_BNQK, value_BNKD)
        largest_BNQ1[some] = new_BNQ1
    return (mixed_BNQD / total_BNQ1).transpose(1, 2).to(query_BQND.dtype)


def _keyed(whole_SGD: torch.Tensor, batch: _Batch, num_heads: int) -> torch.Tensor:
    """float32 [B, N, m, D] of the batch's slots, zeros where there is none: what a stranger left there may be no
    number."""
    rows_BmGD = whole_SGD[batch.slots_Bm].float()
    rows_BmGD.masked_fill_(batch.empty_Bm[..., None, None], 0.0)
    return rows_BmGD.transpose(1, 2).repeat_interleave(num_heads // whole_SGD.shape[1], dim=1)
