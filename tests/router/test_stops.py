"""Stop strings against the slow, obvious version: join everything, look for the first end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import InvalidInput
from router.prompt.stops import StopStrings

# Few letters, so that overlaps and near misses are common.
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
PIECES = st.lists(st.text("abc", max_size=5), max_size=12)


def slow(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def fast(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher, shown = StopStrings(stops), ""
    for piece in pieces:
        safe, matched = matcher.push(piece)
        shown += safe
        if matched is not None:
            return shown, matched
    return shown + matcher.finish(), None


@settings(deadline=None, max_examples=500)
@given(pieces=PIECES, stops=STOPS)
def test_equals_searching_the_joined_text(pieces: list[str], stops: list[str]) -> None:
    assert fast(pieces, stops) == slow("".join(pieces), stops)


@settings(deadline=None, max_examples=300)
@given(pieces=PIECES, stops=STOPS)
def test_holds_back_no_more_than_it_must(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, shown = StopStrings(stops), "", ""
    for piece in pieces:
        seen += piece
        safe, matched = matcher.push(piece)
        shown += safe
        if matched is not None:
            return
        held = seen[len(shown) :]
        # The first character held back is the beginning of a possible stop string, or it would have been shown.
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_holds_back_until_it_is_decided() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("the E") == ("the ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("T") == ("ENT", None)
    assert matcher.push("EN") == ("", None)
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


def test_nothing_comes_out_after_a_match() -> None:
    matcher = StopStrings(["\n\n", "###"])
    assert matcher.push("answer\n") == ("answer", None)
    assert matcher.push("\n###more") == ("", "\n\n")
    assert matcher.push("still more") == ("", "\n\n")
    assert matcher.finish() == ""


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopStrings([])
    assert matcher.push("anything") == ("anything", None)
    assert matcher.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidInput, match="stop: stop strings must not be empty"):
        StopStrings(["a", ""])
