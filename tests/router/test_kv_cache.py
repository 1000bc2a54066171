"""Block accounting: what a sequence holds at every position, what is refused, and how memory is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import InvalidInput
from router.engine import block_names
from router.engine.images import ImageInput, PlacedImage
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


# Prefixes


def start(cache: KVCache, request: Request) -> int:
    """Admit a request; how many of its tokens were there."""
    prefix = cache.find_prefix(request)
    cost = cache.cost_of_admission(request, prefix)
    assert cache.num_free.covers(cost)
    free = cache.num_free
    cache.take_prefix(request, prefix)
    still = cache.still_needed(request)
    # What is taken and what is still to come is what was said to be the cost: nothing counts twice.
    assert cost == BlockCount(
        free.num_global - cache.num_free.num_global + still.num_global,
        free.num_local - cache.num_free.num_local + still.num_local,
    )
    return prefix.num_tokens


def compute_all(cache: KVCache, request: Request, up_to: int | None = None) -> None:
    end = request.num_known if up_to is None else up_to
    while request.num_computed < end:
        count = cache.layout.clip_to_chunk(request.num_computed, end - request.num_computed)
        cache.extend(request, count)
        cache.commit(request, count)


def asking(token_ids: list[int], name: str = "a", **changes: object) -> Request:
    request = make_request(1, name)
    request.token_ids, request.num_prompt = list(token_ids), len(token_ids)
    for field, value in changes.items():
        setattr(request, field, value)
    return request


def test_a_prefix_is_found_while_it_is_used_and_afterwards() -> None:
    cache = KVCache(make_layout(num_global_blocks=20, num_local_blocks=10))
    first = asking(list(range(15)), "first")
    compute_all(cache, first)
    second = asking([*range(14), 99, 99], "second")
    assert start(cache, second) == 12
    assert second.global_blocks == first.global_blocks[:3] and second.local_blocks == first.local_blocks[:1]
    compute_all(cache, second)
    cache.check_integrity([first, second])
    assert second.global_blocks[3] != first.global_blocks[3]
    cache.free(first)
    cache.free(second)
    assert cache.num_free == BlockCount(20, 10)
    third = asking([*range(14), 99, 99], "third")
    assert start(cache, third) == 12  # of sixteen known tokens one must be left, and blocks are of four
    assert cache.numbers().hit_tokens == 24


def test_a_hit_at_a_border_needs_no_local_block() -> None:
    cache = KVCache(make_layout(num_global_blocks=20, num_local_blocks=2))
    first = asking(list(range(15)), "first")
    compute_all(cache, first)
    cache.free(first)
    stranger = asking([50] * 7, "stranger")
    compute_all(cache, stranger)  # takes the local blocks, all there are
    assert cache.numbers().cached == 3 / 22  # global ones
    again = asking(list(range(15)), "again")
    prefix = cache.find_prefix(again)
    assert (prefix.num_tokens, prefix.local_blocks) == (8, [])
    assert prefix.global_blocks == [0, 1]
    cache.check_integrity([stranger])


def test_global_blocks_without_the_local_ones_of_their_chunk_are_no_use() -> None:
    layout = make_layout(num_global_blocks=20, num_local_blocks=2, chunk_size=None)
    cache = KVCache(layout)
    compute_all(cache, first := asking(list(range(8)), "first"))
    cache.free(first)
    compute_all(cache, stranger := asking([50] * 8, "stranger"))
    assert cache.find_prefix(asking(list(range(8)))).num_tokens == 0
    cache.check_integrity([stranger])


@given(
    block_size=st.integers(1, 8),
    chunk_size=st.none() | st.integers(1, 20),
    kinds=st.sampled_from([(True, True), (True, False), (False, True)]),
    num_computed=st.integers(0, 50),
    num_common=st.integers(0, 50),
    num_known=st.integers(1, 60),
    gone=st.booleans(),
)
def test_the_longest_prefix_that_fits_both_kinds_is_found(
    block_size: int,
    chunk_size: int | None,
    kinds: tuple[bool, bool],
    num_computed: int,
    num_common: int,
    num_known: int,
    gone: bool,
) -> None:
    layout = make_layout(
        block_size=block_size,
        chunk_size=chunk_size,
        has_global=kinds[0],
        has_local=kinds[1],
        num_global_blocks=200 * kinds[0],
        num_local_blocks=200 * kinds[1],
    )
    cache = KVCache(layout)
    first = asking(list(range(50)), "first")
    compute_all(cache, first, num_computed)
    if gone:
        cache.free(first)
    second = asking(([*range(num_common)] + [99] * 60)[:num_known], "second")

    def fits(length: int) -> bool:
        chunk_start = layout.chunk_start(length)
        return length % block_size == 0 and chunk_start % block_size == 0 and (kinds[0] or length > chunk_start)

    reach = min(num_computed, num_common, num_known - 1)
    assert start(cache, second) == max((length for length in range(1, reach + 1) if fits(length)), default=0)
    compute_all(cache, second)
    cache.check_integrity([first, second])


def picture(digest: bytes, *positions: int) -> tuple[PlacedImage, ...]:
    return (PlacedImage(image=ImageInput(digest=digest, num_tiles=1, pixels=b""), positions=positions),)


@pytest.mark.parametrize(
    ("changes", "num_found"),
    [
        ({}, 12),
        ({"cache_salt": "b"}, 0),
        ({"adapter_salt": "c"}, 0),
        ({"cache_salt": "ab", "adapter_salt": ""}, 0),
        ({"cache_salt": "\ud800"}, 0),
        ({"images": picture(b"cat", 5, 6, 7, 9)}, 12),
        ({"images": picture(b"dog", 5, 6, 7, 9)}, 4),
        ({"images": picture(b"cat", 5, 6, 9, 10)}, 4),
        ({"images": picture(b"cat", 4, 5, 6, 7, 9)}, 4),
        ({"images": picture(b"cat", 5, 6, 7, 10)}, 8),
        ({"images": picture(b"cat", 6, 7, 9, 10)}, 4),
        ({"images": ()}, 4),
        ({"block_names": [], "num_prompt": 3}, 12),
    ],
)
def test_only_what_is_the_same_in_everything_is_shared(changes: dict[str, object], num_found: int) -> None:
    cache = KVCache(make_layout(num_global_blocks=20, num_local_blocks=10, chunk_size=None))
    ids, images = [1] * 15, picture(b"cat", 5, 6, 7, 9)
    compute_all(cache, asking(ids, "first", cache_salt="a", adapter_salt="b", images=images))
    same = {"cache_salt": "a", "adapter_salt": "b", "images": images}
    assert start(cache, asking(ids, "second", **(same | changes))) == num_found


def test_switched_off_nothing_is_kept() -> None:
    cache = KVCache(make_layout(num_global_blocks=20), prefix_cache=False)
    compute_all(cache, first := asking(list(range(15)), "first"))
    assert cache.find_prefix(asking(list(range(15)), "second")).num_tokens == 0
    cache.free(first)
    assert cache.numbers().cached == 0 and first.block_names == []


def test_equal_requests_at_the_same_time_have_blocks_of_their_own() -> None:
    cache = KVCache(make_layout(num_global_blocks=20, num_local_blocks=8))
    twins = [asking(list(range(7)), name) for name in "ab"]
    for twin in twins:
        compute_all(cache, twin)
        cache.check_integrity(twins[: 1 + twins.index(twin)])
    assert not set(twins[0].global_blocks) & set(twins[1].global_blocks)
    cache.free(twins[1])
    assert start(cache, third := asking(list(range(7)), "c")) == 4
    assert third.global_blocks == twins[0].global_blocks[:1]


def test_admission_counts_local_blocks_that_stay_with_others_at_the_border() -> None:
    cache = KVCache(make_layout(num_global_blocks=20, num_local_blocks=6))
    compute_all(cache, first := asking(list(range(7)), "first"))
    second = asking([*range(4), *range(50, 60)], "second")
    prefix = cache.find_prefix(second)
    assert prefix.num_tokens == 4
    # One more for this chunk. At the border that one is free again, but not the shared one, and two are needed then.
    assert cache.cost_of_admission(second, prefix) == BlockCount(3, 2)
    before = cache.num_free
    cache.take_prefix(second, prefix)
    assert cache.still_needed(second) == BlockCount(3, 2)
    compute_all(cache, second)
    assert before.minus(cache.num_free) == BlockCount(3, 2)
    cache.check_integrity([first, second])


def test_every_block_is_named_once_however_often_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = block_names.next_name

    def counting(parent: bytes, request: Request, start: int, block_size: int) -> bytes:
        made.append(start)
        return real(parent, request, start, block_size)

    monkeypatch.setattr(block_names, "next_name", counting)
    layout = make_layout(block_size=64, chunk_size=8192, num_global_blocks=100_000, num_local_blocks=1000)
    cache = KVCache(layout)
    request = asking(list(range(100_000)))
    for num_found in (0, 99_968, 99_968):
        assert start(cache, request) == num_found
        while request.num_computed < request.num_known:
            count = layout.clip_to_chunk(request.num_computed, min(1000, request.num_known - request.num_computed))
            cache.extend(request, count)
            cache.commit(request, count)
        cache.free(request)
    assert made == list(range(0, 99_968, 64))


def test_a_long_table_is_one_run_of_blocks() -> None:
    cache = KVCache(make_layout(num_global_blocks=1000, num_local_blocks=40))
    requests = [asking(list(range(400)), name, cache_salt=name) for name in "abcd"]
    for _ in range(50):
        for request in requests:
            compute_all(cache, request, request.num_computed + 8)
    for request in requests:
        assert request.global_blocks == list(range(request.global_blocks[0], request.global_blocks[0] + 100))


def test_numbers() -> None:
    cache = KVCache(make_layout(num_global_blocks=12, num_local_blocks=4))
    compute_all(cache, first := asking(list(range(9)), "first"))
    assert start(cache, asking(list(range(9)), "second")) == 8
    numbers = cache.numbers()
    assert (numbers.used, numbers.cached) == (4 / 16, 2 / 16)  # 3 global, 1 local; the local ones before the border
    assert (numbers.looked_up_tokens, numbers.hit_tokens, numbers.evicted_blocks) == (9, 8, 0)
    assert (numbers.global_tokens, numbers.local_tokens, numbers.tokens) == (48, 16, 48)
    cache.free(first)


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
