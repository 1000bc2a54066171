"""The HTTP server: shapes, streams, errors and clients that leave, over a scripted backend."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_backend import (
    BOS,
    EOS,
    ByteTokenizer,
    PlainTemplate,
    ScriptedBackend,
    Step,
    Submission,
    failure,
    length,
    stop,
)

from experts.errors import ExpertUnavailable, HerdError, InvalidInput, Overloaded, RouterLost
from router.api import http
from router.api.defaults import ServingDefaults, choice_seed
from router.api.errors import INTERNAL_TEXT
from router.api.fields import UNSUPPORTED_CHAT
from router.api.http import HttpOptions, build_app
from router.api.schema import ChatCompletionRequest

MODEL = "tiny/scout"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PROMPT: dict[str, Any] = {"model": MODEL, "prompt": "once"}
CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
PATIENT = HttpOptions(start_wait_s=60.0, keep_alive_s=60.0)


class Server:
    """An app over a backend that plays the same script for every request."""

    def __init__(
        self,
        *script: Step,
        play: Callable[[Submission], Sequence[Step]] | None = None,
        options: HttpOptions = PATIENT,
        defaults: ServingDefaults | None = None,
        max_model_len: int = 1000,
    ) -> None:
        self.backend = ScriptedBackend(play or (lambda _: script), max_model_len)
        self.template = PlainTemplate()
        self.app: FastAPI = build_app(
            served_names=[MODEL, "scout"],
            tokenizer=ByteTokenizer(),
            template=self.template,
            backend=self.backend,
            defaults=defaults or ServingDefaults(eos_token_ids=frozenset({EOS})),
            version="1.2.3",
            options=options,
        )

    def request(self, method: str, url: str, **kwargs: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://herd") as client:
                return await client.request(method, url, **kwargs)

        return asyncio.run(go())

    def post(self, url: str, body: object, **kwargs: Any) -> httpx.Response:
        return self.request("POST", url, json=body, **kwargs)

    @property
    def only(self) -> Submission:
        (submission,) = self.backend.submissions
        return submission


LEAKS = ("Traceback", "Error(", ".py", "site-packages", "0x", "object at")


def check_envelope(response: httpx.Response, status: int, leaks: Sequence[str] = LEAKS) -> dict[str, Any]:
    """The error inside; also checks what every error must have, and the `leaks` that none may have."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str) and error["message"]
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["x-should-retry"] == ("true" if "retry-after" in response.headers else "false")
    assert not any(leak in response.text for leak in leaks)
    return error


