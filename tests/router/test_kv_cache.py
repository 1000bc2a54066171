"""Block accounting: what a sequence holds at every position, what is refused, and how memory is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import InvalidInput
from router.engine.kv_cache import KVCache
from router.engine.kv_layout import BlockCount, KVLayout, plan_layout
from router.engine.request import Request, SamplingParams


def make_layout(**changes: object) -> KVLayout:
    sizes: dict[str, object] = {
        "block_size": 4,
        "num_global_blocks": 8,
        "num_local_blocks": 4,
        "chunk_size": 8,
        "has_global": True,
        "has_local": True,
    }
    return KVLayout(**(sizes | changes))  # type: ignore[arg-type]


def make_request(num_tokens: int, name: str = "a") -> Request:
    return Request(
        request_id=name,
        token_ids=[1] * num_tokens,
        num_prompt=num_tokens,
        sampling=SamplingParams(max_tokens=1),
        deadline=1e9,
        arrival=0.0,
    )


def compute(cache: KVCache, request: Request, count: int) -> None:
    cache.extend(request, count)
    cache.check_integrity([request])
    cache.commit(request, count)
    cache.check_integrity([request])


def held(request: Request) -> tuple[int, int]:
    return len(request.global_blocks), len(request.local_blocks)


def test_global_blocks_stay_and_local_blocks_go_at_the_border() -> None:
    cache = KVCache(make_layout())
    request = make_request(20)
    seen = []
    for count in [3, 2, 3, 1, 7, 4]:  # borders at 8 and 16
        cache.extend(request, count)
        while_computing = held(request)
        cache.commit(request, count)
        seen.append((request.num_computed, while_computing, held(request)))
        cache.check_integrity([request])
    assert seen == [
        (3, (1, 1), (1, 1)),
        (5, (2, 2), (2, 2)),
        (8, (2, 2), (2, 0)),
        (9, (3, 1), (3, 1)),
        (16, (4, 2), (4, 0)),
        (20, (5, 1), (5, 1)),
    ]
    cache.free(request)
    assert cache.num_free == BlockCount(8, 4)
    assert request.num_computed == 0
    cache.check_integrity([request])


@pytest.mark.parametrize(
    ("chunk_size", "block_size", "most_local"),
    [(7, 4, 2), (3, 8, 1), (1, 1, 1), (5, 1, 5), (8, 8, 1), (9, 4, 3)],
)
def test_chunks_need_not_fit_blocks(chunk_size: int, block_size: int, most_local: int) -> None:
    layout = make_layout(
        chunk_size=chunk_size, block_size=block_size, num_global_blocks=40, num_local_blocks=most_local
    )
    cache = KVCache(layout)
    request = make_request(40)
    most = 0
    while request.num_computed < 40:
        position = request.num_computed
        cache.extend(request, 1)
        assert len(request.global_blocks) == position // block_size + 1
        assert len(request.local_blocks) == position % chunk_size // block_size + 1
        most = max(most, len(request.local_blocks))
        cache.commit(request, 1)
        cache.check_integrity([request])
    assert most == most_local == layout.peak_blocks(40).num_local


@given(
    block_size=st.integers(1, 8),
    chunk_size=st.none() | st.integers(1, 20),
    num_computed=st.integers(0, 60),
    num_tokens=st.integers(0, 60),
)
def test_peak_is_the_most_that_is_held_on_the_way(
    block_size: int, chunk_size: int | None, num_computed: int, num_tokens: int
) -> None:
    layout = make_layout(block_size=block_size, chunk_size=chunk_size)
    num_computed = min(num_computed, num_tokens)
    way = [layout.blocks_needed(position, 1) for position in range(num_computed, num_tokens)]
    way.append(layout.blocks_needed(num_computed, 0))
    assert layout.peak_blocks(num_tokens, num_computed) == BlockCount(
        max(count.num_global for count in way), max(count.num_local for count in way)
    )


@pytest.mark.parametrize(
    ("changes", "tables"),
    [
        ({"chunk_size": None}, (3, 3)),
        ({"has_local": False, "num_local_blocks": 0}, (3, 0)),
        ({"has_global": False, "num_global_blocks": 0}, (0, 1)),
        ({"has_global": False, "num_global_blocks": 0, "chunk_size": None}, (0, 3)),
    ],
)
def test_a_missing_kind_costs_nothing(changes: dict[str, object], tables: tuple[int, int]) -> None:
    cache = KVCache(make_layout(**changes))
    request = make_request(12)
    while request.num_computed < 10:
        compute(cache, request, cache.layout.clip_to_chunk(request.num_computed, 10 - request.num_computed))
    assert held(request) == tables


def test_extending_is_all_or_nothing() -> None:
    cache = KVCache(make_layout(num_global_blocks=3, num_local_blocks=2))
    first, second = make_request(8, "a"), make_request(8, "b")
    compute(cache, first, 4)
    assert cache.can_extend(second, 4)
    assert not cache.can_extend(second, 8)  # two global blocks are free, one local
    with pytest.raises(AssertionError, match="can_extend"):
        cache.extend(second, 8)
    assert held(second) == (0, 0)
    cache.extend(second, 4)
    assert cache.num_free == BlockCount(1, 0)
    cache.free(first)
    assert cache.can_extend(second, 4)


def test_what_was_extended_and_lost_is_used_by_the_next_try() -> None:
    cache = KVCache(make_layout())
    request = make_request(8)
    cache.extend(request, 8)  # and never committed
    assert cache.can_extend(request, 8) and held(request) == (2, 2)
    compute(cache, request, 5)
    assert held(request) == (2, 2)
    compute(cache, request, 3)
    assert held(request) == (2, 0)


def test_misuse_is_caught() -> None:
    cache = KVCache(make_layout())
    request = make_request(20)
    with pytest.raises(AssertionError, match="extend comes first"):
        cache.commit(request, 4)
    with pytest.raises(AssertionError, match="border"):
        cache.extend(request, 9)
    with pytest.raises(AssertionError, match="border"):
        cache.extend(request, 0)


def test_integrity_check_finds_lost_doubled_and_missing_blocks() -> None:
    cache = KVCache(make_layout())
    request, other = make_request(20, "a"), make_request(20, "b")
    compute(cache, request, 8)
    with pytest.raises(AssertionError):
        cache.check_integrity([])  # the owner is unknown: lost
    other.global_blocks = list(request.global_blocks)
    with pytest.raises(AssertionError):
        cache.check_integrity([request, other])
    other.global_blocks = []
    other.local_blocks = [*cache._local.take(1, [], 1)]
    other.num_computed = 1
    with pytest.raises(AssertionError, match="too few"):
        cache.check_integrity([request, other])
    other.num_computed, other.token_ids = 0, []
    with pytest.raises(AssertionError, match="too many"):
        cache.check_integrity([request, other])


layouts = st.builds(
    lambda kinds, block_size, chunk_size, num_global, num_local: KVLayout(
        block_size=block_size,
        num_global_blocks=num_global if kinds[0] else 0,
        num_local_blocks=num_local if kinds[1] else 0,
        chunk_size=chunk_size,
        has_global=kinds[0],
        has_local=kinds[1],
    ),
    kinds=st.sampled_from([(True, True), (True, False), (False, True)]),
    block_size=st.integers(1, 8),
    chunk_size=st.none() | st.integers(1, 20),
    num_global=st.integers(0, 8),
    num_local=st.integers(0, 8),
)


@given(layouts, st.integers(0, 60))
def test_capacity_is_what_a_single_sequence_reaches(layout: KVLayout, limit: int) -> None:
    cache = KVCache(layout)
    request = make_request(limit)
    while request.num_computed < limit and cache.can_extend(request, 1):
        compute(cache, request, 1)
    assert layout.capacity_tokens(limit) == request.num_computed


@given(
    kv_bytes=st.integers(0, 3000),
    prices=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block_size=st.integers(1, 8),
    chunk_size=st.none() | st.integers(1, 40),
    kinds=st.sampled_from([(True, True), (True, False), (False, True)]),
    max_running=st.integers(1, 9),
    min_tokens=st.integers(1, 100),
)
def test_planned_pools_keep_their_promises(
    kv_bytes: int,
    prices: tuple[int, int],
    block_size: int,
    chunk_size: int | None,
    kinds: tuple[bool, bool],
    max_running: int,
    min_tokens: int,
) -> None:
    global_price, local_price = prices[0] * kinds[0], prices[1] * kinds[1]
    one = make_layout(
        block_size=block_size,
        chunk_size=chunk_size,
        has_global=kinds[0],
        has_local=kinds[1],
        num_global_blocks=0,
        num_local_blocks=0,
    ).peak_blocks(min_tokens)
    fits = one.num_global * global_price + one.num_local * local_price <= kv_bytes
    try:
        layout = plan_layout(
            kv_bytes=kv_bytes,
            bytes_per_global_block=prices[0],
            bytes_per_local_block=prices[1],
            block_size=block_size,
            chunk_size=chunk_size,
            has_global=kinds[0],
            has_local=kinds[1],
            max_running=max_running,
            min_tokens=min_tokens,
        )
    except InvalidInput as refusal:
        assert refusal.field == "kv_memory" and not fits
        return
    assert fits
    spent = layout.num_global_blocks * global_price + layout.num_local_blocks * local_price
    assert spent <= kv_bytes
    assert layout.capacity_tokens(min_tokens) == min_tokens
    if layout.border:
        assert layout.num_local_blocks <= max_running * -(-layout.border // block_size)
    if kinds[0]:
        assert kv_bytes - spent < global_price  # nothing that a block could use is left over


def plan(kv_bytes: int, max_running: int = 4, min_tokens: int = 1) -> BlockCount:
    layout = plan_layout(
        kv_bytes=kv_bytes,
        bytes_per_global_block=1,
        bytes_per_local_block=3,
        block_size=16,
        chunk_size=128,
        has_global=True,
        has_local=True,
        max_running=max_running,
        min_tokens=min_tokens,
    )
    return BlockCount(layout.num_global_blocks, layout.num_local_blocks)


def test_planning_by_example() -> None:
    assert plan(40) == (10, 10)  # short of one chunk each: the same number of both
    assert plan(128) == (32, 32)  # four sequences of a chunk
    assert plan(1096) == (1000, 32)  # beyond that, everything goes into length
    assert plan(1096, max_running=1) == (1072, 8)
    assert plan(40, min_tokens=16 * 16) == (16, 8)  # 256 tokens need 16 and 8
    with pytest.raises(InvalidInput, match="kv_memory: must be at least 4 bytes"):
        plan(3)
