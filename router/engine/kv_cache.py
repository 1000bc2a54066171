"""Which blocks of the KV cache hold which positions of which request. Knows nothing of tensors (they live in the
runner), of scheduling or of time. The layout says what a block is.

Requests that begin with the same tokens share blocks. A full block whose keys and values are computed gets the name of
its content, and keeps it when the last request has gone, until it is evicted. A *prefix* is what an admitted request
finds of itself under such names: L known tokens that need not be computed,

    every global block of positions 0 … L − 1, and
    every local block of positions s … L − 1, s being the start of the chunk that L is in: none when L is a border.

Shared blocks are only read: they are full, and a request writes positions from `num_computed` on.

Names follow positions in steps of `block_size` from 0. Where a chunk begins within such a step, its local blocks
have no names, and no prefix ends in it: prefixes are right for every block and chunk size, and useful where the first
divides the second. Without global layers a border would be a prefix of anything; there, one local block must be found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from router.engine.block_names import names_of_blocks, next_name, root_name
from router.engine.block_pool import BlockPool
from router.engine.kv_layout import BlockCount, KVLayout
from router.engine.request import Request

__all__ = ["BlockCount", "KVCache", "KVLayout", "KVNumbers", "Prefix"]


class Prefix(NamedTuple):
    """What the cache holds of a request: its first `num_tokens` tokens, in these blocks."""

    num_tokens: int
    global_blocks: list[int]
    local_blocks: list[int]


NOTHING = Prefix(0, [], [])


@dataclass(frozen=True, kw_only=True)
class KVNumbers:
    """How full the cache is and what it is good for.

    `used` and `cached` are shares of all blocks: those in tables of requests, and those that only wait to be asked for
    again. The counts are totals since the start: tokens known at admissions, those of them that were found, and
    blocks evicted. `global_tokens` and `local_tokens` are the sizes of the pools.
    """

    used: float = 0.0
    cached: float = 0.0
    looked_up_tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    global_tokens: int = 0
    local_tokens: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens all requests together can have in the layers that keep them for good."""
        return self.global_tokens or self.local_tokens


