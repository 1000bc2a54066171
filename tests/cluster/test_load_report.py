"""What is measured of an answer, and what many of them add up to."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from cluster.cpu_account import CpuUse
from cluster.load.client import Answered, Failed
from cluster.load.drive import Collected
from cluster.load.report import distribution, percentile, summarize, timing_of
from cluster.load.settings import LoadSettings
from cluster.load.stream import MAX_LINE_BYTES, AnswerStream, RequestFailed
from cluster.load.table import as_text


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str | None) -> bytes:
    return event(choices=[{"index": 0, "text": piece}])


def delta(**fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields}])


DONE = b"data: [DONE]\n\n"


def read(*arrivals: tuple[float, bytes]) -> AnswerStream:
    stream = AnswerStream()
    for now, data in arrivals:
        stream.feed(data, now)
    stream.end()
    return stream


def test_each_piece_of_text_has_its_instant_and_usage_counts_the_tokens() -> None:
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12})
    stream = read((1.0, text("a")), (2.0, text("b c")), (2.5, text("") + usage + DONE))
    assert (stream.times, stream.prompt_tokens, stream.output_tokens) == ([1.0, 2.0], 7, 5)


def test_a_role_is_no_text_but_reasoning_and_tools_are() -> None:
    stream = read(
        (1.0, delta(role="assistant", content="") + delta(content=None)),
        (2.0, delta(reasoning_content="hm")),
        (3.0, delta(tool_calls=[{"index": 0}])),
        (4.0, delta(content="x") + event(choices=[{"delta": {}, "finish_reason": "stop"}]) + DONE),
    )
    assert stream.times == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_matter_how_the_bytes_are_cut(seed: int) -> None:
    usage = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 3})
    data = (
        b": keep-alive\n\n" + text("ä") + b"event: x\n" + text("b").replace(b"\n", b"\r\n") + text("c") + usage + DONE
    )
    generator = random.Random(seed)
    cuts = sorted(generator.sample(range(len(data)), 20))
    pieces = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    stream = read(*((float(now), piece) for now, piece in enumerate(pieces)))
    assert (len(stream.times), stream.output_tokens) == (3, 3)
    assert stream.times == sorted(stream.times)


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (text("a"), "cut_off", "after 1 chunks"),
        (b"", "cut_off", "after 0 chunks"),
        (DONE, "empty", "without any text"),
        (text("a") + event(error={"message": "no expert", "code": "x"}), "stream_error", "no expert"),
        (event(error="plain"), "stream_error", "plain"),
        (b"data: {\n", "bad_event", "not a JSON object: {"),
        (b"data: [1]\n", "bad_event", "not a JSON object"),
        (b"data: " + b"[" * 100_000 + b"\n", "bad_event", "not a JSON object"),
        (b"x" * (MAX_LINE_BYTES + 1), "bad_event", "a line has more than"),
    ],
)
def test_what_is_wrong_with_a_stream_has_a_kind(data: bytes, kind: str, words: str) -> None:
    with pytest.raises(RequestFailed, match=words) as caught:
        read((1.0, data))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "odd",
    [{"choices": None}, {"choices": [None]}, {"choices": [{"delta": 3}]}, {"usage": {"completion_tokens": True}}, {}]
    + [{"usage": {"completion_tokens": count}} for count in (-1, 1e308, 10**400)],
)
def test_odd_events_say_nothing(odd: dict[str, object]) -> None:
    stream = read((1.0, event(**odd)), (2.0, text("a") + DONE))
    assert (stream.times, stream.output_tokens) == ([2.0], None)


def answer(*times: float, sent: float = 0.0, prompt: int | None = 10, output: int | None = None) -> Answered:
    return Answered(sent=sent, times=times, ended=times[-1] + 0.5, prompt_tokens=prompt, output_tokens=output)


def test_tpot_counts_tokens_and_itl_counts_gaps() -> None:
    timing = timing_of(answer(1.0, 2.0, 5.0, sent=0.25, output=9))
    assert (timing.ttft, timing.tpot, timing.e2el) == (750.0, 500.0, 5250.0)
    assert timing.gaps == (1000.0, 3000.0)


def test_without_usage_pieces_are_tokens() -> None:
    assert timing_of(answer(1.0, 2.0, 5.0)).tpot == 2000.0


def test_a_single_token_has_no_tpot_and_one_without_text_comes_at_the_end() -> None:
    assert timing_of(answer(1.0, output=1)).tpot is None
    silent = Answered(sent=1.0, times=(), ended=3.0, prompt_tokens=1, output_tokens=4)
    assert (timing_of(silent).ttft, timing_of(silent).gaps) == (2000.0, ())


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_percentiles_equal_numpy_s(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count).tolist()
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(sorted(values), share) == pytest.approx(float(np.percentile(values, share * 100)))
    assert distribution(values).mean == pytest.approx(float(np.mean(values)))


def test_nothing_measured_is_not_zero() -> None:
    report = summarize(Collected(duration_s=1.0), {"ttft": 1.0})
    assert (report.ttft_ms.p50, report.completed, report.goodput_per_s) == (None, 0, 0.0)
    assert summarize(Collected(), {}).requests_per_s == 0.0


def test_rates_goodput_and_errors() -> None:
    outcomes = [
        answer(0.1, 0.2, output=11),
        answer(0.3, 0.4, output=11),
        answer(0.1, 5.1, output=11),
        Failed(kind="http_429", message="full"),
        Failed(kind="timeout", message="late"),
        Failed(kind="http_429", message="still full"),
    ]
    collected = Collected(outcomes=[*outcomes], late_s=[0.001], duration_s=2.0, unfinished=1, unsent=2)
    report = summarize(collected, {"ttft": 200.0, "tpot": 100.0})
    assert (report.completed, report.failed, report.unfinished, report.unsent) == (3, 3, 1, 2)
    assert (report.output_tokens, report.prompt_tokens, report.tokens_counted_by) == (33, 30, "usage")
    assert (report.output_tokens_per_s, report.total_tokens_per_s, report.requests_per_s) == (16.5, 31.5, 1.5)
    assert report.goodput_per_s == 0.5
    assert [(error.kind, error.count, error.example) for error in report.errors] == [
        ("http_429", 2, "full"),
        ("timeout", 1, "late"),
    ]
    assert summarize(collected, {}).goodput_per_s is None


def test_where_counts_come_from_is_said() -> None:
    told, untold = answer(1.0, output=1), answer(1.0, 2.0, prompt=None)
    assert summarize(Collected(outcomes=[untold], duration_s=1.0), {}).tokens_counted_by == "chunks"
    both = summarize(Collected(outcomes=[told, untold], duration_s=1.0), {})
    assert (both.tokens_counted_by, both.output_tokens, both.prompt_tokens) == ("both", 3, None)


def test_the_table_holds_what_was_measured() -> None:
    outcomes = [answer(0.1, 0.2, output=11), Failed(kind="connect", message="refused")]
    collected = Collected(outcomes=[*outcomes], duration_s=2.0, unfinished=1)
    settings = LoadSettings(url="http://x", concurrency=3)
    cpu = [CpuUse(part=part, cpu_s=0.011) for part in ("ingress", "router without engine", "other")]
    shown = as_text(settings, summarize(collected, {"ttft": 5.0}), cpu)
    for words in (
        "3 at a time",
        "1 requests completed, 1 failed in 2.00 s",
        "interrupted: 1 requests were under way",
        "1 × connect: refused",
        "10.0 prompt tokens, 11.0 output tokens (counted by usage)",
        "1000 µs per output token",
        "0.02 s, 2000 µs per output token",
        "goodput, requests/s",
    ):
        assert words in shown, words
    assert all(line == line.rstrip() for line in shown.splitlines())
