"""What a load is: settings and their rules, arrivals, prompts, pictures."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import statistics
from collections import Counter
from typing import Any

import pytest
from PIL import Image

from cluster.load.arrivals import arrival_times
from cluster.load.pictures import draw_png
from cluster.load.settings import LoadSettings, load_settings, parse_goodput
from cluster.load.workloads import WORDS, Ask, Vocabulary, asks, body, safe_ids
from experts.errors import InvalidInput

URL = "http://127.0.0.1:8000"
VOCABULARY = Vocabulary(ids=range(100, 1100))


def made(count: int = 8, first: int = 0, vocabulary: Vocabulary = VOCABULARY, **given: Any) -> list[Ask]:
    settings = load_settings({"url": URL, **given})
    return asks(settings, vocabulary, first, count, lambda number: b"png %d" % number)


# Settings


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"url": "127.0.0.1:8000"}, "url"),
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://x:99999"}, "url"),
        ({"url": "http://[x"}, "url"),
        ({"url": "http://me:secret@x"}, "url"),
        ({"url": "http://x/v1?a=b"}, "url"),
        ({"workload": "poetry"}, "workload"),
        ({"workload": "images", "completions": True}, "completions"),
        ({"workload": "skewed", "chat": True}, "chat"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 2, "request_rate": 3.0}, "concurrency"),
        ({"request_rate": 0.0}, "request-rate"),
        ({"request_rate": math.nan}, "request-rate"),
        ({"request_rate": 1e300, "burstiness": 1.0}, "request-rate"),
        ({"request_rate": 1e-300}, "request-rate"),
        ({"request_rate": 1.0, "burstiness": math.inf}, "burstiness"),
        ({"request_rate": 1.0, "burstiness": -1.0}, "burstiness"),
        ({"request_rate": 1.0, "burstiness": 1e-300}, "burstiness"),
        ({"burstiness": 2.0}, "burstiness"),
        ({"max_in_flight": 2}, "max-in-flight"),
        ({"zipf": 1e300}, "zipf"),
        ({"timeout_s": math.inf}, "timeout-s"),
        ({"requests": 0}, "requests"),
        ({"prompt": 0}, "prompt"),
        ({"output": -5}, "output"),
        ({"seed": -1}, "seed"),
        ({"timeout_s": 0.0}, "timeout-s"),
        ({"vocab_size": 3}, "vocab-size"),
        ({"image_size": "12"}, "image-size"),
        ({"image_size": "0x5"}, "image-size"),
        ({"api_key": "a\nb"}, "api-key"),
        ({"goodput": "ttft"}, "goodput"),
    ],
)
def test_mistakes_name_their_option(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_settings({"url": URL, **given})
    assert caught.value.field == field


@pytest.mark.parametrize("url", [URL, URL + "/", URL + "/v1", URL + "/v1/"])
def test_the_url_may_be_the_one_that_clients_use(url: str) -> None:
    assert load_settings({"url": url}).base_url == URL


def test_images_are_asked_about_in_chats_and_all_else_in_completions() -> None:
    assert load_settings({"url": URL, "workload": "images"}).path == "/v1/chat/completions"
    assert load_settings({"url": URL}).path == "/v1/completions"
    assert load_settings({"url": URL, "chat": True}).path == "/v1/chat/completions"


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(load_settings({"url": URL, "api_key": "secret"}))


@pytest.mark.parametrize("text", ["ttft:200,tpot:50,e2el:5000", "tpot:50 e2el:5e3 ttft:200.0"])
def test_goodput_bounds(text: str) -> None:
    assert parse_goodput(text) == {"ttft": 200.0, "tpot": 50.0, "e2el": 5000.0}


@pytest.mark.parametrize(
    "text", ["", ",", "ttft:", "ttft:x", "ttft:-1", "ttft:inf", "ttft:nan", "itl:5", "ttft:1,ttft:2"]
)
def test_other_goodput_bounds_are_mistakes(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_goodput(text)


# Arrivals


@pytest.mark.parametrize("rate", [1e-6, 1e6])
@pytest.mark.parametrize("burstiness", [1e-3, 1e3])
def test_gaps_are_finite_wherever_settings_end(rate: float, burstiness: float) -> None:
    assert load_settings({"url": URL, "request_rate": rate, "burstiness": burstiness}).request_rate == rate
    times = arrival_times(1000, rate, burstiness, seed=3)
    assert times == sorted(times) and math.isfinite(times[-1])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_that_was_asked_for(burstiness: float) -> None:
    times = arrival_times(20_001, 50.0, burstiness, seed=3)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0.0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    variation = statistics.stdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_are_the_seed_s() -> None:
    assert arrival_times(50, 5.0, 1.0, seed=1) == arrival_times(50, 5.0, 1.0, seed=1)
    assert arrival_times(50, 5.0, 1.0, seed=1) != arrival_times(50, 5.0, 1.0, seed=2)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf, 0.5, seed=1) == [0.0, 0.0, 0.0]


# Prompts


def test_text_prompts_are_distinct_and_have_the_length_asked_for() -> None:
    prompts = [ask.prompt for ask in made(count=50, prompt=17)]
    assert all(len(prompt) == 17 and set(prompt) <= set(VOCABULARY.ids) for prompt in prompts)  # type: ignore[arg-type]
    assert len({tuple(prompt) for prompt in prompts}) == 50


@pytest.mark.parametrize("workload", ["text", "shared-prefix", "mixed", "skewed"])
def test_request_i_depends_on_the_seed_and_nothing_else(workload: str) -> None:
    whole = made(count=9, workload=workload, seed=5)
    assert whole[4:7] == made(first=4, count=3, workload=workload, seed=5)
    assert whole != made(count=9, workload=workload, seed=6)


def test_groups_share_prefixes_and_nobody_shares_the_rest() -> None:
    prompts = [tuple(ask.prompt) for ask in made(count=12, workload="shared-prefix", prefix=40, prompt=9, groups=3)]
    assert all(len(prompt) == 49 for prompt in prompts)
    assert Counter(prompt[:40] for prompt in prompts).most_common() == [(prompts[i][:40], 4) for i in range(3)]
    assert len({prompt[40:] for prompt in prompts}) == 12


def test_mixed_lengths_spread_around_the_given_ones_within_bounds() -> None:
    mixed = made(count=2000, workload="mixed", prompt=100, output=20)
    lengths, outputs = [len(ask.prompt) for ask in mixed], [ask.max_tokens for ask in mixed]
    assert (min(lengths), max(lengths), min(outputs), max(outputs)) == (25, 400, 5, 80)
    assert statistics.median(lengths) == pytest.approx(100, rel=0.1)
    assert statistics.median(outputs) == pytest.approx(20, rel=0.1)
    assert all(ask.max_tokens >= 1 for ask in made(count=200, workload="mixed", prompt=1, output=1))


def test_skewed_prompts_choose_experts_by_zipf() -> None:
    prompts = [ask.prompt for ask in made(count=100, workload="skewed", prompt=400, experts=8, zipf=1.5)]
    counts = [count for _, count in Counter(int(token) % 8 for prompt in prompts for token in prompt).most_common()]
    expected = [rank**-1.5 for rank in range(1, 9)]
    shares = [count / sum(counts) for count in counts]
    assert shares == pytest.approx([weight / sum(expected) for weight in expected], rel=0.1)


def test_experts_that_no_token_chooses_are_a_mistake() -> None:
    with pytest.raises(InvalidInput, match="experts"):
        made(workload="skewed", experts=8, vocabulary=Vocabulary(ids=range(0, 800, 2)))


def test_chat_prompts_are_words_as_many_as_make_the_tokens() -> None:
    (ask,) = made(count=1, chat=True, prompt=100, vocabulary=Vocabulary(ids=(), words_per_token=0.5))
    assert isinstance(ask.prompt, str)
    words = ask.prompt.split(" ")
    assert len(words) == 50
    assert set(words) <= set(WORDS)


def test_bodies_ask_for_exactly_so_many_tokens_unless_plain() -> None:
    settings = load_settings({"url": URL, "output": 5})
    sent = body(settings, "m", Ask(prompt=[1, 2], max_tokens=5))
    common = {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert sent == {**common, "prompt": [1, 2], "ignore_eos": True, "min_tokens": 5}
    plain = body(LoadSettings(url=URL, plain=True, chat=True), "m", Ask(prompt="a b", max_tokens=5))
    assert plain == {**common, "messages": [{"role": "user", "content": "a b"}]}


def test_images_travel_as_data_urls() -> None:
    (ask,) = made(count=1, workload="images", prompt=3, first=7)
    content = body(load_settings({"url": URL, "workload": "images"}), "m", ask)["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    head, _, data = content[0]["image_url"]["url"].partition(",")
    assert (head, base64.b64decode(data)) == ("data:image/png;base64", b"png 7")
    assert json.dumps(content)


@pytest.mark.parametrize("size", [(336, 336), (1, 1), (3, 200)])
def test_pictures_have_their_size_and_differ(size: tuple[int, int]) -> None:
    first = draw_png(size, 1, 0)
    with Image.open(io.BytesIO(first)) as picture:
        assert (picture.format, picture.size) == ("PNG", size)
    assert first == draw_png(size, 1, 0)
    assert len({draw_png(size, number, 0) for number in range(4)}) == 4


def test_safe_ids_leave_out_both_ends() -> None:
    assert safe_ids(202_048).stop <= 200_000
    assert safe_ids(202_048).start > 10_000
    assert len(safe_ids(64)) > 40
