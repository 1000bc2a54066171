"""`/tokenize` and `/detokenize` over HTTP: vLLM's shapes, transformers' tokens, bounds, errors, and other requests."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripted_backend import BOS, EOS, ByteTokenizer, PlainTemplate, ScriptedBackend, stop
from transformers import PreTrainedTokenizerFast

from cluster.tiny_tokenizer import BOS as BOS_TEXT
from cluster.tiny_tokenizer import EOT, train_tokenizer
from router.api.backend import ChatTemplate as Template
from router.api.backend import Tokenizer as AnyTokenizer
from router.api.defaults import ServingDefaults
from router.api.http import HttpOptions, build_app
from router.prompt.chat import LLAMA4_TEMPLATE, ChatTemplate
from router.prompt.images.loader import ImageLoader
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tokens import ImageTokens
from router.prompt.images.vision import Vision
from router.prompt.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


class Server:
    def __init__(
        self,
        tokenizer: AnyTokenizer | None = None,
        template: Template | None = None,
        *,
        vision: Vision | None = None,
        max_model_len: int = 1000,
        options: HttpOptions | None = None,
    ) -> None:
        self.template = template or PlainTemplate()
        self.app = build_app(
            served_names=["tiny", "alias"],
            tokenizer=tokenizer or ByteTokenizer(),
            template=self.template,
            backend=ScriptedBackend(lambda _: ("ok", EOS, stop()), max_model_len),
            defaults=ServingDefaults(eos_token_ids=frozenset({EOS})),
            vision=vision,
            options=options,
        )

    def post(self, url: str, body: object) -> httpx.Response:
        async def go() -> httpx.Response:
            async with self.client() as client:
                return await client.post(url, json=body)

        return asyncio.run(go())

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://herd")


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# Shapes


@pytest.mark.parametrize("url", ["/tokenize", "/v1/tokenize"])
def test_a_prompt_in_tokens(url: str) -> None:
    answer = Server().post(url, {"model": "tiny", "prompt": "ab"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"count": 3, "max_model_len": 1000, "tokens": [BOS, 97, 98], "token_strs": None}


def test_options_of_a_prompt() -> None:
    asked = {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True, "model": None}
    answer = Server(max_model_len=0).post("/tokenize", asked).json()
    assert answer == {"count": 2, "max_model_len": None, "tokens": [97, 98], "token_strs": ["a", "b"]}
    assert Server().post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []


def test_a_conversation_in_tokens() -> None:
    server = Server()
    asked = {"model": "alias", "messages": MESSAGES, "chat_template_kwargs": {"excluded_category_keys": ["S1"]}}
    answer = server.post("/tokenize", asked).json()
    assert bytes(answer["tokens"][1:]).decode() == "user:hi|assistant:"
    assert answer["count"] == len(answer["tokens"]) == 19
    assert isinstance(server.template, PlainTemplate)
    assert server.template.kwargs == {"excluded_category_keys": ["S1"]}
    answer = server.post("/tokenize", {**asked, "add_generation_prompt": False, "return_token_strs": True}).json()
    assert "".join(answer["token_strs"]) == "<bos>user:hi|"


@pytest.mark.parametrize("url", ["/detokenize", "/v1/detokenize"])
def test_tokens_back_to_text(url: str) -> None:
    answer = Server().post(url, {"model": "tiny", "tokens": [BOS, 97, 98]})
    assert (answer.status_code, answer.json()) == (200, {"prompt": "<bos>ab"})
    assert Server().post(url, {"tokens": []}).json() == {"prompt": ""}


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "add_generation_prompts": False}, "add_generation_prompts"),
        ({"prompt": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
         "messages[0].content[0].image_url.url"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert refusal(Server().post("/tokenize", body))["param"] == param


@pytest.mark.parametrize(
    ("tokens", "param"),
    [(None, "tokens"), ("ab", "tokens"), ([1, 258], "tokens[1]"), ([-1], "tokens[0]"), ([True], "tokens[0]"),
     ([1.0], "tokens[0]"), ([[1]], "tokens[0]"), ([2**63], "tokens[0]")],
)  # fmt: skip
def test_bad_tokens_are_refused_by_name(tokens: object, param: str) -> None:
    assert refusal(Server().post("/detokenize", {"tokens": tokens}))["param"] == param


def test_unknown_models_are_refused() -> None:
    for url, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert refusal(Server().post(url, {**body, "model": "other"}), 404)["code"] == "model_not_found"


def test_bodies_are_bounded() -> None:
    options = HttpOptions(max_body_bytes=1000)
    server = Server(options=options)
    assert server.post("/tokenize", {"prompt": "a" * 900}).status_code == 200
    for body in ({"prompt": "a" * 1000}, {"messages": [{"role": "user", "content": "a" * 1000}]}):
        assert refusal(server.post("/tokenize", body), 413)["code"] == "request_too_large"
    assert refusal(server.post("/detokenize", {"tokens": [1] * 1000}), 413)["code"] == "request_too_large"
    assert refusal(Server().post("/detokenize", {"tokens": [1] * 300_000}))["param"] == "body"


# Beside other requests


class StuckTokenizer(ByteTokenizer):
    """Encodes when it is told to."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        self.begun.set()
        assert self.go_on.wait(30)
        return super().encode(text)


