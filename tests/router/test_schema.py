"""Requests of the OpenAI API: what is accepted, and what each refusal names."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import CheckpointError, ContextOverflow, InvalidInput
from router.api import body as body_module
from router.api.body import MAX_DEPTH, MAX_NODES, parse_object
from router.api.defaults import ServingDefaults, choice_seed, to_sampling
from router.api.errors import Missing, Unsupported, api_error
from router.api.fields import UNSUPPORTED_CHAT, UNSUPPORTED_COMPLETION, UNSUPPORTED_PICTURE, near_miss
from router.api.schema import ChatCompletionRequest, CompletionRequest, parse_chat, parse_completion

URL = "data:image/png;base64,AAAA"
USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **fields}


def refused_chat(**fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse_chat(chat(**fields))
    return caught.value


def refused_completion(**fields: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse_completion({"model": "m", "prompt": "x", **fields})
    return caught.value


def test_smallest_chat_request_leaves_everything_to_the_server() -> None:
    request = parse_chat(chat())
    assert (request.temperature, request.top_p, request.top_k, request.seed, request.output_limit) == (None,) * 5
    assert request.stop == [] and not request.stream and request.add_generation_prompt
    assert request.messages[0].for_template() == USER


def test_null_means_absent_everywhere() -> None:
    nulls = dict.fromkeys([*ChatCompletionRequest.model_fields, *UNSUPPORTED_CHAT])
    assert parse_chat({**nulls, **chat()}) == parse_chat(chat())
    message = {**USER, "tool_calls": None, "refusal": None, "audio": None, "name": None}
    assert parse_chat(chat(messages=[message])) == parse_chat(chat())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 1),
        ("top_k", -1),
        ("max_tokens", 1),
        ("seed", -(2**63)),
        ("stop", "x"),
        ("stop", ["a", "b", "c", "é" * 128]),
        ("stop_token_ids", [1, 2]),
        ("min_tokens", 0),
        ("user", "somebody"),
        ("stream", True),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 1e-9),
        ("repetition_penalty", 2),
        ("presence_penalty", -2),
        ("presence_penalty", 2),
        ("frequency_penalty", -2),
        ("frequency_penalty", 2),
        ("n", 1),
        ("n", 16),
        ("best_of", 1),
        ("logprobs", True),
        ("logprobs", False),
        ("top_logprobs", 0),
        ("priority", -(2**31)),
        ("priority", 2**31 - 1),
        ("cache_salt", "!"),
        ("cache_salt", "~" * 128),
        ("chat_template_kwargs", {"date": "today"}),
    ],
)
def test_values_at_the_edge_are_accepted(field: str, value: object) -> None:
    assert parse_chat(chat(**{field: value})).model_dump()[field] == ([value] if value == "x" else value)


@pytest.mark.parametrize(
    ("fields", "path", "rule"),
    [
        ({"temperature": "1"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": -0.1}, "temperature", "must be at least 0.0"),
        ({"temperature": 2.1}, "temperature", "must be at most 2.0"),
        ({"top_p": 0}, "top_p", "must be greater than 0.0"),
        ({"top_p": 1.5}, "top_p", "must be at most 1.0"),
        ({"top_k": 1.0}, "top_k", "must be an integer"),
        ({"top_k": -2}, "top_k", "must be at least -1"),
        ({"max_tokens": -1}, "max_tokens", "must be at least 1"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
        ({"max_tokens": True}, "max_tokens", "must be an integer"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", "must be an integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "must equal max_completion_tokens, 6"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "must be at most max_tokens, 5"),
        ({"min_tokens": 6, "max_completion_tokens": 5}, "min_tokens", "must be at most max_tokens, 5"),
        ({"seed": 2**63}, "seed", "must be at most"),
        ({"seed": 1.5}, "seed", "must be an integer"),
        ({"stop": 3}, "stop", "must be a string or a list"),
        ({"stop": ["a", ""]}, "stop[1]", "1 to 256 bytes"),
        ({"stop": ["é" * 129]}, "stop[0]", "1 to 256 bytes"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [1]}, "stop[0]", "must be a string"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "must be at least 0"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream": 1}, "stream", "must be true or false"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": []}, "stream_options", "must be an object"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "must be true or false",
        ),
        (
            {"stream": True, "stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "did you mean include_usage",
        ),
        ({"min_p": -0.01}, "min_p", "must be at least 0.0"),
        ({"min_p": 1.01}, "min_p", "must be at most 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be greater than 0.0"),
        ({"repetition_penalty": 2.01}, "repetition_penalty", "must be at most 2.0"),
        ({"presence_penalty": 2.01}, "presence_penalty", "must be at most 2.0"),
        ({"presence_penalty": -2.01}, "presence_penalty", "must be at least -2.0"),
        ({"frequency_penalty": 2.01}, "frequency_penalty", "must be at most 2.0"),
        ({"frequency_penalty": -2.01}, "frequency_penalty", "must be at least -2.0"),
        ({"frequency_penalty": "1"}, "frequency_penalty", "must be a number"),
        ({"n": 0}, "n", "must be at least 1"),
        ({"n": 17}, "n", "must be at most 16"),
        ({"n": True}, "n", "must be an integer"),
        ({"n": 1.5}, "n", "must be an integer"),
        ({"best_of": 0}, "best_of", "must be at least 1"),
        ({"logprobs": 1}, "logprobs", "must be true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "must be at least 0"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs to be true"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "must be token ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "must be token ids"),
        ({"logit_bias": {"01": 1}}, "logit_bias.01", "must be token ids"),
        ({"logit_bias": {"٣": 1}}, "logit_bias.٣", "must be token ids"),
        ({"logit_bias": {"": 1}}, "logit_bias", "must be token ids"),
        ({"logit_bias": {"9" * 50: 1}}, "logit_bias.9999999999", "must be token ids"),
        ({"logit_bias": {"5": 100.01}}, "logit_bias.5", "must be a number in -100 … 100"),
        ({"logit_bias": {"5": -101}}, "logit_bias.5", "must be a number in -100 … 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5", "must be a number"),
        ({"logit_bias": {"5": True}}, "logit_bias.5", "must be a number"),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "at most 1024 entries"),
        ({"priority": 2**31}, "priority", "must be at most"),
        ({"priority": -(2**31) - 1}, "priority", "must be at least"),
        ({"priority": 1.0}, "priority", "must be an integer"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 characters"),
        ({"cache_salt": "x" * 129}, "cache_salt", "at most 128 characters"),
        ({"cache_salt": "a b"}, "cache_salt", "must be visible ASCII"),
        ({"cache_salt": "ä"}, "cache_salt", "must be visible ASCII"),
        ({"ignore_eos": 0}, "ignore_eos", "must be true or false"),
        ({"user": "Jörg"}, "user", "must be visible ASCII"),
        ({"user": "x" * 129}, "user", "at most 128 characters"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "must be an object"),
        ({"model": 3}, "model", "must be a string"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": [USER] * 2049}, "messages", "at most 2048 items"),
        ({"messages": [USER, "hi"]}, "messages[1]", "must be an object"),
        ({"messages": [{**USER, "role": "wizard"}]}, "messages[0].role", "must be one of 'system'"),
        (
            {"messages": [{**USER, "content": 3}]},
            "messages[0].content",
            "must be a string or a list of text and image parts",
        ),
        ({"messages": [{**USER, "content": []}]}, "messages[0].content", "must not be empty"),
        (
            {"messages": [{**USER, "content": [{"type": "text", "text": "x"}] * 129}]},
            "messages[0].content",
            "at most 128 items",
        ),
        ({"messages": [{**USER, "content": ["x"]}]}, "messages[0].content[0]", "must be an object"),
        (
            {"messages": [USER, {**USER, "content": [{"type": "text", "text": 1}]}]},
            "messages[1].content[0].text",
            "must be a string",
        ),
        ({"messages": [{**USER, "content": [{"type": "song"}]}]}, "messages[0].content[0].type", "'text'"),
        ({"max_token": 3}, "max_token", "did you mean max_tokens"),
        ({"temprature": 0}, "temprature", "did you mean temperature"),
        ({"topP": 0}, "topP", "did you mean top_p"),
        ({f"field{i}": 0 for i in range(33)}, "*", "at most 32 unknown fields"),
    ],
)
def test_bad_chat_fields_are_named_with_their_rule(fields: dict[str, Any], path: str, rule: str) -> None:
    error = refused_chat(**fields)
    assert error.field == path
    assert rule in error.rule
    assert not isinstance(error, Unsupported | Missing)


@pytest.mark.parametrize("field", ["model", "messages"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_required_fields(field: str, how: str) -> None:
    document = chat(**{field: None})
    if how == "absent":
        del document[field]
    with pytest.raises(Missing) as caught:
        parse_chat(document)
    assert caught.value.field == field


def test_missing_content_is_named() -> None:
    assert isinstance(refused_chat(messages=[{"role": "user"}]), Missing)
    assert refused_chat(messages=[{"role": "assistant", "content": None}]).field == "messages[0].content"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_new_kind": "x"}, "guided_new_kind"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"echo": True}, "echo"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{**USER, "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}]}]},
            "messages[0].content[0].image_url.detail",
        ),
        ({"mm_processor_kwargs": {"max_patches": 1}}, "mm_processor_kwargs"),
        ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
        ({"multi_modal_data": {"image": "x"}}, "multi_modal_data"),
        ({"images": ["x"]}, "images"),
        ({"prompt": "x"}, "prompt"),
        ({"messages": [{**USER, "images": ["x"]}]}, "messages[0].images"),
        *(
            (
                {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x", field: 1}}]}]},
                f"messages[0].content[0].image_url.{field}",
            )
            for field in UNSUPPORTED_PICTURE
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}, "max_pixels": 1}]}]},
            "messages[0].content[0].max_pixels",
        ),
        *(
            ({"messages": [{**USER, "content": [{"type": kind, kind: {}}]}]}, "messages[0].content[0].type")
            for kind in ("image", "image_embeds", "input_image", "video_url")
        ),
    ],
)
def test_what_would_change_the_answer_is_refused_and_named(fields: dict[str, Any], path: str) -> None:
    error = refused_chat(**fields)
    assert isinstance(error, Unsupported)
    assert error.field == path
    assert "not supported by this server yet" in error.rule


@pytest.mark.parametrize("field", ["messages", "images", "mm_processor_kwargs", "media_io_kwargs", "multi_modal_data"])
def test_pictures_beside_a_prompt_are_refused(field: str) -> None:
    with pytest.raises(Unsupported) as caught:
        parse_completion({"model": "m", "prompt": "x", field: {"image": 1}})
    assert caught.value.field == field


@pytest.mark.parametrize("kind", ["IMAGE_URL", "", "Text", None, 4, True, ["image_url"], {"a": 1}, "x" * 1000])
def test_parts_of_unknown_types_are_told_both_types(kind: object) -> None:
    error = refused_chat(
        messages=[{**USER, "content": [{"type": "text", "text": "x"}, {"type": kind, "image_url": 1}]}]
    )
    assert (error.field, error.rule) == ("messages[0].content[1].type", "must be 'text' or 'image_url'")


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"type": "image_url", "image_url": {"url": URL, "Detail": "low"}}, "image_url.Detail"),
        ({"type": "image_url", "image_url": {"url": URL, "detial": "low"}}, "image_url.detial"),
        ({"type": "image_url", "image_url": {"url": URL}, "imageUrl": {"url": URL}}, "imageUrl"),
        ({"type": "text", "text": "x", "image-url": {"url": URL}}, "image-url"),
        ({"type": "text", "text": "x", "image_url": {"url": URL}}, "image_url"),
        ({"type": "image_url", "text": "x", "image_url": {"url": URL}}, "text"),
    ],
)
def test_no_member_of_a_part_is_lost_in_silence(part: dict[str, Any], path: str) -> None:
    assert refused_chat(messages=[{**USER, "content": [part]}]).field == f"messages[0].content[0].{path}"


def test_members_of_parts_that_change_nothing_pass() -> None:
    image = {"url": URL, "format": "image/png", "detail": None}
    parts = [{"type": "text", "text": "x", "cache_control": {}}, {"type": "image_url", "image_url": image, "uuid": "a"}]
    assert len(parse_chat(chat(messages=[{**USER, "content": parts}])).uploads) == 1


@pytest.mark.parametrize("unsupported", [UNSUPPORTED_CHAT, UNSUPPORTED_COMPLETION])
def test_neutral_values_are_accepted(unsupported: dict[str, tuple[object, ...]]) -> None:
    for field, values in unsupported.items():
        for value in values:
            if unsupported is UNSUPPORTED_CHAT:
                assert parse_chat(chat(**{field: value})) == parse_chat(chat())
            else:
                assert parse_completion({"model": "m", "prompt": "x", field: value}).prompts == [("prompt", "x")]


def test_unknown_and_passive_fields_pass() -> None:
    fields = {"metadata": {"a": "b"}, "store": True, "my_gateway_field": 1, "top_a": 0.1, "service_tier": "auto"}
    assert parse_chat(chat(**fields)) == parse_chat(chat())


def test_developer_messages_are_system_messages() -> None:
    request = parse_chat(chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "x"}]}, USER]))
    assert request.messages[0].for_template() == {"role": "system", "content": [{"type": "text", "text": "x"}]}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("mesages", "messages"),
        ("messagse", "messages"),
        ("top_l", None),
        ("modle", None),
        ("temperature_decay", None),
        ("x" * 1000, None),
    ],
)
def test_near_misses(name: str, meant: str | None) -> None:
    assert near_miss(name, {"max_tokens", "messages", "top_k", "top_p", "temperature", "model"}) == meant


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("", [("prompt", "")]),
        ("hello", [("prompt", "hello")]),
        (["a", "b"], [("prompt[0]", "a"), ("prompt[1]", "b")]),
        ([1, 2], [("prompt", [1, 2])]),
        ([[1], [2, 3]], [("prompt[0]", [1]), ("prompt[1]", [2, 3])]),
    ],
)
def test_prompts_in_their_four_forms(prompt: object, parsed: object) -> None:
    assert parse_completion({"model": "m", "prompt": prompt}).prompts == parsed


@pytest.mark.parametrize(
    ("prompt", "path"),
    [
        ([], "prompt"),
        ({}, "prompt"),
        (3, "prompt"),
        ([True], "prompt[0]"),
        ([1, -1], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([[1], []], "prompt[1]"),
        ([[1], [2, "x"]], "prompt[1][1]"),
        (["a"] * 129, "prompt"),
    ],
)
def test_bad_prompts_are_named(prompt: object, path: str) -> None:
    assert refused_completion(prompt=prompt).field == path


def test_completion_fields() -> None:
    assert parse_completion({"model": "m", "prompt": "x", "echo": True}).echo
    for field in ("logprobs", "n"):
        assert parse_completion({"model": "m", "prompt": "x", field: 5}).model_dump()[field] == 5
    for value, rule in ((21, "must be at most 20"), (-1, "must be at least 0"), (True, "must be an integer")):
        assert rule in refused_completion(logprobs=value).rule
    error = refused_completion(logprobs=0, echo=True)
    assert isinstance(error, Unsupported) and error.field == "logprobs" and "echo" in error.rule
    assert refused_completion(suffix="end").field == "suffix"
    for field, value in (("tools", [{}]), ("top_logprobs", 2), ("chat_template_kwargs", {"a": 1})):
        error = refused_completion(**{field: value})
        assert isinstance(error, Unsupported) and error.field == field
    assert refused_completion(prompts="x").rule == "is not a field; did you mean prompt?"


def test_either_name_of_the_limit_counts_in_both_kinds_of_request() -> None:
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert parse_chat(chat(**fields)).output_limit == 5
        assert parse_completion({"model": "m", "prompt": "x", **fields}).output_limit == 5
    assert refused_completion(max_tokens=5, max_completion_tokens=6).field == "max_tokens"


def test_the_number_of_choices_is_bounded() -> None:
    assert parse_completion({"model": "m", "prompt": ["x"] * 8, "n": 16}).n == 16
    error = refused_completion(prompt=["x"] * 9, n=15)
    assert (error.field, error.value) == ("n", 15) and "at most 128 choices" in error.rule
    assert refused_completion(prompt=["x"] * 64, n=2, best_of=3).field == "best_of"


def test_logprobs_asked_for() -> None:
    assert parse_chat(chat()).num_logprobs is None
    assert parse_chat(chat(logprobs=True)).num_logprobs == 0
    assert parse_chat(chat(logprobs=True, top_logprobs=20)).num_logprobs == 20
    assert parse_completion({"model": "m", "prompt": "x"}).num_logprobs is None
    assert parse_completion({"model": "m", "prompt": "x", "logprobs": 0}).num_logprobs == 0


def test_logit_bias_becomes_pairs() -> None:
    biases = {str(token): 100 for token in range(1024)}
    assert parse_chat(chat(logit_bias=biases)).logit_bias == tuple((token, 100.0) for token in range(1024))
    assert parse_chat(chat(logit_bias={"0": -100, "7": 0.5})).logit_bias == ((0, -100.0), (7, 0.5))
    assert parse_chat(chat(logit_bias=[])).logit_bias == parse_chat(chat(logit_bias={})).logit_bias == ()


# Bodies


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (b"", "must be valid JSON"),
        (b"{", "must be valid JSON"),
        (b'{"a": 1} x', "extra data, line 1 column 10"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"NaN", "must be a JSON object"),
        (b'[{"a": 1, "a": 2}]', "must be a JSON object"),
        (b'{"a": "\xff"}', "must be UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "must be UTF-8"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": {"\\uDFFF": 1}}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "at most 32 levels"),
        (b"[" * 1_000_000, "at most"),
        (b'"' * 4_000_000, "at most"),
        (b'{"a": [' + b"1," * MAX_NODES + b"1]}", "at most 250000 values"),
    ],
)
def test_bad_bodies_are_refused(body: bytes, rule: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_object(body)
    assert caught.value.field == "body"
    assert rule in caught.value.rule


@pytest.mark.parametrize(
    ("body", "path", "found", "rule"),
    [
        (b'{"temperature": NaN}', "temperature", "NaN", "must be finite"),
        (b'{"a": {"b": [0, -Infinity, NaN]}}', "a.b[1]", "-Infinity", "must be finite"),
        (b'{"a": [[{}, {"b": 1e999}]]}', "a[0][1].b", "1e999", "must be finite"),
        (b'{"seed": ' + b"1" * 21 + b"}", "seed", "1" * 21, "at most 20 characters"),
        (b'{"a": 0.' + b"1" * 500 + b"}", "a", "0." + "1" * 38, "must be finite"),
        (b'{"n": 1, "n": 1}', "n", "more than one value", "must stand once"),
        (b'{"logit_bias": {"5": 1, "7": 0, "5": 2, "7": 1}}', "logit_bias.5", "more than one value", "must stand once"),
        (b'{"n": NaN, "n": 2}', "n", "more than one value", "must stand once"),
        (b'{"' + b"x" * 100 + b'": {"y": NaN}}', "x" * 40 + ".y", "NaN", "must be finite"),
    ],
)
def test_values_that_no_field_could_take_are_refused_by_their_path(
    body: bytes, path: str, found: str, rule: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_object(body)
    assert (caught.value.field, caught.value.value) == (path, found)
    assert rule in caught.value.rule


def test_a_number_that_is_none_under_a_broken_name_can_be_told() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_object(b'{"\\ud800": NaN}')
    str(caught.value).encode("utf-8")


def shape_of(body: bytes) -> tuple[int, int]:
    """(opening brackets and commas outside of strings, greatest depth), a byte at a time."""
    num_nodes = depth = deepest = 0
    in_string = escaped = False
    for byte in body:
        char = chr(byte)
        if escaped and char in '"\\':
            escaped = False
            continue
        escaped = char == "\\"
        if char == '"':
            in_string = not in_string
        elif not in_string:
            num_nodes += char in ",[{"
            depth += (char in "[{") - (char in "]}")
            deepest = max(deepest, depth)
    return num_nodes, deepest


@settings(deadline=None, max_examples=400)
@given(
    body=st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"a", b'\\"', b'"x"']), max_size=40).map(
        b"".join
    ),
    window=st.integers(1, 12),
    max_nodes=st.integers(0, 12),
)
def test_shapes_are_judged_alike_through_any_window(body: bytes, window: int, max_nodes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_module, "WINDOW_BYTES", window)
        patch.setattr(body_module, "MAX_NODES", max_nodes)
        patch.setattr(body_module, "MAX_DEPTH", 3)
        num_nodes, deepest = shape_of(body)
        try:
            body_module._check_shape(body)
        except InvalidInput as error:
            many_quotes = body.count(b'"') > 4 * max_nodes
            assert (num_nodes > max_nodes or many_quotes) if "values" in error.rule else deepest > 3
        else:
            assert num_nodes <= max_nodes and deepest <= 3


def test_brackets_in_strings_are_no_nesting() -> None:
    text = '[{"\\' * 1000
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}


def test_deepest_body_and_surrogate_pairs_are_accepted() -> None:
    depth = MAX_DEPTH - 1
    assert parse_object(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(document=st.dictionaries(st.text(max_size=8), _JSON, max_size=6))
def test_bodies_are_parsed_as_the_json_module_does(document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    try:
        assert parse_object(body) == json.loads(body)
    except InvalidInput as error:
        assert "Infinity" in body.decode() or "\\ud" in body.decode()
        assert error.field == "body" or "Infinity" in error.value


_NAMES = st.sampled_from(
    sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED_CHAT, "prompt"})
)
_URL = st.sampled_from(["data:image/png;base64,AAAA", "data:image/png;base64,", "data:,", "http:", "x"]) | _JSON
_PART = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url"]) | _JSON,
        "text": _JSON,
        "image_url": st.fixed_dictionaries({}, optional={"url": _URL, "detail": _JSON}) | _JSON,
    },
)
_MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "tool"]) | _JSON, "content": _JSON | st.lists(_PART, max_size=3)}
)


@settings(deadline=None, max_examples=300)
@given(
    fields=st.dictionaries(_NAMES | st.text(max_size=12), _JSON, max_size=5),
    messages=st.none() | _JSON | st.lists(_MESSAGE | _JSON, max_size=3),
)
def test_any_object_is_a_request_or_invalid_input(fields: dict[str, Any], messages: object) -> None:
    for parse in (parse_chat, parse_completion):
        document = {"model": "m", "messages": messages, "prompt": "x", **fields}
        try:
            parse(document)
        except InvalidInput as error:
            answer = api_error(error)
            assert answer.status == 400
            assert answer.message.startswith(error.field)
            json.dumps(answer.body())


# Defaults


def test_omitted_values_follow_the_generation_config() -> None:
    config = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "eos_token_id": [3, 4],
        "repetition_penalty": 1.2, "min_p": 0.05,
    }  # fmt: skip
    defaults = ServingDefaults.from_generation_config(config, frozenset({5}))
    sampling = to_sampling(parse_chat(chat()), defaults, 10, 100, lambda: 99)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 7)
    assert (sampling.repetition_penalty, sampling.min_p) == (1.2, 0.05)
    assert (sampling.max_tokens, sampling.seed) == (90, 99)
    assert defaults.eos_token_ids == {5}


def test_requests_override_the_generation_config() -> None:
    defaults = ServingDefaults(
        temperature=0.6, top_p=0.9, top_k=7, max_new_tokens=20, repetition_penalty=1.2, min_p=0.05
    )
    asked = chat(
        temperature=0, top_p=1, top_k=-1, seed=-1, max_tokens=30, stop_token_ids=[5, 5], repetition_penalty=1, min_p=0,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"3": -1}, logprobs=True, top_logprobs=4,
    )  # fmt: skip
    sampling = to_sampling(parse_chat(asked), defaults, 10, 100, lambda: 99)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)
    assert (sampling.max_tokens, sampling.seed, sampling.stop_token_ids) == (30, 2**63 - 1, (5,))
    assert (sampling.repetition_penalty, sampling.min_p) == (1.0, 0.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias, sampling.num_logprobs) == (((3, -1.0),), 4)
    sampling.check(10)


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        (None, 1.0),
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0.0),
    ],
)
def test_greedy_unless_the_config_samples(config: dict[str, Any] | None, temperature: float) -> None:
    assert ServingDefaults.from_generation_config(config).temperature == temperature


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": "hot"}, {"top_p": 2}, {"top_k": -5}, {"max_new_tokens": "x"}, {"top_k": True},
        {"do_sample": "true"}, {"repetition_penalty": 0}, {"repetition_penalty": 3}, {"min_p": 1.5},
        {"no_repeat_ngram_size": 3}, {"num_beams": 4}, {"num_beams": True}, {"typical_p": 0.9},
        {"epsilon_cutoff": 1e-4}, {"eta_cutoff": 1e-4}, {"bad_words_ids": [[1]]},
        {"suppress_tokens": [1]}, {"begin_suppress_tokens": [1]},
        {"forced_bos_token_id": 0}, {"forced_eos_token_id": 1}, {"sequence_bias": [[[1], 2.0]]},
        {"guidance_scale": 1.5}, {"penalty_alpha": 0.6}, {"min_length": 1},
        {"stop_strings": ["x"]}, {"encoder_repetition_penalty": 1.1},
        {"exponential_decay_length_penalty": [1, 1.1]}, {"watermarking_config": {}}, {"top_h": 0.4},
        {"temperature": math.inf}, {"temperature": 10**400}, {"temperature": 1e308}, {"temperature": 101},
        {"top_k": 2**31}, {"top_k": 10**400}, {"top_k": 1.5}, {"top_k": math.inf}, {"top_p": math.nan},
        {"max_new_tokens": 2**31}, {"max_new_tokens": 1.0}, {"max_new_tokens": math.inf},
    ],
)  # fmt: skip
def test_damaged_generation_configs_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(config))):
        ServingDefaults.from_generation_config(config)


@pytest.mark.parametrize("name", ["max_length", "max_time", "num_return_sequences"])
def test_harmless_wishes_are_named(name: str) -> None:
    defaults = ServingDefaults.from_generation_config({"do_sample": True, name: 4096})
    [(field, problem)] = defaults.unfollowed
    assert field == name and problem.startswith("is 4096 and has no effect")


def test_wishes_for_nothing_are_followed() -> None:
    neutral = {
        "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "no_repeat_ngram_size": 0, "bad_words_ids": None,
        "max_length": 20, "use_cache": True, "transformers_version": "5.0", "num_return_sequences": 1,
        "length_penalty": 1.0, "token_healing": False, "pad_token_id": 3, "repetition_penalty": 1.0, "min_p": None,
    }  # fmt: skip
    defaults = ServingDefaults.from_generation_config(neutral)
    assert defaults == ServingDefaults(temperature=0.0)


def test_choices_have_seeds_of_their_own_and_the_first_the_seed_itself() -> None:
    seeds = [choice_seed(5, number) for number in range(16)]
    assert seeds[0] == 5 and len(set(seeds)) == 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [choice_seed(5, number) for number in range(16)]
    assert not set(seeds) & {choice_seed(6, number) for number in range(16)}


def test_max_new_tokens_bounds_only_what_is_not_said() -> None:
    defaults = ServingDefaults.from_generation_config({"max_new_tokens": 20})
    assert to_sampling(parse_chat(chat()), defaults, 10, 100, int).max_tokens == 20
    assert to_sampling(parse_chat(chat()), defaults, 90, 100, int).max_tokens == 10
    assert to_sampling(parse_chat(chat(max_tokens=50)), defaults, 10, 100, int).max_tokens == 50


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "fits"),
    [(99, None, True), (100, None, False), (500, None, False), (60, 40, True), (60, 41, False), (500, 1, False)],
)
def test_context_overflow(num_prompt: int, max_tokens: int | None, fits: bool) -> None:
    request = parse_chat(chat(max_completion_tokens=max_tokens))
    if fits:
        assert to_sampling(request, ServingDefaults(), num_prompt, 100, int).max_tokens == 100 - num_prompt
        return
    with pytest.raises(ContextOverflow) as caught:
        to_sampling(request, ServingDefaults(), num_prompt, 100, int, "prompt")
    answer = api_error(caught.value)
    assert (answer.status, answer.code, answer.param) == (400, "context_length_exceeded", "prompt")
    assert answer.message.startswith("this model's maximum context length is 100 tokens")
    assert str(num_prompt) in answer.message and str(max_tokens or "") in answer.message


def test_min_tokens_must_fit_the_context() -> None:
    with pytest.raises(InvalidInput) as caught:
        to_sampling(parse_chat(chat(min_tokens=50)), ServingDefaults(), 60, 100, int)
    assert caught.value.field == "min_tokens"
