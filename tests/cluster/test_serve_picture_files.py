"""Picture files of all formats in long conversations, Guard's prompts and hostile files, through a front door.

The expected prompts come from transformers' own template, expansion and tokenizer.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from serving import ANSWER_S, FrontDoor, Judge
from serving_here import serving_here
from transformers import AutoTokenizer
from transformers.models.llama4.processing_llama4 import Llama4Processor

from cluster.tiny import make_tiny
from router.prompt.images.decode import decode_image
from router.prompt.images.limits import ImageLimits
from router.prompt.images.settings import ImageSettings
from router.prompt.images.tiles import ImageTiles, cut

SETTINGS = ImageSettings(tile_size=56, tokens_per_tile=4)
OUTPUT = 12
WORDS = ["the", "value", "of", "this", "object", "returns", "function", "name", "list", "type", "error"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation in OpenAI's form, the same in transformers' form, and its pictures."""

    messages: list[dict[str, Any]]
    hf_messages: list[dict[str, Any]]
    tiles: list[ImageTiles]

    def prompt(self, tokenizer: Any, **kwargs: Any) -> list[int]:
        """Ids as transformers' processor makes them."""
        text = tokenizer.apply_chat_template(self.hf_messages, add_generation_prompt=True, tokenize=False, **kwargs)
        before, *after = text.split("<|image|>")
        for image, rest in zip(self.tiles, after, strict=True):
            before += Llama4Processor._prompt_split_image(None, (image.rows, image.cols), 4) + rest
        return list(tokenizer.encode(before, add_special_tokens=False))

    @property
    def pixels(self) -> torch.Tensor | None:
        if not self.tiles:
            return None
        whole = torch.frombuffer(bytearray(b"".join(image.pixels for image in self.tiles)), dtype=torch.uint8)
        return (whole.view(-1, 3, 56, 56).float() / 255 - 0.5) / 0.5


def drawn(rnd: random.Random, width: int, height: int, kind: str) -> bytes:
    image = Image.new("RGB", (width, height), tuple(rnd.randbytes(3)))
    for _ in range(6):
        color, corner = tuple(rnd.randbytes(3)), (rnd.randrange(width), rnd.randrange(height))
        image.paste(color, (*corner, rnd.randint(corner[0], width), rnd.randint(corner[1], height)))
    out = BytesIO()
    image.save(out, kind)
    return out.getvalue()


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def question(seed: int, *, num_images: int, num_messages: int = 3) -> Question:
    """Text and pictures of all formats and sizes, interleaved, over several messages."""
    rnd = random.Random(seed)
    ours: list[list[dict[str, Any]]] = [[] for _ in range(num_messages)]
    theirs: list[list[dict[str, Any]]] = [[] for _ in range(num_messages)]
    tiles = []
    for turn in sorted(rnd.choices(range(num_messages), k=num_images)):
        kind = rnd.choice(["PNG", "JPEG", "WebP", "GIF"])
        data = drawn(rnd, rnd.randint(1, 260), rnd.randint(1, 260), kind)
        text = {"type": "text", "text": " ".join(rnd.choices(WORDS, k=rnd.randint(1, 9)))}
        ours[turn] += [text, {"type": "image_url", "image_url": {"url": url_of(data, kind)}}]
        theirs[turn] += [text, {"type": "image"}]
        tiles.append(cut(decode_image(data, ImageLimits()), SETTINGS))
    last = {"type": "text", "text": " ".join(rnd.choices(WORDS, k=rnd.randint(1, 40)))}
    roles = ["assistant" if turn % 2 else "user" for turn in range(num_messages)]
    return Question(
        messages=[{"role": role, "content": [*parts, last]} for role, parts in zip(roles, ours, strict=True)],
        hf_messages=[{"role": role, "content": [*parts, last]} for role, parts in zip(roles, theirs, strict=True)],
        tiles=tiles,
    )