def test_others_are_answered_while_a_long_prompt_is_encoded() -> None:
    tokenizer = StuckTokenizer()
    server = Server(tokenizer)

    async def go() -> None:
        async with server.client() as client:
            long = asyncio.create_task(client.post("/tokenize", json={"prompt": "long"}))
            assert await asyncio.to_thread(tokenizer.begun.wait, 30)
            assert (await client.get("/health")).status_code == 200
            assert not long.done()
            tokenizer.go_on.set()
            assert (await long).json()["count"] == 5

    asyncio.run(go())


# The real tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "tokenizer.json").write_text(train_tokenizer().json_text)
    config = {"bos_token": BOS_TEXT, "eos_token": EOT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(LLAMA4_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Server:
    tokenizer = Tokenizer.from_folder(folder)
    return Server(tokenizer, ChatTemplate.from_folder(folder, tokenizer))


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


PIECES = ["the class", " x", "\n\n", "日本", "👩‍👧", "é", "<|eot|>", "<|", "  ", "\u2028"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@settings(deadline=None, max_examples=40)
@given(text=TEXT)
def test_tokens_are_those_of_transformers(server: Server, reference: PreTrainedTokenizerFast, text: str) -> None:
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == reference(text, split_special_tokens=True)["input_ids"]
    assert answer["token_strs"] == reference.convert_ids_to_tokens(answer["tokens"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": BOS_TEXT + text}


@settings(deadline=None, max_examples=40)
@given(ids=st.lists(st.integers(0, 3071), max_size=20))
def test_any_tokens_detokenize_as_in_transformers(
    server: Server, reference: PreTrainedTokenizerFast, ids: list[int]
) -> None:
    expected = reference.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": expected}


def test_a_conversation_is_tokenized_as_it_is_answered(
    server: Server, reference: PreTrainedTokenizerFast, folder: Path
) -> None:
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi <|"}]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert tokens == reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 4}).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_images_count_as_their_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    tokens = ImageTokens.from_specials(
        tokenizer.special_ids, patch_id=tokenizer.special_ids["<|patch|>"], tokens_per_tile=2
    )
    loader = ImageLoader(ImageSettings(tile_size=28, tokens_per_tile=2))
    server = Server(tokenizer, ChatTemplate.from_folder(folder, tokenizer), vision=Vision(loader=loader, tokens=tokens))
    file = BytesIO()
    Image.new("RGB", (56, 28)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    try:
        seen = server.post("/tokenize", asked).json()
        chat = server.post("/v1/chat/completions", {**asked, "max_tokens": 4}).json()
    finally:
        loader.close()
    assert seen["tokens"].count(tokens.patch) == 3 * 2
    assert tokens.expand(1, 2)[0] in seen["tokens"]
    assert seen["count"] == chat["usage"]["prompt_tokens"]