def events(text: str) -> list[Any]:
    """Bodies of an event stream that ends as it must; comments left out."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2] if not block.startswith(":")]


# Answers


def test_chat_answer() -> None:
    server = Server("hello", EOS, stop())
    response = server.post(CHAT_URL, CHAT)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 19, "completion_tokens": 6, "total_tokens": 25},
    }
    assert server.only.prompt == "user:hi|assistant:"
    assert server.only.closed


def test_chat_stream() -> None:
    server = Server("hé", length())
    response = server.post(CHAT_URL, {**CHAT, "model": "scout", "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = events(response.text)
    head = {"id": chunks[0]["id"], "object": "chat.completion.chunk", "created": chunks[0]["created"]}
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "h"}, None),
        ({"content": "é"}, None),
        ({}, "length"),
    ]
    assert chunks == [
        {
            **head,
            "model": "scout",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        }
        for delta, finish in deltas
    ]
    assert head["id"].startswith("chatcmpl-")


@pytest.mark.parametrize(("url", "body"), [(CHAT_URL, CHAT), (COMPLETION_URL, PROMPT)])
def test_usage_at_the_end_of_a_stream(url: str, body: dict[str, Any]) -> None:
    server = Server("ab", stop())
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(server.post(url, asked).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    num_prompt = len(server.only.prompt_ids)
    assert last["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 2,
        "total_tokens": num_prompt + 2,
    }
    assert all("usage" not in chunk for chunk in events(Server("ab", stop()).post(url, {**body, "stream": True}).text))


def test_completion_answer() -> None:
    server = Server(" upon a time", length())
    body = server.post(COMPLETION_URL, PROMPT).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": " upon a time", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert server.only.prompt_ids == [BOS, *b"once"]


def test_completion_stream() -> None:
    chunks = events(Server("ab", stop()).post(COMPLETION_URL, {**PROMPT, "stream": True}).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_run_together_and_keep_their_index(stream: bool) -> None:
    second_has_begun = asyncio.Event()

    def play(submission: Submission) -> Sequence[Step]:
        if submission.prompt == "a":
            return [second_has_begun, "first", length()]
        second_has_begun.set()
        return ["second", stop()]

    server = Server(play=play)
    response = server.post(COMPLETION_URL, {"model": MODEL, "prompt": ["a", "b"], "stream": stream})
    choices = (
        [choice for chunk in events(response.text) for choice in chunk["choices"]]
        if stream
        else response.json()["choices"]
    )
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in (0, 1)]
    finishes = [[c["finish_reason"] for c in choices if c["index"] == index][-1] for index in (0, 1)]
    assert (texts, finishes) == (["first", "second"], ["length", "stop"])
    assert len({submission.request_id for submission in server.backend.submissions}) == 2
    if not stream:
        assert response.json()["usage"] == {"prompt_tokens": 4, "completion_tokens": 11, "total_tokens": 15}


def test_token_prompts_and_echo() -> None:
    server = Server("!", stop())
    response = server.post(COMPLETION_URL, {"model": MODEL, "prompt": [[*b"ab"], [BOS, *b"c"]], "echo": True})
    assert [choice["text"] for choice in response.json()["choices"]] == ["ab!", "c!"]
    assert [submission.prompt_ids for submission in server.backend.submissions] == [[*b"ab"], [BOS, *b"c"]]


def test_sampling_reaches_the_backend() -> None:
    server = Server("x", stop(), defaults=ServingDefaults(temperature=0.6, top_p=0.9, top_k=5))
    server.post(CHAT_URL, CHAT)
    server.post(CHAT_URL, {**CHAT, "temperature": 0, "seed": 7, "max_tokens": 3, "stop_token_ids": [9]})
    first, second = (submission.sampling for submission in server.backend.submissions)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.6, 0.9, 5, 1000 - 19)
    assert 0 <= first.seed < 2**63
    assert (second.temperature, second.seed, second.max_tokens, second.stop_token_ids) == (0.0, 7, 3, (9,))


def test_each_request_draws_a_seed_of_its_own() -> None:
    server = Server("x", stop())
    server.post(COMPLETION_URL, {"model": MODEL, "prompt": ["a", "a"]})
    first, second = (submission.sampling.seed for submission in server.backend.submissions)
    assert first != second


def test_deadline_is_the_request_timeout() -> None:
    server = Server("x", stop(), options=HttpOptions(request_timeout_s=1e6))
    before = time.monotonic()
    server.post(CHAT_URL, CHAT)
    assert before + 1e6 <= server.only.deadline <= time.monotonic() + 1e6


def test_template_gets_messages_and_kwargs() -> None:
    server = Server("x", stop())
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {**CHAT, "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]}
    server.post(CHAT_URL, {**asked, "chat_template_kwargs": {"k": 1}, "add_generation_prompt": False})
    assert server.only.prompt == "system:s|user:ab|"
    assert server.template.kwargs == {"k": 1}
    assert server.template.messages[1] == {"role": "user", "content": parts}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens(stream: bool) -> None:
    server = Server("one EN", "D two", asyncio.Event())
    response = server.post(COMPLETION_URL, {**PROMPT, "stop": ["END"], "stream": stream})
    choices = [c["choices"][0] for c in events(response.text)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one "
    assert choices[-1]["finish_reason"] == "stop"
    assert server.only.closed and server.only.num_sent == 7


def test_stop_token_and_ignored_end_token() -> None:
    server = Server("ab!", stop())
    assert server.post(COMPLETION_URL, {**PROMPT, "stop_token_ids": [33]}).json()["choices"][0]["text"] == "ab"
    body = {**PROMPT, "stop_token_ids": [33], "include_stop_str_in_output": True}
    assert server.post(COMPLETION_URL, body).json()["choices"][0]["text"] == "ab!"


def test_events_stay_on_one_line_by_anybodys_rules() -> None:
    text = "a\u2028b\u2029c\x85d\ne\r"
    response = Server(text, stop()).post(COMPLETION_URL, {**PROMPT, "stream": True})
    assert not {"\u2028", "\u2029", "\x85", "\r"} & set(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response.text)) == text


# Choices and log probabilities


def test_choices_have_one_prompt_and_seeds_of_their_own() -> None:
    server = Server(play=lambda submission: [str(submission.sampling.seed % 10), stop()])
    body = {"model": MODEL, "prompt": ["a", "bb"], "n": 3, "seed": 7}
    answer = server.post(COMPLETION_URL, body).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    seeds = [choice_seed(7, number) for number in range(3)] * 2
    assert [choice["text"] for choice in answer["choices"]] == [str(seed % 10) for seed in seeds]
    assert answer["usage"] == {"prompt_tokens": 2 + 3, "completion_tokens": 6, "total_tokens": 11}
    assert [submission.sampling.seed for submission in server.backend.submissions] == seeds
    assert [submission.prompt for submission in server.backend.submissions] == ["a"] * 3 + ["bb"] * 3
    assert len({submission.request_id for submission in server.backend.submissions}) == 6


def test_choices_of_a_chat_stream_begin_each_with_a_role() -> None:
    chunks = events(Server("ab", stop()).post(CHAT_URL, {**CHAT, "n": 3, "temperature": 0, "stream": True}).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "ab"
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_one_refused_choice_refuses_all() -> None:
    left = iter([[asyncio.Event()], [Overloaded("full", 1.0)], [asyncio.Event()]])
    server = Server(play=lambda submission: next(left))
    check_envelope(server.post(CHAT_URL, {**CHAT, "n": 3}), 429)
    assert [submission.closed for submission in server.backend.submissions] == [True] * 3


def test_priority_and_salt_reach_the_backend() -> None:
    server = Server("x", stop())
    server.post(CHAT_URL, {**CHAT, "priority": -5, "cache_salt": "tenant-7", "n": 2})
    server.post(COMPLETION_URL, PROMPT)
    told = [(submission.priority, submission.cache_salt) for submission in server.backend.submissions]
    assert told == [(-5, "tenant-7"), (-5, "tenant-7"), (0, "")]


def entry(token: str, *, top: int | None = None, raw: bytes | None = None) -> dict[str, Any]:
    """A chat token as the scripted backend scores it."""
    first = (raw or token.encode())[0]
    one = {"token": token, "logprob": -(first + 1) / 64, "bytes": list(raw or token.encode())}
    if top is None:
        return one
    others = [{**entry(chr(first + i)), "logprob": -(first + 1) / 64 - i} for i in range(top)]
    return {**one, "top_logprobs": others}


def test_chat_logprobs() -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    [choice] = Server("ab", EOS, stop()).post(CHAT_URL, body).json()["choices"]
    assert choice["logprobs"] == {"content": [entry("a", top=2), entry("b", top=2)], "refusal": None}
    chunks = events(Server("ab", EOS, stop()).post(CHAT_URL, {**body, "stream": True}).text)
    found = [(chunk["choices"][0]["delta"].get("content"), chunk["choices"][0]["logprobs"]) for chunk in chunks]
    assert found == [
        ("", None),
        ("a", {"content": [entry("a", top=2)], "refusal": None}),
        ("b", {"content": [entry("b", top=2)], "refusal": None}),
        (None, None),
    ]
    [choice] = Server(stop()).post(CHAT_URL, {**CHAT, "logprobs": True}).json()["choices"]
    assert choice["logprobs"] == {"content": [], "refusal": None}


def test_chat_logprobs_of_pieces_of_characters_and_special_tokens() -> None:
    body = {**CHAT, "logprobs": True, "ignore_eos": True}
    [choice] = Server("é", EOS, length()).post(CHAT_URL, body).json()["choices"]
    *pieces, special = choice["logprobs"]["content"]
    assert pieces == [entry("\ufffd", top=0, raw=b"\xc3"), entry("\ufffd", top=0, raw=b"\xa9")]
    assert (special["token"], special["bytes"]) == ("<eos>", None)


def test_completion_logprobs() -> None:
    body = {**PROMPT, "logprobs": 2, "stop": ["d"]}
    [choice] = Server("ébcd", asyncio.Event()).post(COMPLETION_URL, body).json()["choices"]
    assert choice["text"] == "ébc"
    scored = choice["logprobs"]
    assert list(scored) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert scored["tokens"] == ["\ufffd", "\ufffd", "b", "c"]
    assert scored["text_offset"] == [0, 0, 1, 2]
    assert scored["token_logprobs"] == [-(byte + 1) / 64 for byte in "ébc".encode()]
    assert scored["top_logprobs"][2] == {"b": -99 / 64, "c": -99 / 64 - 1}
    [choice] = Server("b", stop()).post(COMPLETION_URL, {**PROMPT, "logprobs": 0}).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"b": -99 / 64}], "the chosen token is always there"


def test_completion_stream_offsets_go_on() -> None:
    body = {"model": MODEL, "prompt": ["x", "y"], "n": 2, "logprobs": 1, "stream": True}
    chunks = events(Server("abc", stop()).post(COMPLETION_URL, body).text)
    for index in range(4):
        mine = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["index"] == index]
        assert [one["text_offset"] for one in mine if one] == [[0], [1], [2]]
        assert mine[-1] is None


# Errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (Overloaded("16 requests are waiting", 2.5), 429, "server_overloaded", "3"),
        (ExpertUnavailable([(3, 7)]), 503, "expert_unavailable", "2"),
        (RouterLost("router r0 at 10.0.0.1:4000 died"), 503, "server_unavailable", "2"),
        (failure("router_unavailable", "10.0.0.1:4000", 9.0), 503, "server_unavailable", "9"),
        (failure("deadline_exceeded"), 504, "deadline_exceeded", None),
        (InvalidInput("messages", 3, "must be nicer"), 400, None, None),
        (KeyError("/etc/secret.py"), 500, "internal_error", None),
        (HerdError("/etc/secret.py"), 500, "internal_error", None),
    ],
)
def test_refusals_have_their_status_whole_and_streamed(
    error: Step, status: int, code: str | None, retry_after: str | None, stream: bool
) -> None:
    server = Server(error)
    response = server.post(CHAT_URL, {**CHAT, "stream": stream})
    body = check_envelope(response, status)
    assert body["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "10.0.0.1" not in response.text and "secret" not in response.text
    assert status != 500 or body["message"] == INTERNAL_TEXT
    assert server.only.closed
    kinds = {400: "invalid_request_error", 429: "rate_limit_error"}
    assert body["type"] == kinds.get(status, "server_error")


def test_one_refused_prompt_refuses_all() -> None:
    def play(submission: Submission) -> Sequence[Step]:
        return [Overloaded("full", 1.0)] if submission.prompt == "b" else [asyncio.Event()]

    server = Server(play=play)
    check_envelope(server.post(COMPLETION_URL, {"model": MODEL, "prompt": ["a", "b", "c"]}), 429)
    assert [submission.closed for submission in server.backend.submissions] == [True] * 3


def test_an_error_after_the_first_byte_is_an_event() -> None:
    response = Server("ab", failure("router_unavailable")).post(CHAT_URL, {**CHAT, "stream": True})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "ab"
    assert last["error"]["code"] == "server_unavailable"
    assert list(last["error"]) == ["message", "type", "param", "code"]


def test_an_error_of_a_late_stream_is_an_event() -> None:
    async def scenario() -> None:
        go = asyncio.Event()
        server = Server(go, Overloaded("full", 1.0), options=HttpOptions(start_wait_s=0.0))
        client = Client(server.app, CHAT_URL, {**CHAT, "stream": True})
        await client.read_until("assistant")
        assert client.status == 200
        go.set()
        assert events(await client.read_to_end())[-1]["error"]["code"] == "server_overloaded"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({**CHAT, "max_tokens": -1}, "max_tokens", None),
        ({**CHAT, "temperature": "hot"}, "temperature", None),
        ({**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", None),
        ({"model": MODEL}, "messages", "missing_required_parameter"),
        ({**CHAT, "tools": [{}]}, "tools", "unsupported_parameter"),
        ({**CHAT, "max_tokens": 982}, "messages", "context_length_exceeded"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 1000}]}, "messages", "context_length_exceeded"),
        ({**CHAT, "stop_token_ids": [3, 10**9]}, "stop_token_ids[1]", None),
        ({**CHAT, "max_token": 5}, "max_token", None),
        ({**CHAT, "logit_bias": {"3": 1, "258": 1}}, "logit_bias.258", None),
        ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias.x", None),
        ({**CHAT, "n": 17}, "n", None),
        ({**CHAT, "top_logprobs": 1}, "top_logprobs", None),
        ({**CHAT, "n": 2, "best_of": 3}, "best_of", "unsupported_parameter"),
        ([], "body", None),
    ],
)
def test_bad_requests_name_the_field(body: object, param: str, code: str | None) -> None:
    server = Server()
    for asked in (body, {**body, "stream": True} if isinstance(body, dict) else body):
        error = check_envelope(server.post(CHAT_URL, asked), 400)
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
        assert code != "context_length_exceeded" or "this model's maximum context length is 1000" in error["message"]
    assert server.backend.submissions == []


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("x" * 1000, "prompt"),
        (["a", "x" * 1000], "prompt[1]"),
        ([1, 258], "prompt[1]"),
        ([[1], [2, 999]], "prompt[1][1]"),
    ],
)
def test_bad_prompts_name_the_prompt(prompt: object, param: str) -> None:
    server = Server()
    assert check_envelope(server.post(COMPLETION_URL, {"model": MODEL, "prompt": prompt}), 400)["param"] == param
    assert server.backend.submissions == []


@pytest.mark.parametrize(("url", "body"), [(CHAT_URL, CHAT), (COMPLETION_URL, PROMPT)])
def test_unknown_model(url: str, body: dict[str, Any]) -> None:
    error = check_envelope(Server().post(url, {**body, "model": "gpt-9"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-9" in error["message"]


def test_malformed_bodies() -> None:
    server = Server()
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000):
        error = check_envelope(server.request("POST", CHAT_URL, content=content, headers=json_type), 400)
        assert error["param"] == ("a" if b"NaN" in content else "body")


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "application/x-json"}])
def test_other_content_types(headers: dict[str, str]) -> None:
    response = Server().request("POST", CHAT_URL, content=json.dumps(CHAT).encode(), headers=headers)
    assert "application/json" in check_envelope(response, 415)["message"]


def test_content_type_parameters_and_encodings() -> None:
    server = Server("x", stop())
    content = json.dumps(CHAT).encode()
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.request("POST", CHAT_URL, content=content, headers=headers).status_code == 200
    check_envelope(
        server.request("POST", CHAT_URL, content=content, headers={**headers, "content-encoding": "gzip"}), 415
    )


def test_large_bodies() -> None:
    server = Server("x", stop(), options=HttpOptions(max_body_bytes=100_000), max_model_len=10**6)
    fits = {**CHAT, "messages": [{"role": "user", "content": "x" * 99_000}]}
    assert server.post(CHAT_URL, fits).status_code == 200
    large = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 100_000}]}).encode()

    async def in_pieces() -> Any:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for content in (large, in_pieces()):
        response = server.request("POST", CHAT_URL, content=content, headers={"content-type": "application/json"})
        assert check_envelope(response, 413)["code"] == "request_too_large"


def test_a_body_that_does_not_come() -> None:
    async def scenario() -> None:
        client = Client(Server(options=HttpOptions(body_timeout_s=0.0)).app, CHAT_URL, None)
        text = await client.read_to_end()
        assert client.status == 408 and json.loads(text)["error"]["code"] == "request_timeout"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("GET", "/nothing/here", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/completions", 405),
    ],
)
def test_unknown_routes_and_methods(method: str, url: str, status: int) -> None:
    response = Server().request(method, url)
    assert f"{method} {url}" in check_envelope(response, status)["message"]
    assert ("allow" in response.headers) == (status == 405)


def test_unforeseen_faults_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = Server("x", stop())
    server.backend.ready = None  # type: ignore[assignment, method-assign]
    response = server.request("GET", "/ready", headers={"x-request-id": "mine"})
    assert check_envelope(response, 500)["message"] == INTERNAL_TEXT
    assert "mine" in caplog.text and "TypeError" in caplog.text


def test_a_fault_after_the_first_byte_breaks_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken_frames(*_: object) -> AsyncGenerator[bytes, None]:
        yield b"data: {}\n\n"
        raise KeyError("a bug")

    async def scenario() -> None:
        monkeypatch.setattr(http, "frames", broken_frames)
        server = Server("x", stop())
        client = Client(server.app, CHAT_URL, {**CHAT, "stream": True})
        with pytest.raises(KeyError):
            await client.task
        assert (client.status, client.text) == (200, "data: {}\n\n")
        assert server.only.closed

    asyncio.run(scenario())


def test_a_context_length_that_nobody_told_yet() -> None:
    server = Server(max_model_len=0)
    assert check_envelope(server.post(CHAT_URL, CHAT), 503)["code"] == "model_loading"
    assert server.request("GET", "/v1/models").json()["data"][0]["max_model_len"] is None


# Request ids, models, health


@pytest.mark.parametrize("wanted", ["abc-123", "x" * 128, "!~"])
def test_request_id_is_echoed(wanted: str) -> None:
    server = Server("x", stop())
    for method, url, body in (("POST", CHAT_URL, CHAT), ("POST", CHAT_URL, {}), ("GET", "/none", None)):
        assert (
            server.request(method, url, json=body, headers={"x-request-id": wanted}).headers["x-request-id"] == wanted
        )


@pytest.mark.parametrize("wanted", ["x" * 129, "a b", "", b"\xc3\xa9"])
def test_request_id_is_drawn_instead(wanted: str | bytes) -> None:
    drawn = Server().request("GET", "/health", headers=[(b"x-request-id", wanted)]).headers["x-request-id"]
    assert drawn.startswith("req_") and len(drawn) == 36


def test_models() -> None:
    server = Server()
    listed = server.request("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [MODEL, "scout"]
    assert all(card["max_model_len"] == 1000 and card["object"] == "model" for card in listed["data"])
    for name in (MODEL, "scout", "tiny%2Fscout"):
        card = server.request("GET", f"/v1/models/{name}").json()
        assert card["id"] == name.replace("%2F", "/")
    assert check_envelope(server.request("GET", "/v1/models/other"), 404)["code"] == "model_not_found"


def test_health_is_not_readiness() -> None:
    server = Server()
    server.backend.is_ready = False
    assert server.request("GET", "/health").status_code == 200
    assert check_envelope(server.request("GET", "/ready"), 503)["code"] == "not_ready"
    server.backend.is_ready = True
    assert server.request("GET", "/ready").status_code == 200
    assert server.request("HEAD", "/ready").status_code == 200
    assert server.request("GET", "/version").json() == {"version": "1.2.3"}


# Clients that wait or leave


class Client:
    """A connection driven by hand. Without a body it never finishes sending."""

    def __init__(self, app: FastAPI, url: str, body: object) -> None:
        self.text = ""
        self.status = 0
        self._left = asyncio.Event()
        self._changed = asyncio.Event()
        self._sent = body is None
        self._body = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def read_until(self, wanted: str, times: int = 1) -> None:
        while self.text.count(wanted) < times:
            assert not self.task.done(), self.text
            self._changed.clear()
            await self._changed.wait()

    async def read_to_end(self) -> str:
        await self.task
        return self.text

    async def _receive(self) -> dict[str, Any]:
        if self._sent:
            await self._left.wait()
            return {"type": "http.disconnect"}
        self._sent = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.text += message.get("body", b"").decode()
        self._changed.set()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until `condition` holds; threads take part, so it may need real time."""
    while not condition():
        await asyncio.sleep(0.001)


