"""How the KV cache is laid out: block sizes, how many blocks what takes, and how memory is split between the pools.

There are two pools of fixed-size blocks. A *global* block covers `block_size` tokens of every full-attention
layer, a *local* block `block_size` tokens of every chunked layer. With b = block_size, C = chunk_size, p a
position:

    global table   block p // b,        offset p % b
    local table    block (p - s) // b,  offset (p - s) % b,  s = p // C * C   (s = 0 without chunks)

A chunked layer sees nothing before its chunk, so the local table is dropped whenever a request has computed
up to a border, and starts anew: a sequence of any length holds at most ceil(C / b) local blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from experts.errors import InvalidInput


class BlockCount(NamedTuple):
    """Numbers of global and local blocks."""

    num_global: int
    num_local: int

    def covers(self, other: BlockCount) -> bool:
        """Whether there are at least as many of both kinds."""
        return self.num_global >= other.num_global and self.num_local >= other.num_local

    def minus(self, other: BlockCount) -> BlockCount:
        """What `other` leaves of each kind; never below zero."""
        return BlockCount(max(0, self.num_global - other.num_global), max(0, self.num_local - other.num_local))


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Sizes of the two pools, in blocks of `block_size` tokens.

    `chunk_size` None means that local layers see everything. A kind of layer that the model lacks has no
    blocks and costs nothing.
    """

    block_size: int
    num_global_blocks: int
    num_local_blocks: int
    chunk_size: int | None
    has_global: bool
    has_local: bool

    def __post_init__(self) -> None:
        assert self.block_size >= 1 and (self.chunk_size is None or self.chunk_size >= 1), self
        assert self.has_global or self.has_local, self
        assert self.num_global_blocks >= 0 and (self.has_global or not self.num_global_blocks), self
        assert self.num_local_blocks >= 0 and (self.has_local or not self.num_local_blocks), self

    @property
    def border(self) -> int | None:
        """Length of the chunks that pieces must not cross; None when there are none."""
        return self.chunk_size if self.has_local else None

    def chunk_start(self, position: int) -> int:
        """First position of the chunk that `position` is in."""
        return position // self.border * self.border if self.border else 0

    def clip_to_chunk(self, start: int, count: int) -> int:
        """How many of the `count` positions from `start` are in the chunk of `start`."""
        return min(count, self.border - start % self.border) if self.border else count

    def blocks_needed(self, num_computed: int, num_new: int) -> BlockCount:
        """Lengths of the tables of a sequence that, after `num_computed` tokens, computes `num_new` more, all
        in one chunk."""
        end = num_computed + num_new
        return self._blocks(end, end - self.chunk_start(num_computed))

    def peak_blocks(self, num_tokens: int, num_computed: int = 0) -> BlockCount:
        """The most blocks of each kind that a sequence holds at one time on its way from `num_computed` to
        `num_tokens`."""
        start = self.chunk_start(num_computed)
        return self._blocks(num_tokens, self.clip_to_chunk(start, num_tokens - start))

    def capacity_tokens(self, limit: int) -> int:
        """Length of the longest sequence that fits when it is alone, but no more than `limit`."""
        capacity = limit
        if self.has_global:
            capacity = min(capacity, self.num_global_blocks * self.block_size)
        if self.peak_blocks(capacity).num_local > self.num_local_blocks:
            capacity = self.num_local_blocks * self.block_size
        return capacity

    def _blocks(self, num_global_tokens: int, num_local_tokens: int) -> BlockCount:
        return BlockCount(
            num_global=-(-num_global_tokens // self.block_size) if self.has_global else 0,
            num_local=-(-num_local_tokens // self.block_size) if self.has_local else 0,
        )


def plan_layout(
    *,
    kv_bytes: int,
    bytes_per_global_block: int,
    bytes_per_local_block: int,
    block_size: int,
    chunk_size: int | None,
    has_global: bool,
    has_local: bool,
    max_running: int,
    min_tokens: int = 1,
) -> KVLayout:
    """Split `kv_bytes` into the two pools.

    Inside its first chunk a sequence takes global and local blocks in equal numbers, so the pools start out
    equal. No sequence ever holds more than one chunk of local blocks, so the local pool stops at one chunk
    for each of `max_running` sequences, and global blocks, which are what long contexts need, get all the
    rest. One sequence of `min_tokens` (say, a context length the user asked for) fits in any case, if need be
    at the cost of the local blocks of its neighbours.

    Raises InvalidInput naming `kv_memory` when not even that one sequence fits.
    """
    empty = KVLayout(
        block_size=block_size,
        num_global_blocks=0,
        num_local_blocks=0,
        chunk_size=chunk_size,
        has_global=has_global,
        has_local=has_local,
    )
    global_price = bytes_per_global_block if has_global else 0
    local_price = bytes_per_local_block if has_local else 0
    one = empty.peak_blocks(max(min_tokens, 1))
    least_bytes = one.num_global * global_price + one.num_local * local_price
    if kv_bytes < least_bytes:
        rule = f"must be at least {least_bytes} bytes to hold one sequence of {max(min_tokens, 1)} tokens"
        raise InvalidInput("kv_memory", kv_bytes, rule)
    num_local = 0
    if has_local:
        equal = max(kv_bytes // (global_price + local_price), one.num_local)
        affordable = (kv_bytes - one.num_global * global_price) // local_price
        useful = max_running * empty.peak_blocks(chunk_size).num_local if chunk_size else equal
        num_local = min(equal, affordable, useful)
    num_global = (kv_bytes - num_local * local_price) // global_price if has_global else 0
    return replace(empty, num_global_blocks=num_global, num_local_blocks=num_local)
