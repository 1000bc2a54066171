"""Which router prompts prefer: keys of their beginnings, rendezvous, and when load decides instead."""

from __future__ import annotations

import random

import pytest

from experts.errors import Overloaded
from router.affinity import affinity_key, rendezvous
from router.engine.images import ImageInput, ImageRules
from router.engine.request import SamplingParams
from router.resume import Begun, Broken, Candidate, Open, Refused, Resumption, step

RULES = ImageRules(token_id=9, tokens_per_tile=10, tile_size=4)
NAMES = [f"router-{number}" for number in range(5)]


def ids(count: int, seed: int = 1) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(100, 200_000) for _ in range(count)]


def image(mark: int, num_tiles: int = 1) -> ImageInput:
    return ImageInput(digest=bytes([mark]) * 32, num_tiles=num_tiles, pixels=b"")


def key_of(prompt: list[int], images: tuple[ImageInput, ...] = (), salt: str = "") -> bytes:
    return affinity_key(prompt, images, RULES, salt)


def test_prompts_that_begin_alike_have_one_key() -> None:
    head = ids(256)
    assert key_of(head) == key_of(head + ids(7, seed=2)) == key_of(head + ids(3000, seed=3))
    assert key_of(head) != key_of([head[0] + 1, *head[1:]])
    assert key_of(head) != key_of([*head[:-1], head[-1] + 1])


@pytest.mark.parametrize(("length", "counted"), [(64, 64), (127, 64), (128, 128), (255, 192), (256, 256), (999, 256)])
def test_the_beginning_is_a_multiple_of_64_tokens_up_to_256(length: int, counted: int) -> None:
    prompt = ids(length)
    assert key_of(prompt) == key_of(prompt[:counted])
    assert key_of(prompt) != key_of([*prompt[: counted - 1], 1, *prompt[counted:]])


def test_short_prompts_have_no_key() -> None:
    assert key_of(ids(63)) == key_of([]) == b""


def test_ids_outside_of_any_vocabulary_have_a_key_too() -> None:
    assert key_of([10**30] * 64) != key_of([10**30 + 1] * 64)


def test_salts_separate() -> None:
    prompt = ids(64)
    assert len({key_of(prompt, salt=salt) for salt in ("", "a", "b", "ä", "\ud800")}) == 5


def test_images_count_by_their_content_where_they_begin_within() -> None:
    prompt = [9] * 10 + ids(54) + [9] * 10
    a, b, c = image(1), image(2), image(3)
    assert key_of(prompt, (a, c)) == key_of(prompt, (a, b))
    assert key_of(prompt, (a, c)) != key_of(prompt, (b, c))
    straddling = ids(60) + [9] * 20
    assert key_of(straddling, (a,)) != key_of(straddling, (b,))
    big = [9] * 64 + ids(10)
    assert key_of(big, (image(1, 5), image(2, 2), c)) == key_of(big, (image(1, 5), image(2, 2), a))
    assert key_of(big, (image(1, 5), image(2, 2), c)) != key_of(big, (image(1, 5), image(4, 2), c))


def test_without_rules_every_image_counts() -> None:
    prompt = ids(64)
    assert affinity_key(prompt, [image(1)], None, "") != affinity_key(prompt, [image(2)], None, "")


def test_a_router_that_leaves_moves_only_its_own_keys() -> None:
    keys = [key_of(ids(64, seed)) for seed in range(400)]
    before = [rendezvous(key, NAMES) for key in keys]
    assert all(before.count(name) > 40 for name in NAMES), "every router is preferred by its share"
    for gone in NAMES:
        after = [rendezvous(key, [name for name in NAMES if name != gone]) for key in keys]
        assert all(new == old for new, old in zip(after, before, strict=True) if old != gone)
    grown = [rendezvous(key, [*NAMES, "new"]) for key in keys]
    assert all(new in (old, "new") for new, old in zip(grown, before, strict=True))
    assert "new" in grown


def test_the_order_of_routers_does_not_matter() -> None:
    keys = [key_of(ids(64, seed)) for seed in range(20)]
    assert [rendezvous(key, NAMES) for key in keys] == [rendezvous(key, NAMES[::-1]) for key in keys]


def request(affinity: bytes) -> Resumption:
    return Resumption(request_id="r", sampling=SamplingParams(max_tokens=9), deadline=100.0, affinity=affinity)


def chosen(state: Resumption, event: object, **in_flight: int) -> str:
    candidates = [Candidate(name=name, in_flight=count) for name, count in in_flight.items()]
    then = step(state, event, candidates, 0.0).then  # type: ignore[arg-type]
    assert isinstance(then, Open), then
    return then.router


KEY = next(key for seed in range(100) if rendezvous(key := key_of(ids(64, seed)), "abc") == "c")


@pytest.mark.parametrize(
    ("in_flight", "router"),
    [
        ({"a": 0, "b": 0, "c": 0}, "c"),
        ({"a": 0, "b": 1, "c": 4}, "c"),
        ({"a": 0, "b": 1, "c": 5}, "a"),
        ({"a": 41, "b": 40, "c": 50}, "c"),
        ({"a": 41, "b": 40, "c": 51}, "b"),
    ],
)
def test_the_preferred_router_gets_the_request_unless_it_is_much_busier(in_flight: dict[str, int], router: str) -> None:
    assert chosen(request(KEY), Begun(), **in_flight) == router
    least = min(in_flight, key=lambda name: (in_flight[name], name))
    assert chosen(request(b""), Begun(), **in_flight) == least


def test_after_a_failure_or_a_refusal_the_least_busy_router_is_next() -> None:
    state = request(KEY)
    assert chosen(state, Begun(), a=2, b=1, c=3) == "c"
    assert chosen(state, Broken(problem="gone"), a=2, b=1, c=0) == "b"
    state = request(KEY)
    assert chosen(state, Begun(), a=2, b=1, c=3) == "c"
    assert chosen(state, Refused(error=Overloaded("full", 1.0)), a=2, b=1, c=0) == "b"
