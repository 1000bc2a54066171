"""One answer from token events to text, and several of them side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_backend import EOS, ByteDetokenizer, ByteTokenizer, ScriptedBackend, Step, failure, length, scores, stop

from experts.errors import Overloaded, RouterLost
from router.api import answer as answer_module
from router.api.answer import Piece, Transcript, answer
from router.api.errors import INTERNAL_TEXT, ApiError
from router.api.logprobs import Scores
from router.api.running import RunningAnswers
from router.engine.request import FinishEvent, FinishReason, SamplingParams
from router.prompt.stops import StopStrings


class Scene:
    """One answer over a scripted backend."""

    def __init__(
        self, *script: Step, stops: Sequence[str] = (), prefix: str = "", num_logprobs: int | None = None, **rules: Any
    ) -> None:
        self.backend = ScriptedBackend(lambda _: script)
        kept = Scores(ByteTokenizer()) if num_logprobs is not None else None
        self.transcript = Transcript(ByteDetokenizer(), StopStrings(stops), scores=kept, **rules)
        submit = partial(
            self.backend.submit,
            request_id="r",
            prompt_ids=[1],
            sampling=SamplingParams(max_tokens=100, num_logprobs=num_logprobs),
            deadline=0.0,
        )
        self.pieces = answer(submit, self.transcript, deadline=time.monotonic() + 60, prefix=prefix)

    @property
    def closed(self) -> bool:
        return self.backend.submissions[0].closed

    @property
    def num_sent(self) -> int:
        return self.backend.submissions[0].num_sent


async def taken(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    return [piece async for piece in pieces]


def run(scene: Scene) -> tuple[str, str | None, int]:
    """(text, finish, number of tokens) of the whole answer."""
    pieces = asyncio.run(taken(scene.pieces))
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert scene.closed
    return "".join(piece.text for piece in pieces), pieces[-1].finish, pieces[-1].num_tokens


def test_text_comes_token_by_token() -> None:
    pieces = asyncio.run(taken(Scene("abc", stop()).pieces))
    assert [piece.text for piece in pieces] == ["a", "b", "c", ""]
    assert [piece.num_tokens for piece in pieces] == [1, 2, 3, 3]
    assert pieces[-1].finish == "stop"


def test_characters_are_never_split() -> None:
    pieces = asyncio.run(taken(Scene("é€", length()).pieces))
    assert [piece.text for piece in pieces] == ["", "é", "€", ""], "the first token makes a piece without text too"
    assert run(Scene("é".encode()[:1], length())) == ("\ufffd", "length", 1)


def test_end_tokens_have_no_text_and_count() -> None:
    assert run(Scene("ab", EOS, stop(), end_ids=frozenset({EOS}))) == ("ab", "stop", 3)
    assert run(Scene("ab!", stop(), end_ids=frozenset(b"!"))) == ("ab", "stop", 3)
    assert run(Scene("a!b!", length(), end_ids=frozenset(b"!"), min_tokens=3)) == ("a!b", "length", 4)


def test_an_answer_may_be_empty() -> None:
    assert run(Scene(length())) == ("", "length", 0)
    assert run(Scene(length(), prefix="prompt")) == ("prompt", "length", 0)


def test_prefix_is_sent_once_and_meets_no_stop_string() -> None:
    assert run(Scene("ab", stop(), prefix="xx", stops=["x"])) == ("xxab", "stop", 2)


@pytest.mark.parametrize("never", [asyncio.Event, stop])
def test_stop_string_ends_the_backend(never: type[asyncio.Event]) -> None:
    scene = Scene("one END two", never(), stops=["END"])
    assert run(scene) == ("one ", "stop", 7)
    assert scene.num_sent == 7


def test_backend_is_closed_before_the_last_text_is_handed_over() -> None:
    async def scenario() -> None:
        scene = Scene("ab.c", asyncio.Event(), stops=["."])
        async with aclosing(scene.pieces) as pieces:
            async for piece in pieces:
                assert scene.closed == (piece.finish is not None)

    asyncio.run(scenario())


def test_stop_string_may_be_kept() -> None:
    assert run(Scene("one END two", stops=["END"], keep_stop=True)) == ("one END", "stop", 7)


def test_held_back_text_is_sent_at_the_end() -> None:
    assert run(Scene("one EN", length(), stops=["END"])) == ("one EN", "length", 6)


def test_stop_strings_count_after_min_tokens() -> None:
    assert run(Scene("a.b.c.", length(), stops=["."], min_tokens=2)) == ("a.b", "stop", 4)
    assert run(Scene("abEND", length(), stops=["END"], min_tokens=3)) == ("abEND", "length", 5)


def test_stop_string_in_the_last_flush() -> None:
    scene = Scene("a", b"\xc3", length(), stops=["\ufffd"])
    assert run(scene) == ("a", "stop", 2)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="abé", max_size=30),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
)
def test_stop_strings_cut_as_if_the_text_were_known(text: str, stops: list[str], keep: bool) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, start = min(ends, default=(len(text), len(text)))
    sent, finish, num_tokens = run(Scene(text, length(), stops=stops, keep_stop=keep))
    assert sent == text[: end if keep else start]
    assert finish == ("stop" if ends else "length")
    assert num_tokens == len(text[:end].encode())


# Scored tokens


def scored(*script: Step, num_logprobs: int | None = 0, **fields: Any) -> list[tuple[str, bytes]]:
    """(text, bytes of the tokens that came with it) of each piece."""
    pieces = asyncio.run(taken(Scene(*script, num_logprobs=num_logprobs, **fields).pieces))
    return [(piece.text, b"".join(token.chosen.raw or b"?" for token in piece.tokens)) for piece in pieces]


def test_tokens_come_with_the_first_character_of_their_text() -> None:
    assert scored("ab", stop()) == [("a", b"a"), ("b", b"b"), ("", b"")]
    assert scored("ab", stop(), num_logprobs=None) == [("a", b""), ("b", b""), ("", b"")]
    assert scored("aé", stop()) == [("a", b"a"), ("é", "é".encode()), ("", b"")]
    assert scored("é", stop()) == [("", b""), ("é", "é".encode()), ("", b"")]


def test_tokens_held_back_for_a_stop_string_come_when_their_text_does() -> None:
    assert scored("aENx", stop(), stops=["END"]) == [("a", b"a"), ("ENx", b"ENx"), ("", b"")]
    assert scored("aEN", length(), stops=["END"]) == [("a", b"a"), ("EN", b"EN")]


def test_tokens_that_a_stop_string_cuts_off_are_left_out() -> None:
    assert scored("aENDb", stop(), stops=["END"]) == [("a", b"a"), ("", b"")]
    assert scored("aENDb", stop(), stops=["END"], keep_stop=True) == [("a", b"a"), ("END", b"END")]
    assert scored("abEND", stop(), stops=["END"], min_tokens=5) == [*((c, c.encode()) for c in "abEND"), ("", b"")]


def test_a_character_that_never_ends_comes_at_the_end() -> None:
    assert scored("a", b"\xe2\x82", length()) == [("a", b"a"), ("\ufffd", b"\xe2\x82")]
    assert scored("a", b"\xe2\x82", length(), stops=["\ufffd"]) == [("a", b"a"), ("", b"")]


def test_special_tokens_of_an_answer_come_with_it_and_one_that_ends_it_does_not() -> None:
    assert scored("a", EOS, "b", stop()) == [("a", b"a"), ("b", b"?b"), ("", b"")]
    assert scored("a", EOS, EOS, length()) == [("a", b"a"), ("", b"??")]
    assert scored("a", EOS, stop(), end_ids=frozenset({EOS})) == [("a", b"a"), ("", b"")]


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="abé", max_size=30),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
    num_logprobs=st.integers(0, 3),
)
def test_scored_tokens_spell_the_text(text: str, stops: list[str], keep: bool, num_logprobs: int) -> None:
    pieces = asyncio.run(taken(Scene(text, length(), stops=stops, keep_stop=keep, num_logprobs=num_logprobs).pieces))
    sent = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert b"".join(token.chosen.raw or b"" for token in tokens).decode() == sent
    for token in tokens:
        assert token.chosen.raw is not None
        expected = scores(token.chosen.raw[0], num_logprobs)
        assert expected is not None and len(token.top) == num_logprobs
        assert (token.chosen.logprob, [one.logprob for one in token.top]) == (
            expected.logprob,
            [logprob for _, logprob in expected.top],
        )
        assert sent.encode()[len(sent[: token.offset].encode()) :][:3].find(token.chosen.raw) in (0, 1)
    seen = ""
    for piece in pieces:
        seen += piece.text
        assert all(token.offset < len(seen) for token in piece.tokens), "before its text"


def test_errors_of_the_backend_pass_through() -> None:
    with pytest.raises(Overloaded):
        run(Scene(Overloaded("full", 3.0)))
    with pytest.raises(RouterLost):
        run(Scene("ab"))


@pytest.mark.parametrize(
    ("event", "status", "code", "message"),
    [
        (failure("expert_unavailable", "no host served expert 1 of layer 2 in time"), 503, "expert_unavailable", "no"),
        (failure("router_unavailable"), 503, "server_unavailable", "the server lost"),
        (failure("deadline_exceeded"), 504, "deadline_exceeded", "the request was not"),
        (failure("invalid_input", "prompt: is bad"), 400, None, "prompt: is bad"),
        (failure("internal_error"), 500, "internal_error", INTERNAL_TEXT),
        (failure("of the future"), 500, "internal_error", INTERNAL_TEXT),
        (FinishEvent(request_id="", reason=FinishReason.CANCELLED), 503, "server_unavailable", "the server lost"),
    ],
)
def test_failed_requests(event: FinishEvent, status: int, code: str | None, message: str) -> None:
    scene = Scene("ab", event)
    with pytest.raises(ApiError) as caught:
        run(scene)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.message.startswith(message)
    assert scene.closed


def test_silence_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "GRACE_S", -120.0)
    scene = Scene(asyncio.Event())
    with pytest.raises(ApiError) as caught:
        run(scene)
    assert caught.value.code == "deadline_exceeded"
    assert scene.closed


def test_closing_an_answer_closes_the_backend() -> None:
    async def scenario() -> None:
        scene = Scene("abc", stop())
        assert (await anext(scene.pieces)).text == "a"
        assert not scene.closed
        await scene.pieces.aclose()
        assert scene.closed

    asyncio.run(scenario())


# Several answers


async def drained(running: RunningAnswers) -> list[tuple[int, Piece]]:
    items: list[tuple[int, Piece]] = []
    while running.num_open:
        items += await running.pieces(60.0)
    return items


def test_answers_run_side_by_side() -> None:
    async def scenario() -> None:
        first_may_go = asyncio.Event()
        scenes = [Scene(first_may_go, "a", stop()), Scene("b", stop())]
        async with RunningAnswers([scene.pieces for scene in scenes]) as running:
            items = await running.pieces(60.0)
            assert {index for index, _ in items} == {1}
            first_may_go.set()
            items += await drained(running)
        texts = ["".join(piece.text for index, piece in items if index == wanted) for wanted in (0, 1)]
        assert texts == ["a", "b"]

    asyncio.run(scenario())


def test_nothing_came_in_time() -> None:
    async def scenario() -> None:
        go = asyncio.Event()
        async with RunningAnswers([Scene(go, "a", stop()).pieces]) as running:
            assert await running.pieces(0.0) == []
            go.set()
            assert "".join(piece.text for _, piece in await drained(running)) == "a"

    asyncio.run(scenario())


def test_an_error_comes_after_the_pieces_before_it_and_ends_the_others() -> None:
    async def scenario() -> None:
        other = Scene("x", asyncio.Event())
        failing = Scene("ab", RouterLost("gone"))
        items: list[tuple[int, Piece]] = []
        with pytest.raises(RouterLost):
            async with RunningAnswers([other.pieces, failing.pieces]) as running:
                while True:
                    items += await running.pieces(60.0)
        assert "".join(piece.text for index, piece in items if index == 1) == "ab"
        assert other.closed and failing.closed

    asyncio.run(scenario())


def test_leaving_early_ends_all_answers() -> None:
    async def scenario() -> None:
        scenes = [Scene("x", asyncio.Event()), Scene(asyncio.Event()), Scene("y" * 10_000, stop())]
        async with RunningAnswers([scene.pieces for scene in scenes]) as running:
            seen: set[int] = set()
            while seen < {0, 2}:
                seen |= {index for index, _ in await running.pieces(60.0)}
        assert all(scene.closed for scene in scenes)
        assert scenes[2].num_sent < 10_000, "a reader that is slow makes the answers wait"

    asyncio.run(scenario())