@dataclass(frozen=True, kw_only=True)
class Served:
    """A cluster, and who judges it."""

    front_door: FrontDoor
    tokenizer: Any
    judge: Judge

    def post(self, messages: Sequence[dict[str, Any]], **fields: Any) -> httpx.Response:
        body = {
            "model": self.front_door.model, "messages": messages, "max_tokens": OUTPUT, "temperature": 0,
            "ignore_eos": True, **fields,
        }  # fmt: skip
        return httpx.post(f"{self.front_door.url}/v1/chat/completions", json=body, timeout=ANSWER_S)

    def check(self, asked: Question, response: httpx.Response, **kwargs: Any) -> None:
        assert response.status_code == 200, response.text
        body, prompt = response.json(), asked.prompt(self.tokenizer, **kwargs)
        assert body["usage"]["prompt_tokens"] == len(prompt)
        self.judge.check(prompt, OUTPUT, body["choices"][0]["message"]["content"], asked.pixels)


def _served(kind: str, folder: Path, **wanted: int) -> Iterator[Served]:
    model_dir = folder / f"tiny-{kind}"
    make_tiny(kind, model_dir)
    with serving_here(model_dir, folder / "state", kv_memory=128 << 20, **wanted) as front_door:
        yield Served(front_door=front_door, tokenizer=AutoTokenizer.from_pretrained(model_dir), judge=Judge(model_dir))


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served("scout", tmp_path_factory.mktemp("scout"), hosts=2, routers=2, max_batch_tokens=64)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served("guard", tmp_path_factory.mktemp("guard"))


def test_files_of_all_formats_in_long_conversations(scout: Served) -> None:
    questions = [question(seed, num_images=seed % 5) for seed in range(12)]
    with ThreadPoolExecutor(len(questions)) as threads:
        responses = list(threads.map(lambda asked: scout.post(asked.messages), questions))
    for asked, response in zip(questions, responses, strict=True):
        scout.check(asked, response)
    assert scout.judge.accepted <= 1


def test_hostile_files_are_refused_and_harm_nobody(scout: Served) -> None:
    png = drawn(random.Random(1), 30, 30, "PNG")
    huge = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    asked = question(3, num_images=2)
    for url, num, status in [
        ("http://127.0.0.1/x.png", 1, 400),
        ("file:///etc/passwd", 1, 400),
        (url_of(huge), 1, 400),
        (url_of(png[: len(png) // 2]), 1, 400),
        (url_of(png, "webp"), 1, 200),
        (url_of(drawn(random.Random(2), 1, 1, "PNG")), 8, 200),
        (url_of(drawn(random.Random(2), 1, 100_000, "PNG")), 1, 200),
        (url_of(png), 50, 400),
    ]:
        parts = [{"type": "image_url", "image_url": {"url": url}}] * num
        response = scout.post([{"role": "user", "content": parts}], max_tokens=1)
        assert response.status_code == status, response.text
        if status != 200:
            assert response.json()["error"]["param"].startswith("messages")
            assert not re.search(r"0x[0-9a-f]|\.py|Error|passwd", response.text)
    scout.check(asked, scout.post(asked.messages))


def test_completions_take_no_images(scout: Served) -> None:
    prompt = [{"type": "image_url", "image_url": {"url": url_of(drawn(random.Random(1), 3, 3, "PNG"))}}]
    body = {"model": scout.front_door.model, "prompt": prompt}
    response = httpx.post(f"{scout.front_door.url}/v1/completions", json=body, timeout=ANSWER_S)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("prompt")


@pytest.mark.parametrize(("num_images", "excluded"), [(0, None), (1, ["S1", "S9"]), (3, [])])
def test_guard_judges_conversations(guard: Served, num_images: int, excluded: list[str] | None) -> None:
    kwargs = {} if excluded is None else {"excluded_category_keys": excluded}
    asked = question(num_images, num_images=num_images, num_messages=num_images + 1)
    guard.check(asked, guard.post(asked.messages, chat_template_kwargs=kwargs), **kwargs)


def test_guard_refuses_arguments_without_bounds(guard: Served) -> None:
    for kwargs in ({"excluded_category_keys": ["x" * 20_000]}, {"excluded_category_keys": ["S1"] * 200}):
        response = guard.post([{"role": "user", "content": "hi"}], chat_template_kwargs=kwargs)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "chat_template_kwargs"