class KVCache:
    """The two pools. Tables, names and `num_computed` live in the request, and only this class changes them.

    A step is a pair: `extend` gives slots to the positions it will compute, `commit` says that they were.
    What was extended but not committed (its row left the step) stays reserved and is used by the next try.

    Blocks that no request has count as free, named or not. With `prefix_cache` off none gets a name.
    """

    def __init__(self, layout: KVLayout, *, prefix_cache: bool = True) -> None:
        self.layout = layout
        self._prefix_cache = prefix_cache
        self._global = BlockPool(layout.num_global_blocks)
        self._local = BlockPool(layout.num_local_blocks)
        self._looked_up_tokens = 0
        self._hit_tokens = 0

    @property
    def num_free(self) -> BlockCount:
        return BlockCount(num_global=self._global.num_free, num_local=self._local.num_free)

    def numbers(self) -> KVNumbers:
        size, free = self.layout.block_size, sum(self.num_free)
        total = self._global.num_blocks + self._local.num_blocks
        return KVNumbers(
            used=1 - free / total,
            cached=(self._global.num_cached + self._local.num_cached) / total,
            looked_up_tokens=self._looked_up_tokens,
            hit_tokens=self._hit_tokens,
            evicted_blocks=self._global.num_evicted + self._local.num_evicted,
            global_tokens=self._global.num_blocks * size,
            local_tokens=self._local.num_blocks * size,
        )

    # What is there already

    def find_prefix(self, request: Request) -> Prefix:
        """The longest prefix of a request that has no blocks; at least one known token is left to compute.

        Costs a look-up for each block found. Nothing is taken: use it before anything else is.
        """
        most = (request.num_known - 1) // self.layout.block_size
        if not self._prefix_cache or most < 1:
            return NOTHING
        found = self._find_run(self._global, request, 0, most) if self.layout.has_global else []
        reach = len(found) if self.layout.has_global else most
        local = self._find_local(request, reach)
        num_blocks = reach if local is None else local[0]
        return Prefix(num_blocks * self.layout.block_size, found[:num_blocks], local[1] if local else [])

    def _find_local(self, request: Request, reach: int) -> tuple[int, list[int]] | None:
        """The greatest number of blocks ≤ `reach` at which a prefix may end for the sake of local layers, and their
        blocks of the chunk that this is in; None when they have no say."""
        if not self.layout.has_local:
            return None
        size = self.layout.block_size
        start, end = self.layout.chunk_start(reach * size), reach * size
        while True:
            if start % size == 0:
                blocks = self._find_run(self._local, request, start // size, end // size)
                if blocks or self.layout.has_global or start == 0:
                    return start // size + len(blocks), blocks
            start, end = self.layout.chunk_start(start - 1), start - 1

    def _find_run(self, pool: BlockPool, request: Request, first: int, stop: int) -> list[int]:
        """The blocks of the pool with the content of the request's blocks `first` … `stop` − 1, up to the first that is
        not there."""
        blocks: list[int] = []
        names = request.block_names
        for index in range(first, stop):
            block = pool.find(names[index] if index < len(names) else self._name(request, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _name(self, request: Request, index: int) -> bytes:
        return names_of_blocks(request, index + 1, self.layout.block_size)[index]

    def cost_of_admission(self, request: Request, prefix: Prefix) -> BlockCount:
        """By how many blocks `num_free` will have fallen when all known tokens are computed, if `prefix` is taken and
        nothing is freed but the request's own local blocks at borders."""
        idle_global = sum(not self._global.num_tables(block) for block in prefix.global_blocks)
        idle_local = sum(not self._local.num_tables(block) for block in prefix.local_blocks)
        num_shared = len(prefix.local_blocks) - idle_local
        need = self._to_come(request, prefix.num_tokens, _sizes(prefix), num_shared)
        return BlockCount(idle_global + need.num_global, idle_local + need.num_local)

    def take_prefix(self, request: Request, prefix: Prefix) -> None:
        """Put what `find_prefix` found into the tables of the request, which counts it as computed."""
        assert not any(_sizes(request)) and request.num_computed == 0, "a prefix comes first"
        for block in prefix.global_blocks:
            self._global.share(block)
        for block in prefix.local_blocks:
            self._local.share(block)
        request.global_blocks += prefix.global_blocks
        request.local_blocks += prefix.local_blocks
        request.num_computed = prefix.num_tokens
        self._looked_up_tokens += request.num_known
        self._hit_tokens += prefix.num_tokens

    # What is computed

    def can_extend(self, request: Request, num_new: int) -> bool:
        """Whether `extend` would succeed."""
        return self.num_free.covers(self._shortfall(request, num_new))

    def still_needed(self, request: Request) -> BlockCount:
        """Blocks that `request` will take before all its known tokens are computed, if nothing is freed but its
        own local ones at borders."""
        num_shared = 0
        if (
            self.layout.border
            and request.num_known - self.layout.chunk_start(request.num_computed) > self.layout.border
        ):
            num_shared = sum(self._local.num_tables(block) > 1 for block in request.local_blocks)
        return self._to_come(request, request.num_computed, _sizes(request), num_shared)

    def _to_come(self, request: Request, num_computed: int, held: BlockCount, num_shared: int) -> BlockCount:
        """Blocks to take beyond those `held`, of which `num_shared` local ones stay in other tables at the border."""
        need = self.layout.peak_blocks(request.num_known, num_computed).minus(held)
        beyond = request.num_known - self.layout.chunk_start(num_computed) - (self.layout.border or request.num_known)
        if num_shared and beyond > 0:
            after_border = self.layout.peak_blocks(beyond).num_local - (held.num_local - num_shared)
            need = need._replace(num_local=max(need.num_local, after_border))
        return need

    def extend(self, request: Request, num_new: int) -> None:
        """Give slots to positions [num_computed, num_computed + num_new), all in one chunk.

        All or nothing; asserts `can_extend`.
        """
        assert 0 < num_new == self.layout.clip_to_chunk(request.num_computed, num_new), "crosses a border"
        short = self._shortfall(request, num_new)
        assert self.num_free.covers(short), "ask can_extend first"
        if not any(short):
            return
        wanted = self.layout.peak_blocks(request.num_known, request.num_computed).minus(_sizes(request))
        request.global_blocks += self._global.take(short.num_global, request.global_blocks, wanted.num_global)
        request.local_blocks += self._local.take(short.num_local, request.local_blocks, wanted.num_local)

    def commit(self, request: Request, num_new: int) -> None:
        """The next `num_new` positions, extended before, are computed. At a border the local blocks go."""
        start, end = request.num_computed, request.num_computed + num_new
        assert not any(self._shortfall(request, num_new)), "extend comes first"
        request.num_computed = end
        if self._prefix_cache:
            self._name_full_blocks(request, start, end)
        if self.layout.border and end % self.layout.border == 0:
            self._local.release(request.local_blocks)
            request.local_blocks.clear()

    def _name_full_blocks(self, request: Request, start: int, end: int) -> None:
        """Those that positions start … end − 1 of one chunk have filled."""
        size, chunk_start = self.layout.block_size, self.layout.chunk_start(start)
        for index in range(start // size, end // size):
            name = self._name(request, index)
            if self.layout.has_global:
                self._global.name(request.global_blocks[index], name)
            if self.layout.has_local and chunk_start % size == 0:
                self._local.name(request.local_blocks[index - chunk_start // size], name)

    def free(self, request: Request) -> None:
        """Take every block back: nothing of the request is computed any more, though it may be found again."""
        self._global.release(request.global_blocks)
        self._local.release(request.local_blocks)
        request.global_blocks.clear()
        request.local_blocks.clear()
        request.num_computed = 0

    def _shortfall(self, request: Request, num_new: int) -> BlockCount:
        return self.layout.blocks_needed(request.num_computed, num_new).minus(_sizes(request))

    # What must hold between any two calls

    def check_integrity(self, owners: Iterable[Request]) -> None:
        """Assert that every block is in one state, that tables are as long as they must be, and that blocks in them
        have the names of what the tables say is in them.

        `owners` are all requests that may hold blocks.
        """
        owners = list(owners)
        self._global.check_integrity(request.global_blocks for request in owners)
        self._local.check_integrity(request.local_blocks for request in owners)
        for request in owners:
            self._check_lengths(request)
            self._check_names(request)

    def _check_lengths(self, request: Request) -> None:
        start = request.num_computed
        ahead = self.layout.clip_to_chunk(start, max(0, request.num_known - start))
        held = _sizes(request)
        assert held.covers(self.layout.blocks_needed(start, 0)), f"{request.request_id} has too few blocks"
        assert self.layout.blocks_needed(start, ahead).covers(held), f"{request.request_id} has too many blocks"

    def _check_names(self, request: Request) -> None:
        size, num_full = self.layout.block_size, request.num_computed // self.layout.block_size
        expected: list[bytes] = []
        for index in range(num_full):
            expected.append(next_name(expected[-1] if expected else root_name(request), request, index * size, size))
        chunk_start = self.layout.chunk_start(request.num_computed)
        aligned = expected[chunk_start // size :] if chunk_start % size == 0 else []
        _check_table(self._global, request.global_blocks, expected, request.request_id)
        _check_table(self._local, request.local_blocks, aligned, request.request_id)


def _check_table(pool: BlockPool, table: list[int], expected: list[bytes], owner: str) -> None:
    for index, block in enumerate(table):
        name = pool.name_of(block)
        if index < len(expected):
            assert name in (None, expected[index]), f"{owner}: block {block} holds something else"
        else:
            assert name is None, f"{owner}: block {block} is named before it is full"


def _sizes(tables: Request | Prefix) -> BlockCount:
    return BlockCount(len(tables.global_blocks), len(tables.local_blocks))