def test_keep_alive_comments_while_nothing_flows() -> None:
    async def scenario() -> None:
        start, go_on = asyncio.Event(), asyncio.Event()
        options = HttpOptions(start_wait_s=0.0, keep_alive_s=0.01)
        server = Server(start, "a", go_on, "b", stop(), options=options)
        client = Client(server.app, CHAT_URL, {**CHAT, "stream": True})
        await client.read_until(": keep-alive\n\n", times=3)
        assert client.status == 200 and '"role":"assistant"' in client.text and '"content":"a"' not in client.text
        start.set()
        await client.read_until('"content":"a"')
        so_far = client.text.count(": keep-alive\n\n")
        await client.read_until(": keep-alive\n\n", times=so_far + 2)
        go_on.set()
        chunks = events(await client.read_to_end())
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "ab"

    asyncio.run(scenario())


@pytest.mark.parametrize("body", [CHAT, {**CHAT, "stream": True}])
def test_a_client_that_leaves_before_the_first_token(body: dict[str, Any]) -> None:
    async def scenario() -> None:
        server = Server(asyncio.Event())
        client = Client(server.app, CHAT_URL, body)
        await until(lambda: bool(server.backend.submissions))
        client.leave()
        await client.task
        assert server.only.closed
        assert client.text == ""

    asyncio.run(scenario())


