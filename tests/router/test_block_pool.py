"""Blocks of one pool: who gets which, who shares, what is given up first; beside a model that is all sets."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from router.engine.block_pool import BlockPool
from router.engine.free_extents import FreeExtents


def name(number: int) -> bytes:
    return number.to_bytes(4, "little")


def named_table(pool: BlockPool, names: list[int]) -> list[int]:
    table = pool.take(len(names), [], len(names))
    for block, number in zip(table, names, strict=True):
        pool.name(block, name(number))
    return table


def test_a_table_goes_on_in_the_next_block() -> None:
    pool = BlockPool(100)
    first, second = pool.take(2, [], 2), pool.take(3, [], 3)
    for _ in range(20):
        first += pool.take(1, first, 1)
        second += pool.take(1, second, 1)
    assert first == list(range(22))
    assert second == list(range(second[0], second[0] + 23))


def test_a_new_table_begins_where_all_it_wants_fits() -> None:
    pool = BlockPool(100)
    first = pool.take(1, [], 1)
    long = pool.take(10, [], 80)
    assert long == list(range(20, 30))  # not in the middle, from where 80 would not fit
    long += pool.take(70, long, 70)
    assert long == list(range(20, 100))
    pool.release(long)
    assert pool.take(90, first, 90) == list(range(1, 91))


def test_what_does_not_fit_in_one_run_takes_several() -> None:
    pool = BlockPool(10)
    table = pool.take(10, [], 10)
    pool.release([table[block] for block in (1, 2, 5, 6, 7, 9)])
    assert sorted(pool.take(6, [], 6)) == [1, 2, 5, 6, 7, 9]
    assert pool.num_free == 0


def test_unnamed_blocks_are_free_at_once_and_named_ones_wait_to_be_found() -> None:
    pool = BlockPool(4)
    table = named_table(pool, [1, 2]) + pool.take(1, [], 1)
    pool.release(table)
    assert (pool.num_free, pool.num_cached) == (4, 2)
    block = pool.find(name(2))
    assert block == table[1]
    pool.share(block)
    assert (pool.num_free, pool.num_cached, pool.num_tables(block)) == (3, 1, 1)
    pool.check_integrity([[block]])


def test_free_blocks_go_before_cached_ones_and_those_least_recently_used_first_and_from_their_end() -> None:
    pool = BlockPool(6)
    old = named_table(pool, [1, 2])
    young = named_table(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    found = pool.find(name(2))
    assert found is not None
    pool.share(found)
    pool.release([found])
    table = pool.take(2, [], 2)
    assert pool.num_evicted == 0
    for gone in [1, 4, 3, 2]:
        assert pool.find(name(gone)) is not None
        table += pool.take(1, table, 1)
        assert pool.find(name(gone)) is None
        pool.check_integrity([table])
    assert pool.num_evicted == 4


def test_a_full_pool_hands_out_runs_all_the_same() -> None:
    pool = BlockPool(6400)
    for first in range(0, 6400, 64):
        pool.release(named_table(pool, list(range(first, first + 64))))
    assert pool.num_cached == 6400
    table: list[int] = []
    for _ in range(320):
        table += pool.take(1, table, 1)
    breaks = sum(after != before + 1 for before, after in pairwise(table))
    assert breaks <= 320 // 32


def test_the_second_of_two_equal_blocks_stays_private() -> None:
    pool = BlockPool(4)
    first, second = named_table(pool, [7]), named_table(pool, [7])
    assert pool.find(name(7)) == first[0] and pool.name_of(second[0]) is None
    pool.release(second)
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.check_integrity([first])


def test_misuse_is_caught() -> None:
    pool = BlockPool(4)
    [block] = pool.take(1, [], 1)
    with pytest.raises(AssertionError, match="no content"):
        pool.share(block)
    pool.name(block, name(1))
    with pytest.raises(AssertionError, match="before it is full"):
        pool.name(block, name(2))
    with pytest.raises(AssertionError, match="miscounted"):
        pool.check_integrity([[block], [block]])
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([])


@pytest.mark.parametrize("seed", range(5))
def test_extents_are_a_set(seed: int) -> None:
    print(f"seed {seed}")
    random, extents = Random(seed), FreeExtents(200)
    free, used = set(range(200)), list[int]()
    for _ in range(3000):
        if used and random.random() < 0.5:
            block = used.pop(random.randrange(len(used)))
            extents.add(block)
            free.add(block)
        elif free:
            count = random.randint(1, min(len(free), 9))
            last = random.choice(used) if used and random.random() < 0.7 else None
            blocks = extents.take(count, last, random.randint(count, 40))
            assert len(set(blocks)) == count and free >= set(blocks)
            assert last is None or last + 1 not in free or blocks[0] == last + 1
            free -= set(blocks)
            used += blocks
        assert sorted(extents.blocks()) == sorted(free) and len(extents) == len(free)


def test_extents_join_again_and_forget_what_was() -> None:
    extents = FreeExtents(10_000)
    for _ in range(3):
        blocks = extents.take(10_000, None, 10_000)
        Random(1).shuffle(blocks)
        for block in blocks:
            extents.add(block)
    assert extents.take(10_000, None, 10_000) == list(range(10_000))
    assert len(extents._longest) < 1000
