"""Bodies in flight: their shared room, what is free, and what reading one takes besides; no server."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable

import pytest

from experts.errors import Overloaded
from router.api.body import parse_object
from router.api.body_budget import FREE_BYTES, BodyBudget
from router.api.data_url import decode_data_url

MIB = 1 << 20


def test_room_is_shared_and_given_back() -> None:
    budget = BodyBudget(100)
    first, second, third = budget.hold(), budget.hold(), budget.hold()
    first.grow_to(FREE_BYTES + 40)
    first.grow_to(FREE_BYTES + 60)
    second.grow_to(FREE_BYTES + 40)
    with pytest.raises(Overloaded) as caught:
        third.grow_to(FREE_BYTES + 1)
    assert caught.value.retry_after_s > 0
    second.release()
    second.release()
    third.grow_to(FREE_BYTES + 40)
    assert budget.num_bytes == 100
    first.release()
    third.release()
    assert budget.num_bytes == 0


def test_what_finds_no_room_keeps_what_it_has() -> None:
    budget = BodyBudget(100)
    held, other = budget.hold(), budget.hold()
    held.grow_to(FREE_BYTES + 60)
    other.grow_to(FREE_BYTES + 30)
    with pytest.raises(Overloaded):
        held.grow_to(FREE_BYTES + 80)
    assert budget.num_bytes == 90
    held.grow_to(FREE_BYTES + 70)


def test_small_bodies_are_free_and_announcing_takes_nothing() -> None:
    budget = BodyBudget(100)
    for _ in range(50):
        budget.hold().expect(FREE_BYTES + 100)
        budget.hold().grow_to(FREE_BYTES)
    assert budget.num_bytes == 0
    budget.hold().grow_to(FREE_BYTES + 100)
    budget.hold().grow_to(FREE_BYTES)
    with pytest.raises(Overloaded):
        budget.hold().expect(FREE_BYTES + 1)


def peak_bytes(work: Callable[[], object]) -> int:
    """What `work` took at most beside what was there before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_parsing_makes_the_text_and_the_values_of_a_body_and_no_more() -> None:
    document = {"a": "A" * (16 * MIB), "b": ["\\" * 1000, '"' * 1000, "\N{GRINNING FACE}"]}
    body = bytearray(json.dumps(document).encode())
    assert peak_bytes(lambda: parse_object(body)) < 36 * MIB
    assert not body


def test_a_bytearray_is_emptied_before_its_values_are_made() -> None:
    content = json.dumps({"a": "A" * (16 * MIB)}).encode()
    # The body itself is counted here.
    assert peak_bytes(lambda: parse_object(bytearray(content))) < 36 * MIB


def test_decoding_base64_makes_the_file_and_no_more() -> None:
    url = "data:image/png;base64," + "A" * (16 * MIB)
    assert peak_bytes(lambda: decode_data_url(url)) < 18 * MIB