def test_a_client_that_leaves_a_stream() -> None:
    async def scenario() -> None:
        server = Server("ab", asyncio.Event())
        client = Client(server.app, CHAT_URL, {**CHAT, "stream": True})
        await client.read_until('"content":"b"')
        client.leave()
        await client.task
        assert server.only.closed
        assert "[DONE]" not in client.text

    asyncio.run(scenario())


def test_a_client_that_leaves_several_prompts() -> None:
    async def scenario() -> None:
        server = Server("ab", asyncio.Event())
        client = Client(server.app, COMPLETION_URL, {"model": MODEL, "prompt": ["a", "b", "c"]})
        await until(lambda: sum(submission.num_sent for submission in server.backend.submissions) == 6)
        client.leave()
        await client.task
        assert [submission.closed for submission in server.backend.submissions] == [True] * 3

    asyncio.run(scenario())


def test_a_client_that_leaves_while_sending() -> None:
    async def scenario() -> None:
        server = Server()
        client = Client(server.app, CHAT_URL, None)
        client.leave()
        await client.task
        assert (client.text, server.backend.submissions) == ("", [])

    asyncio.run(scenario())


def test_a_server_that_stops_closes_the_backend() -> None:
    async def scenario() -> None:
        server = Server("ab", asyncio.Event())
        client = Client(server.app, CHAT_URL, {**CHAT, "stream": True})
        await client.read_until('"content":"b"')
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
        assert server.only.closed

    asyncio.run(scenario())


