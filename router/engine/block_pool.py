"""One pool of equal blocks: who is free, who is in how many tables, and whose content has a name.

A block is in exactly one state:

    free         no table has it and its content is worth nothing
    referenced   one table has it, or several have it in common
    cached       no table has it, but its content has a name under which it may be wanted again

Free blocks are handed out before a cached one is evicted. Cached ones go least recently used first, and a table's
last block before its first, so that what is left of it is still a prefix.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from router.engine.free_extents import FreeExtents

EVICT_AT_ONCE = 32
"""A pool that has been in use for long has no free blocks. Evicted one by one, a table's blocks would come backwards;
some at a time make an extent again. Never more than a 64th of the pool."""


class BlockPool:
    """Blocks 0 … num_blocks − 1, all free at first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evicted = 0
        self._num_tables = [0] * num_blocks
        self._free = FreeExtents(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` may hand out, the cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def find(self, name: bytes) -> int | None:
        """The block with this content."""
        return self._block_of.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._name_of.get(block)

    def num_tables(self, block: int) -> int:
        """In how many tables it is."""
        return self._num_tables[block]

    def take(self, count: int, table: Sequence[int], wanted: int) -> list[int]:
        """`count` ≤ `num_free` blocks to put at the end of `table`, which is going to want `wanted` in all."""
        short = count - len(self._free)
        if short > 0:
            self._evict(max(short, min(EVICT_AT_ONCE, self.num_blocks // 64)))
        blocks = self._free.take(count, table[-1] if table else None, max(count, wanted))
        for block in blocks:
            self._num_tables[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """One more table has this named block."""
        assert block in self._name_of, f"block {block} has no content to share"
        self._num_tables[block] += 1
        self._cached.pop(block, None)

    def release(self, table: Sequence[int]) -> None:
        """A table gives its blocks back."""
        for block in reversed(table):
            self._num_tables[block] -= 1
            if self._num_tables[block] == 0:
                if block in self._name_of:
                    self._cached[block] = None
                else:
                    self._free.add(block)

    def name(self, block: int, name: bytes) -> None:
        """The block of one table is full. A second block with the same content stays without a name."""
        assert self._num_tables[block] == 1 and block not in self._name_of, f"block {block} is named before it is full"
        if self._block_of.setdefault(name, block) == block:
            self._name_of[block] = name

    def _evict(self, count: int) -> None:
        for _ in range(min(count, len(self._cached))):
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._name_of.pop(block)]
            self._free.add(block)
            self.num_evicted += 1

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that every block is in one state, counted rightly, and that names lead to their blocks and back."""
        counted = Counter(block for table in tables for block in table)
        states = sorted([*self._free.blocks(), *self._cached, *counted])
        assert states == list(range(self.num_blocks)), "a block is lost, or in two states"
        assert len(self._free) == len(self._free.blocks()), "free blocks are miscounted"
        assert [counted[block] for block in range(self.num_blocks)] == self._num_tables, "tables are miscounted"
        assert {name: block for block, name in self._name_of.items()} == self._block_of, "names and blocks differ"
        assert len(self._name_of) == len(self._block_of), "two blocks have one name"
        assert all(block in self._name_of for block in self._cached), "a cached block has no name"
        shared = (block for block, count in counted.items() if count > 1)
        assert all(block in self._name_of for block in shared), "a shared block has no name"
        assert not any(block in self._name_of for block in self._free.blocks()), "a free block has a name"
