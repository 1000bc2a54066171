"""Questions with pictures for a cluster, and their ids and pixels as transformers gets them."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from serving import ANSWER_S, FrontDoor, Judge

from experts.config import load_config
from router.prompt.chat import ChatTemplate
from router.prompt.images.canvas import num_tiles
from router.prompt.images.processor_config import read_settings
from router.prompt.images.tiles import cut
from router.prompt.images.tokens import ImageTokens
from router.prompt.tokenizer import Tokenizer

OUTPUT = 12
SIZES = [(56, 56), (30, 20), (57, 56), (112, 112), (200, 60), (60, 300), (500, 375), (1, 1)]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A chat with any number of pictures, and its pixels and ids as transformers gets them."""

    messages: list[dict[str, Any]]
    ids: list[int]
    pixels: torch.Tensor | None


class Asker:
    """Makes questions about a model folder."""

    def __init__(self, folder: Path) -> None:
        config = load_config(folder)
        assert config.vision is not None
        self._side = config.vision.tile_size
        self._settings = read_settings(folder, config.vision)
        tokenizer = Tokenizer.from_folder(folder)
        self._template = ChatTemplate.from_folder(folder, tokenizer)
        self._tokens = ImageTokens.from_specials(
            tokenizer.special_ids, patch_id=config.image_token_id, tokens_per_tile=self._settings.tokens_per_tile
        )

    def question(self, text: str, sizes: list[tuple[int, int]], seed: int) -> Question:
        pictures = [noise(size, seed + number) for number, size in enumerate(sizes)]
        tiles = [cut(picture, self._settings) for picture in pictures]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
        plain = [{"type": "image"} for _ in pictures]
        sentence = [{"type": "text", "text": text}]
        ids = self._template.render(
            [{"role": "user", "content": plain + sentence}],
            images=[self._tokens.expand(tile.rows, tile.cols) for tile in tiles],
        )
        values = [
            torch.frombuffer(bytearray(tile.pixels), dtype=torch.uint8).view(
                num_tiles(tile.rows, tile.cols), 3, self._side, self._side
            )
            for tile in tiles
        ]
        pixels = (torch.cat(values).float() / 255 - 0.5) / 0.5 if values else None
        return Question(messages=[{"role": "user", "content": parts + sentence}], ids=ids, pixels=pixels)


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def answer(cluster: FrontDoor, question: Question) -> str:
    body = {
        "model": cluster.model, "messages": question.messages, "max_tokens": OUTPUT, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    response = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=ANSWER_S)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] == len(question.ids)
    return str(response.json()["choices"][0]["message"]["content"])


def check_alone_and_in_a_crowd(cluster: FrontDoor, folder: Path, judge: Judge) -> None:
    """Pictures of all sizes, words alone and several pictures at once are answered as transformers would."""
    asker = Asker(folder)
    questions = [asker.question(f"What is number {number}?", [size], number) for number, size in enumerate(SIZES)]
    questions += [asker.question(f"No picture {number}, only words.", [], number) for number in range(6)]
    questions += [asker.question("Compare these.", SIZES[:3], 90), asker.question("And these.", SIZES[2:5], 91)]
    alone = [answer(cluster, question) for question in questions[::5]]
    with ThreadPoolExecutor(len(questions)) as threads:
        together = list(threads.map(lambda question: answer(cluster, question), questions))
    for question, text in zip([*questions[::5], *questions], [*alone, *together], strict=True):
        judge.check(question.ids, OUTPUT, text, question.pixels)