def test_no_task_outlives_its_request() -> None:
    async def scenario() -> None:
        server = Server("ab", stop())
        for stream in (False, True):
            await Client(server.app, CHAT_URL, {**CHAT, "stream": stream}).task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


# The stock client


def with_openai(server: Server, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        http_client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app))
        async with openai.AsyncOpenAI(
            base_url="http://herd/v1", api_key="any", http_client=http_client, max_retries=0
        ) as client:
            return await use(client)

    return asyncio.run(go())


def test_openai_client_chat() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(**CHAT, temperature=0, extra_body={"top_k": 3})
        assert answer.choices[0].message.content == "hello"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        history = [*CHAT["messages"], answer.choices[0].message.model_dump()]
        await client.chat.completions.create(model=MODEL, messages=history)

    server = Server("hello", stop())
    with_openai(server, use)
    assert server.backend.submissions[0].sampling.top_k == 3
    assert server.backend.submissions[1].prompt == "user:hi|assistant:hello|assistant:"


def test_openai_client_stream() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        text, usage = "", None
        stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert text == "héllo" and usage is not None and usage.completion_tokens == 6

    with_openai(Server("héllo", stop()), use)


def test_openai_client_completions_and_models() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.completions.create(model="scout", prompt=["a", "b"], max_tokens=5)
        assert [choice.text for choice in answer.choices] == ["xyz", "xyz"]
        text = ""
        async for chunk in await client.completions.create(model="scout", prompt="a", stream=True):
            text += chunk.choices[0].text
        assert text == "xyz"
        assert [model.id async for model in client.models.list()] == [MODEL, "scout"]
        assert (await client.models.retrieve(MODEL)).id == MODEL

    with_openai(Server("xyz", length()), use)


def test_openai_client_reads_choices_and_logprobs() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            **CHAT, n=2, seed=5, logprobs=True, top_logprobs=3, presence_penalty=0.5, logit_bias={"5": -3},
            extra_body={"min_p": 0.1, "repetition_penalty": 1.2, "priority": 3, "cache_salt": "s"},
        )  # fmt: skip
        assert [choice.index for choice in answer.choices] == [0, 1]
        for choice in answer.choices:
            assert choice.logprobs is not None and choice.logprobs.content is not None
            assert "".join(token.token for token in choice.logprobs.content) == choice.message.content == "xyz"
            assert [len(token.top_logprobs) for token in choice.logprobs.content] == [3] * 3
            assert choice.logprobs.content[0].top_logprobs[1].bytes == [ord("y")]
        completion = await client.completions.create(model=MODEL, prompt="a", logprobs=5, n=2)
        for done in completion.choices:
            assert done.logprobs is not None and done.logprobs.tokens == ["x", "y", "z"]
            assert done.logprobs.text_offset == [0, 1, 2]
            assert done.logprobs.top_logprobs is not None and len(done.logprobs.top_logprobs[0]) == 5

    server = Server("xyz", length())
    with_openai(server, use)
    sampling = server.backend.submissions[0].sampling
    assert (sampling.min_p, sampling.repetition_penalty, sampling.presence_penalty) == (0.1, 1.2, 0.5)
    assert (sampling.logit_bias, sampling.num_logprobs, sampling.seed) == (((5, -3.0),), 3, 5)


def test_openai_client_reads_streamed_logprobs() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        tokens: dict[int, str] = {0: "", 1: ""}
        async for chunk in await client.chat.completions.create(**CHAT, n=2, logprobs=True, stream=True):
            for choice in chunk.choices:
                if choice.logprobs is not None:
                    tokens[choice.index] += "".join(token.token for token in choice.logprobs.content or [])
        assert tokens == {0: "xyz", 1: "xyz"}
        told: list[float] = []
        async for piece in await client.completions.create(model=MODEL, prompt="a", logprobs=1, stream=True):
            told += (piece.choices[0].logprobs.token_logprobs or []) if piece.choices[0].logprobs else []
        assert told == [-(byte + 1) / 64 for byte in b"xyz"]

    with_openai(Server("xyz", length()), use)


@pytest.mark.parametrize(
    ("script", "fields", "kind", "code"),
    [
        ([Overloaded("full", 1.0)], {}, openai.RateLimitError, "server_overloaded"),
        ([ExpertUnavailable([(1, 2)])], {}, openai.InternalServerError, "expert_unavailable"),
        ([], {"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ([], {"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded"),
        ([], {"tools": [{}]}, openai.BadRequestError, "unsupported_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_client_errors(
    script: list[Step], fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**{**CHAT, **fields}, stream=stream)
        assert caught.value.code == code
        assert caught.value.request_id

    with_openai(Server(*script), use)


def test_openai_client_sees_an_error_in_a_stream() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        text = ""
        with pytest.raises(openai.APIError, match="lost this request"):
            async for chunk in await client.chat.completions.create(**CHAT, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "ab"

    with_openai(Server("ab", failure("router_unavailable")), use)


# Anything at all

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = st.dictionaries(
    st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *UNSUPPORTED_CHAT, "prompt", "echo"})),
    _JSON,
    max_size=4,
)


@settings(deadline=None, max_examples=150)
@given(
    url=st.sampled_from([CHAT_URL, COMPLETION_URL]),
    base=st.sampled_from([{}, CHAT, PROMPT, {**CHAT, **PROMPT}]),
    fields=_FIELDS,
    streamed=st.booleans(),
)
def test_any_object_gets_an_answer_or_the_envelope(
    url: str, base: dict[str, Any], fields: dict[str, Any], streamed: bool
) -> None:
    body = {**base, **({"stream": True} if streamed else {}), **fields}
    response = Server("x", stop()).request(
        "POST", url, content=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    if response.status_code != 200:
        # Values are quoted, and the values here may be anything.
        check_envelope(response, 404 if response.status_code == 404 else 400, leaks=())
    elif "text/event-stream" in response.headers["content-type"]:
        assert not any("error" in chunk for chunk in events(response.text))
    else:
        assert response.json()["choices"]


@settings(deadline=None, max_examples=100)
@given(body=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_get_the_envelope(body: bytes) -> None:
    response = Server().request("POST", CHAT_URL, content=body, headers={"content-type": "application/json"})
    check_envelope(response, 400, leaks=())
